"""The autoencoders of the evaluations: which there are, and that what one notebook trained the next one loads."""

import dataclasses

import pytest
import torch
from tiny_shelf import TINY

from helpers.dictionaries import sweeps
from helpers.dictionaries.collection import PLANS, TrainedSAEs


def test_groups_by_hand(open_shelf):
    shelf = open_shelf(seeds=2)
    of = {
        group: [(c.method, c.n_latents, c.sparsity, c.seed) for c in shelf.cells(group)] for group in ("n", "k", "ReLU")
    }
    assert of["n"] == [("TopK", 8, 4, 3), ("TopK", 16, 4, 3), ("TopK", 8, 4, 4), ("TopK", 16, 4, 4)]
    assert of["k"] == [("TopK", 16, 2, 3), ("TopK", 16, 4, 3), ("TopK", 16, 2, 4), ("TopK", 16, 4, 4)]
    assert of["ReLU"] == [("ReLU", 16, price, seed) for seed in (3, 4) for price in TINY.prices]


def test_what_groups_share_is_there_once(open_shelf):
    shelf = open_shelf(seeds=1)
    assert len(shelf.cells()) == len(set(shelf.cells())) == 2 + 2 + 2 - 1
    assert set(shelf.cells("n", "k")) == set(shelf.cells("n")) | set(shelf.cells("k"))


def test_larger_ones_learn_at_lower_rates(open_shelf):
    small, large = (cell.lr for cell in open_shelf(seeds=1).cells("n"))
    assert small / large == pytest.approx(2**0.5)


def test_trained_once_then_loaded(open_shelf, monkeypatch):
    frame, saes = open_shelf(seeds=1).train("n")
    assert frame.n_latents.tolist() == [8, 16] and [sae.n_latents for sae in saes.values()] == [8, 16]
    monkeypatch.setattr(sweeps, "train", lambda *_, **__: pytest.fail("it was trained again"))
    again = open_shelf(seeds=1).train("n")[1]
    assert all(torch.equal(sae.W_dec, again[cell].W_dec) for cell, sae in saes.items())


def test_the_plan_the_seeds_and_the_harvest_are_its_settings(open_shelf):
    shelf = open_shelf(seeds=2)
    harvest = {"context": TINY.context, "normalisation": "unit", "drop": "special", "special_ids": [256, 257]}
    assert shelf.settings == dataclasses.asdict(TINY) | {"seeds": [3, 4], "harvest": harvest | {"head": None}}
    assert open_shelf("reference", seeds=1).plan == dataclasses.replace(PLANS["reference"], context=TINY.context)


@pytest.mark.parametrize(
    "subject, contexts",
    [("embedded", [64, 128, 128, 128, 64]), ("hub", [64] * 5), ("gemma", [64, 128, 128, 128, 1024])],
)
def test_rows_are_as_long_as_the_subject_asks(subject, contexts):
    plans = ["smoke", "laptop", "reference", "frontier", "paper"]
    assert [TrainedSAEs(plan, subject, [0]).plan.context for plan in plans] == contexts


def test_an_unknown_subject_is_refused_at_once():
    with pytest.raises(ValueError, match='no subject "gpt2" of family "gpt2": use embedded or hub or gemma'):
        TrainedSAEs("smoke", "gpt2", [0])


def test_heldout_text_is_the_same_for_rows_and_activations(open_shelf):
    shelf = open_shelf()
    assert shelf.heldout.shape == (64, shelf.model.d_model)
    rows = shelf.heldout_rows(4)
    assert rows.shape == (4, 8) and rows.flatten().tolist() == shelf.heldout_text.tokens[:32].tolist()
    assert shelf.heldout_rows(2, context=5).shape == (2, 5)


def test_bad_input(open_shelf):
    shelf = open_shelf()
    with pytest.raises(ValueError, match="there is no group JumpReLU: choose of n, k, ReLU"):
        shelf.cells("JumpReLU")
    with pytest.raises(ValueError, match="10000 rows are more than the .* of held-out text"):
        shelf.heldout_rows(10_000)
