"""The conditions of the causal experiment by name, and what dictionaries are compared on, by hand and by loops."""

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_text import A, T, U
from twins import D_MODEL, random_dialogue, save_tiny

from helpers.activations.injected import InjectedPair, Plan
from helpers.dictionaries.autoencoders import ReLU, SparseAutoencoder
from helpers.dictionaries.crosscoders import Crosscoder
from helpers.diffing.causal_diffing import cases, directions, explained, measured, nested, recalls, sets_of
from helpers.diffing.effects import effects
from helpers.diffing.patching import crosscoder_difference, patch_kl, sae_difference, written
from helpers.subjects.pair import SubjectPair
from helpers.subjects.subject import load_subject

N = 12
TABLE = pd.DataFrame(
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
    found = sets_of(TABLE, 4)
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


class Background:
    """As much of a stream as directions need."""

    n_activations, batch_size = 64, 8

    def take(self, n):
        return torch.randn(n, 40, generator=torch.Generator().manual_seed(0))


def test_recall_by_hand():
    pair = InjectedPair(Background(), Plan(each=2, rhos=(0.5,)))
    v = pair.directions  # chat-only, base-only, shared, context, weak: two each
    found = recalls(torch.stack([3 * v[0], v[1] + 0.1 * v[9], v[3], v[4] + 1.5 * v[5], -v[8]]), pair)
    assert found.to_dict() == {
        "chat-only": 1.0,
        "base-only": 0.5,
        "shared": 0.5,  # cosines 0.55 and 0.83
        "context": 0.0,
        "weak": 0.0,  # a row points one way only
        "exclusive": 0.75,
    }


def test_directions_of_a_crosscoder_are_of_both_models_and_their_difference():
    dictionary = crosscoder()
    base, chat = dictionary.decoders.detach()
    found = directions(dictionary)
    assert found.shape == (4 * N, D_MODEL)
    torch.testing.assert_close(found[2 * N : 3 * N] + found[:N], found[N : 2 * N])
    torch.testing.assert_close(found[3 * N :], -found[2 * N : 3 * N])
    torch.testing.assert_close(found[:N], base)
    torch.testing.assert_close(directions(sae()), sae().W_dec.detach())
