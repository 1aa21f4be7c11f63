"""Means and intervals over dialogues, and halves of latents, by hand and against slow twins."""

import numpy as np
import pandas as pd
import pytest

from helpers.diffing.effects import candidates, contrast, effects, halves, random_halves, rank_sum
from helpers.diffing.patching import Patched


def patched(kl, dialogue, first):
    """`kl`: condition -> a value for each position."""
    order = np.arange(len(dialogue))
    positions = pd.DataFrame({"dialogue": dialogue, "position": order, "order": order, "first_nine": first})
    return Patched(positions, pd.DataFrame(kl))


SMALL = patched({"None": [4.0, 2.0, 2.0, 8.0], "All": [1.0, 1.0, 1.0, 1.0]}, [0, 0, 0, 1], [False, True, True, True])


def test_means_over_positions_by_hand():
    found = effects(SMALL, draws=50).set_index(["condition", "positions"])
    assert found.kl.to_dict() == {
        ("None", "first nine"): 4.0,
        ("All", "first nine"): 1.0,
        ("None", "full"): 4.0,
        ("All", "full"): 1.0,
    }
    assert found.recovered["All", "first nine"] == pytest.approx(0.75)
    assert found.recovered["None", "full"] == 0 and found.recovered_high["None", "full"] == 0
    assert found.n["All", "first nine"] == 3 and found.n["All", "full"] == 4 and (found.dialogues == 2).all()
    # resampled: only the first dialogue, both, or only the second
    assert found.kl_low["None", "full"] == pytest.approx(8 / 3) and found.kl_high["None", "full"] == 8
    assert found.recovered_low["All", "full"] == pytest.approx(1 - 3 / 8)
    assert found.recovered_high["All", "full"] == pytest.approx(1 - 1 / 8)


def many(n=40, seed=0):
    random = np.random.default_rng(seed)
    dialogue = np.repeat(np.arange(n), random.integers(1, 9, n))
    hard = random.gamma(2, size=n)[dialogue]  # a dialogue's positions are alike
    noise = random.gamma(5, 0.2, size=(2, len(dialogue)))
    return patched({"None": 2 * hard, "one": hard * noise[0], "other": 1.1 * hard * noise[1]}, dialogue, dialogue >= 0)


def slow_interval(data, statistic, draws=2000, seed=1):
    random, groups = np.random.default_rng(seed), [rows for _, rows in data.kl.groupby(data.positions.dialogue)]
    found = [
        statistic(pd.concat([groups[i] for i in random.integers(0, len(groups), len(groups))])) for _ in range(draws)
    ]
    return np.quantile(found, [0.025, 0.975])


def test_intervals_are_those_of_a_plain_bootstrap_over_dialogues():
    data = many()
    found = effects(data, draws=2000).set_index(["condition", "positions"]).loc[("one", "full")]
    slow = slow_interval(data, lambda kl: kl["one"].mean(), draws=600)
    np.testing.assert_allclose([found.kl_low, found.kl_high], slow, rtol=0.05)
    slow = slow_interval(data, lambda kl: 1 - kl["one"].mean() / kl["None"].mean(), draws=600)
    np.testing.assert_allclose([found.recovered_low, found.recovered_high], slow, rtol=0.05)


def test_a_contrast_is_paired():
    data = many()
    found, alone = contrast(data, "one", "other").set_index("positions").loc["full"], effects(data)
    assert found.kl == pytest.approx((data.kl["one"] - data.kl["other"]).mean())
    slow = slow_interval(data, lambda kl: (kl["one"] - kl["other"]).mean(), draws=600)
    np.testing.assert_allclose([found.kl_low, found.kl_high], slow, rtol=0.1, atol=0.02)
    widest = alone[alone.condition == "one"].iloc[1]
    assert found.kl_high - found.kl_low < 0.5 * (widest.kl_high - widest.kl_low)
    same = contrast(data, "one", "one")
    assert (same[["kl", "kl_low", "kl_high"]] == 0).all(axis=None)


def test_nothing_is_averaged_over_nothing():
    with pytest.raises(ValueError, match="there is no condition 'Al': choose of None, All"):
        contrast(SMALL, "All", "Al")
    with pytest.raises(ValueError, match=r"0 dialogue\(s\) have first nine positions: an interval needs two"):
        effects(patched({"None": [1.0, 1.0]}, [0, 1], [False, False]))
    with pytest.raises(ValueError, match=r"1 dialogue\(s\) have first nine positions"):
        effects(patched({"None": [1.0, 1.0]}, [0, 0], [True, True]))


TABLE = pd.DataFrame(
    {
        "delta": [0.95, 0.99, 0.7, 0.92, 1.0, 0.5, 0.91, 0.96],
        "class": ["chat-only"] * 2 + ["other"] + ["chat-only"] * 2 + ["shared"] + ["chat-only"] * 2,
        "rate": [0.1, 0.1, 0.1, 0.1, 0.0, 0.1, 0.1, 0.1],
        "nu_error": [0.0, 0.3, 0.1, 3.0, 0.1, 1.0, 0.2, np.nan],
        "nu_reconstruction": [0.4, 0.1, 0.1, 0.1, 0.1, 1.0, 0.2, 0.1],
    }
)


def test_candidates_by_hand():
    assert candidates(TABLE).index.tolist() == [0, 1, 6]  # 3: ratio of 3; 4: never on; 7: no ratio
    assert candidates(TABLE, n=7).index.tolist() == [1, 0, 6, 2]
    with pytest.raises(ValueError, match="1 of 2 latents can be halved"):
        candidates(TABLE, n=2).index.tolist()


def test_rank_sum_and_halves_by_hand():
    some = candidates(TABLE, n=7)  # nu_error ranks: 1: 4, 0: 1, 6: 3, 2: 2; nu_reconstruction: 1.5, 4, 3, 1.5
    assert rank_sum(some).to_dict() == {1: -5.5, 0: -5.0, 6: -6.0, 2: -3.5}
    best, worst = halves(rank_sum(some))
    assert best.tolist() == [2, 0] and worst.tolist() == [1, 6]
    best, worst = halves(candidates(TABLE).delta)
    assert best.tolist() == [1] and worst.tolist() == [6]  # three latents: the middle one is in neither


def test_random_halves_share_nothing_and_leave_nothing_out():
    latents = pd.Index([3, 5, 8, 9, 20, 31])
    found = [random_halves(latents, seed) for seed in range(20)]
    for one, other in found:
        assert sorted([*one, *other]) == latents.tolist() and len(one) == 3
    assert len({tuple(sorted(one)) for one, _ in found}) > 5
    assert random_halves(latents, 0)[0].tolist() == found[0][0].tolist()


def test_scores_that_are_missing():
    with pytest.raises(ValueError, match="1 of 2 latents have a score"):
        halves(pd.Series([1.0, np.nan]))
    with pytest.raises(ValueError, match="1 of 1 latents have a score: halves need all, and two"):
        halves(pd.Series([1.0]))
