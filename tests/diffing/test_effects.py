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
    cases,
    effects,
    explained,
    gap_closed,
    halves,
    measured,
    sets_of,
)
from helpers.diffing.latent_scaling import rank_sum
from helpers.diffing.patching import Patched, difference_of, patch_kl, written
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


def test_the_mean_alone_by_hand():
    assert gap_closed(SMALL).to_dict() == {"None": 0, "All": 0.75}
    plain = effects(SMALL, draws=0)
    assert plain[plain.positions == "full"].recovered.tolist() == [0, 0.75] and "recovered_low" not in plain


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


def test_halves_by_hand():
    # of the seven largest 3 has a ratio of 3, 4 is never on, 7 has no ratio; ranks of nu_error: 1: 4, 0: 1, 6: 3, 2: 2
    found = sets_of(TABLE, 7)
    assert (found["best by Δ"].tolist(), found["worst by Δ"].tolist()) == ([1, 0], [6, 2])
    assert (found["best by ν"].tolist(), found["worst by ν"].tolist()) == ([2, 0], [1, 6])
    assert sorted([*found["random"], *found["other random"]]) == [0, 1, 2, 6] and len(found) == 6
    assert rank_sum(TABLE.loc[[1, 0, 6, 2]]).to_dict() == {1: -5.5, 0: -5.0, 6: -6.0, 2: -3.5}
    best, worst = halves(TABLE.delta[[0, 1, 6]])
    assert best.tolist() == [1] and worst.tolist() == [6]  # three latents: the middle one is in neither
    with pytest.raises(ValueError, match=r"1 latent\(s\) can be halved"):
        sets_of(TABLE, 2)


def test_random_halves_share_nothing_leave_nothing_out_and_differ_by_seed():
    table = TABLE.assign(rate=0.1, nu_error=0.1, nu_reconstruction=0.1)
    found = [sets_of(table, 8, seed) for seed in range(20)]
    assert all(sorted([*each["random"], *each["other random"]]) == [*range(8)] for each in found)
    assert len({tuple(sorted(each["random"])) for each in found}) > 5


N = 12

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


def test_cases_are_those_of_patching_by_name(pair):
    difference = difference_of(crosscoder())
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
    difference = difference_of(crosscoder())
    found = measured(pair, DIALOGUES, cases(difference, {"none": np.array([], int)}), ["condition", "bias"], draws=20)
    kl = found[found.positions == "full"].set_index(["condition", "bias"]).kl
    assert kl["none", "without"] == pytest.approx(kl["None", "None"])
    assert kl["none", "with"] == pytest.approx(kl["bias alone", "with"])
    assert kl["bias alone", "with"] != pytest.approx(kl["None", "None"])


def test_keys_need_a_name_for_each_part(pair):
    difference = difference_of(crosscoder())
    with pytest.raises(ValueError, match="the case .* has not the parts method, condition, bias"):
        measured(pair, DIALOGUES, cases(difference, {}), ["method", "condition", "bias"])


@pytest.mark.parametrize("kind", ["crosscoder", "difference", "chat"])
def test_explained_equals_a_loop_over_tokens(kind):
    x = torch.randn(50, 2, D_MODEL, generator=torch.Generator().manual_seed(0))
    dictionary = crosscoder() if kind == "crosscoder" else sae()
    made = difference_of(dictionary, None if kind == "crosscoder" else kind)
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
