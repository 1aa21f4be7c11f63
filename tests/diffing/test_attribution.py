"""Shares of latents against slow twins and their sum; removal against patching; the tokens with the highest KL."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_text import A, T, U
from twins import D_MODEL, random_dialogue, save_tiny

from helpers.dictionaries.autoencoders import BatchTopK, ReLU, SparseAutoencoder
from helpers.dictionaries.crosscoders import Crosscoder, DecoupledCrosscoder
from helpers.diffing import attribution
from helpers.diffing.attribution import found_by_removal, hardest, removal, shares
from helpers.diffing.patching import Patched, difference_of, patch_kl, written
from helpers.subjects.pair import SubjectPair
from helpers.subjects.subject import load_subject
from helpers.text.turns import Encoded

N = 8
ROLES = [[T, U, T, A, A, A, T], [T, T, U, T, A, A, T, T, U, T, A, A], [T, U, T, A, A]]


DIALOGUES = [random_dialogue(roles, seed) for seed, roles in enumerate(ROLES)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folders = [save_tiny(tmp_path_factory.mktemp(name), "gemma2", seed) for seed, name in enumerate(("base", "chat"))]
    subjects = [load_subject(folder) for folder in folders]
    subjects[1].tokenizer.chat_template = "{{ bos_token }}"
    return SubjectPair(*subjects)


def randomised(dictionary, scale=0.15):
    random = torch.Generator().manual_seed(7)
    for parameter in dictionary.parameters():
        parameter.data = scale * torch.randn(parameter.shape, generator=random)
    for activation in (dictionary.activation, getattr(dictionary, "activation_chat", None)):
        if isinstance(activation, BatchTopK):
            activation.threshold.fill_(0.1)
    return dictionary.eval()


def differences():
    yield "crosscoder", difference_of(randomised(Crosscoder(D_MODEL, N, ReLU())))
    yield "decoupled", difference_of(randomised(DecoupledCrosscoder(D_MODEL, N, BatchTopK(3))))
    yield "diff-SAE", difference_of(randomised(SparseAutoencoder(D_MODEL, N, ReLU())), "difference")


def test_shares_add_up_to_what_all_latents_take_off(pair):
    for name, difference in differences():
        found = shares(pair, DIALOGUES, difference, steps=64)
        kl = patch_kl(pair, DIALOGUES, {"All": written(difference)}).kl.mean()
        assert found.shape == (N,) and abs(kl["None"] - kl["All"]) > 1e-3, name
        assert found.sum().item() == pytest.approx(kl["None"] - kl["All"], rel=0.02, abs=1e-4), name


def test_a_faint_latent_has_the_share_that_patching_it_alone_has(pair):
    for name, difference in differences():
        faint = dataclasses.replace(difference, rows=1e-3 * difference.rows)  # so little that KL is a straight line
        found = 1e3 * shares(pair, DIALOGUES, faint, steps=1)
        alone = patch_kl(pair, DIALOGUES, {f"{j}": written(faint, [j]) for j in range(N)}).kl.astype(float).mean()
        slow = [1e3 * (alone["None"] - alone[f"{j}"]) for j in range(N)]
        np.testing.assert_allclose(found, slow, rtol=0.1, atol=0.03 * np.abs(slow).max(), err_msg=name)


def test_batches_do_not_matter(pair, monkeypatch):
    _, difference = next(differences())
    all_at_once = shares(pair, DIALOGUES, difference, steps=3)
    monkeypatch.setattr(attribution, "BATCH", 1)
    one = shares(pair, DIALOGUES, difference, steps=3)
    torch.testing.assert_close(one, all_at_once, rtol=1e-3, atol=1e-6)


def test_removal_equals_patching_latent_by_latent(pair, monkeypatch):
    monkeypatch.setattr(attribution, "REMOVED", 3)
    dialogue, position = DIALOGUES[1], 9
    for name, difference in differences():
        found = removal(pair, dialogue, position, difference)

        def without(latents, difference=difference):
            kept = difference.kept(latents)
            return lambda site: site.chat - site.added(difference, kept, False)

        slow = patch_kl(pair, [dialogue], {f"{j}": without([j]) for j in range(N)})
        at = slow.kl[slow.positions.position == position].iloc[0]
        assert list(found) == sorted(found, reverse=True) and len(found) > 2, name
        for j in range(N):
            assert found.get(j, 0.0) == pytest.approx(at[f"{j}"], rel=1e-2, abs=1e-4), (name, j)


def test_removal_wants_a_position_that_predicts_an_answer(pair):
    _, difference = next(differences())
    for position in (7, 11, -1):
        with pytest.raises(ValueError, match="predicts no answer"):
            removal(pair, DIALOGUES[1], position, difference)


def test_hardest_decisions_by_hand():
    decisions = [np.array([-1, 5, -1, -1, 5, -1]), np.array([-1, 5, -1, 2, -1, 2]), np.array([-1, -1, 5, -1])]
    dialogues = [Encoded(np.zeros(len(each)), np.zeros(len(each)), np.full(len(each), 5), each) for each in decisions]
    rows = [(0, 1, 1.0), (0, 2, 99.0), (0, 4, 7.0), (1, 1, 3.0), (1, 3, 8.0), (1, 4, 99.0), (1, 5, 9.0), (2, 2, 4.0)]
    places = pd.DataFrame(rows, columns=["dialogue", "position", "kl"])
    patched = Patched(places[["dialogue", "position"]], pd.DataFrame({"None": places.kl}))
    found = hardest(patched, dialogues, [2, 5, 6], n=2)
    assert found.to_dict("list") == {
        "dialogue": [1, 0, 2],  # one of each dialogue
        "position": [5, 4, 2],  # 0, 2 and 1, 4 lie inside an answer
        "behaviour": [2, 5, 5],
        "kl": [9.0, 7.0, 4.0],
    }


def test_the_latent_found_by_removal_by_hand(monkeypatch):
    tokens = pd.DataFrame({"dialogue": [0, 0], "position": [4, 9], "behaviour": [1, 0], "kl": [3.0, 2.0]})
    changes = {4: pd.Series([0.5, 0.1], index=[2, 0]), 9: pd.Series([], dtype=float)}  # at 9 no latent is on
    monkeypatch.setattr(attribution, "patch_kl", lambda *_: None)
    monkeypatch.setattr(attribution, "hardest", lambda *_: tokens)
    monkeypatch.setattr(attribution, "removal", lambda pair, dialogue, position, difference: changes[position])
    f1 = np.array([[0.0, 0.0, 0.9], [0.6, 0.8, 0.3]])
    [row] = found_by_removal(None, [None], None, f1, [0, 1], 0.5).to_dict("records")
    assert {name: row[name] for name in ("behaviour", "kl", "change", "latent")} == {
        "behaviour": 1, "kl": 3.0, "change": 0.5, "latent": 2
    }  # fmt: skip
    assert (row["f1"], row["best"], row["active"], row["random"]) == (0.3, 0.8, 2, 0.5)
    assert row["random_f1"] == pytest.approx(0.45)
    assert (row["first_f1"], row["random_first"]) == (0.6, 1.0)  # both of the two are among the first five
    monkeypatch.setattr(attribution, "FIRST", 1)
    [row] = found_by_removal(None, [None], None, f1, [0, 1], 0.5).to_dict("records")
    assert (row["first_f1"], row["random_first"]) == (0.3, pytest.approx(0.5))
    monkeypatch.setattr(attribution, "hardest", lambda *_: tokens[:0])  # of dialogues without behaviours
    nothing = found_by_removal(None, [None], None, f1, [0, 1], 0.5)
    assert nothing.behaviour.tolist() == [0, 1] and nothing.drop(columns="behaviour").isna().all(axis=None)
    assert list(nothing) == list(row)
