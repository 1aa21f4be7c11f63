"""Means and intervals over dialogues, and halves of latents, by hand and against slow twins.

The conditions of the causal experiment by name, and what dictionaries are compared on, by hand and by loops.
"""

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_text import A, T, U
from twins import D_MODEL, random_dialogue, save_tiny

from helpers.dictionaries.autoencoders import ReLU, SparseAutoencoder
from helpers.dictionaries.crosscoders import Crosscoder
from helpers.diffing.effects import (
    candidates,
    cases,
    effects,
    explained,
    halves,
    measured,
    nested,
    random_halves,
    sets_of,
)
from helpers.diffing.latent_scaling import rank_sum
from helpers.diffing.patching import Patched, crosscoder_difference, patch_kl, sae_difference, written
from helpers.subjects.pair import SubjectPair
from helpers.subjects.subject import load_subject


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


def test_nothing_is_averaged_over_nothing():
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


N = 12
LATENTS = pd.DataFrame(
    {
        "delta": [0.9, 0.8, 0.7, 0.6, 0.1],
        "class": "other",
        "rate": 0.1,
        "nu_error": [0.9, 0.1, 0.8, 0.2, 0.0],
        "nu_reconstruction": [0.7, 0.2, 0.9, 0.1, 0.0],
    }
)


DIALOGUES = [random_dialogue([T, U, T, A, A, A, T], 0), random_dialogue([T, T, U, T, A, A, A, A], 1)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folders = [save_tiny(tmp_path_factory.mktemp(name), "gemma2", seed) for seed, name in enumerate(("base", "chat"))]
    subjects = [load_subject(folder) for folder in folders]
    subjects[1].tokenizer.chat_template = "{{ bos_token }}"
    return SubjectPair(*subjects)


def randomised(dictionary, scale=0.4):
    random = torch.Generator().manual_seed(7)
    for parameter in dictionary.parameters():
        parameter.data = scale * torch.randn(parameter.shape, generator=random)
    return dictionary.eval()


def crosscoder():
    return randomised(Crosscoder(D_MODEL, N, ReLU()))


def sae():
    return randomised(SparseAutoencoder(D_MODEL, N, ReLU()))


def test_halves_by_hand():
    found = sets_of(LATENTS, 4)
    assert {name: found[name].tolist() for name in ("best by Δ", "worst by Δ")} == {
        "best by Δ": [0, 1],
        "worst by Δ": [2, 3],
    }
    assert sorted(found["best by ν"]) == [1, 3] and sorted(found["worst by ν"]) == [0, 2]
    assert sorted([*found["random"], *found["other random"]]) == [0, 1, 2, 3]
    assert len(found) == 6


def test_cases_are_those_of_patching_by_name(pair):
    difference = crosscoder_difference(crosscoder(), pair)
    sets = {"some": np.array([1, 4]), "others": np.setdiff1d(np.arange(N), [1, 4])}
    found = measured(pair, DIALOGUES, cases(difference, sets), ["condition", "bias"], draws=20)
    by_hand = {"All": written(difference), "some": written(difference, [1, 4], bias=True)}
    expected = effects(patch_kl(pair, DIALOGUES, by_hand), draws=20).set_index(["condition", "positions"]).kl
    kl = found.set_index(["condition", "bias", "positions"]).kl
    for positions in ("first nine", "full"):
        assert kl["All", "without", positions] == expected["All", positions]
        assert kl["some", "with", positions] == expected["some", positions]
        assert kl["None", "None", positions] == expected["None", positions]
    assert len(found) == 2 * (1 + 2 * 4 + 1)


def test_no_latent_with_the_bias_and_all_latents_without_it_differ(pair):
    difference = crosscoder_difference(crosscoder(), pair)
    found = measured(pair, DIALOGUES, cases(difference, {"none": np.array([], int)}), ["condition", "bias"], draws=20)
    kl = found[found.positions == "full"].set_index(["condition", "bias"]).kl
    assert kl["none", "without"] == pytest.approx(kl["None", "None"])
    assert kl["none", "with"] == pytest.approx(kl["bias alone", "with"])
    assert kl["bias alone", "with"] != pytest.approx(kl["None", "None"])


def test_keys_need_a_name_for_each_part(pair):
    difference = crosscoder_difference(crosscoder(), pair)
    with pytest.raises(ValueError, match="the case .* has not the parts method, condition, bias"):
        measured(pair, DIALOGUES, cases(difference, {}), ["method", "condition", "bias"])


def test_nested_sets_end_with_all(pair):
    difference, order = crosscoder_difference(crosscoder(), pair), np.random.default_rng(0).permutation(N)
    some = {(size,): condition for size, condition in nested(difference, order, [2, N]).items()}
    found = measured(pair, DIALOGUES, some | {("All",): written(difference)}, ["latents"], draws=20)
    kl = found[found.positions == "full"].set_index("latents").kl
    assert kl[N] == pytest.approx(kl["All"]) and kl[2] != pytest.approx(kl["All"])
    by_hand = {"two": written(difference, order[:2].tolist())}
    expected = effects(patch_kl(pair, DIALOGUES, by_hand), draws=20).query("condition == 'two' and positions == 'full'")
    assert kl[2] == expected.kl.item()
    with pytest.raises(ValueError, match="there are 12 latents in this order, 13 were asked for"):
        nested(difference, order, [13])


@pytest.mark.parametrize("kind", ["crosscoder", "difference", "chat"])
def test_explained_equals_a_loop_over_tokens(pair, kind):
    x = torch.randn(50, 2, D_MODEL, generator=torch.Generator().manual_seed(0))
    dictionary = crosscoder() if kind == "crosscoder" else sae()
    made = crosscoder_difference(dictionary, pair) if kind == "crosscoder" else sae_difference(dictionary, pair, kind)
    missed, total, mean = 0.0, 0.0, (x[:, 1] - x[:, 0]).mean(0)
    for token in x:
        wanted = token[1] - token[0]
        if kind == "crosscoder":
            base, chat = dictionary(token[None])[0]
            rebuilt = chat - base
        elif kind == "difference":
            rebuilt = dictionary(wanted[None])[0]
        else:
            rebuilt = dictionary.encode(token[None, 1])[0] @ dictionary.W_dec
        missed += (wanted - rebuilt).square().sum().item()
        total += (wanted - mean).square().sum().item()
    assert explained(made, x, batch=7) == pytest.approx(1 - missed / total, rel=1e-4)
