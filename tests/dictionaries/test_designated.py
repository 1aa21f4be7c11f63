"""Latents that are told whose they are stay so while they train, and cost what they should."""

import dataclasses

import pytest
import torch

from helpers.dictionaries.autoencoders import BatchTopK, ReLU
from helpers.dictionaries.crosscoders import Crosscoder
from helpers.dictionaries.designated import DedicatedCell, DedicatedCrosscoder, DesignatedCrosscoder
from helpers.dictionaries.training import TrainConfig, train
from helpers.diffing.norms import classes, delta_norm

D, N = 8, 12
CONFIG = TrainConfig(tokens=64 * 20, lr=1e-2, sparsity=0.05)


def batches():
    random = torch.Generator().manual_seed(1000)
    return [torch.randn(64, 2, D, generator=random) for _ in range(20)]


def test_dedicated_latents_are_one_models_before_and_after_training():
    crosscoder = DedicatedCrosscoder(D, N, BatchTopK(3), dedicated=2)
    whose = ["base-only"] * 2 + ["chat-only"] * 2
    assert classes(delta_norm(crosscoder))[:4].tolist() == whose
    start = crosscoder.W_dec.detach().clone()
    train(crosscoder, batches(), CONFIG)
    assert not torch.equal(crosscoder.W_dec, start)
    assert classes(delta_norm(crosscoder)).tolist()[:4] == whose
    for weights in (crosscoder.encoders, crosscoder.decoders):
        assert not weights[1, :2].any() and not weights[0, 2:4].any() and weights[:, 4:].all()


def test_designated_latents_write_the_same_into_both_models():
    crosscoder = DesignatedCrosscoder(D, N, ReLU(), designated=5, cost=0.5)
    train(crosscoder, batches(), CONFIG)
    base, chat = crosscoder.decoders
    torch.testing.assert_close(base[:5], chat[:5], rtol=0, atol=0)
    assert (base[5:] != chat[5:]).any(1).all()


def test_designated_latents_cost_a_part():
    crosscoder = DesignatedCrosscoder(2, 2, ReLU(), designated=1, cost=0.25)
    crosscoder.W_dec.data = torch.tensor([[3.0, 4.0, 3.0, 4.0], [3.0, 4.0, 0.0, 1.0]])
    assert crosscoder.sizes().tolist() == [0.25 * 10, 6.0]


def test_a_cost_of_one_and_equal_rows_is_a_crosscoder():
    x, plain = batches()[0], Crosscoder(D, N, ReLU(), seed=3)
    torch.testing.assert_close(DesignatedCrosscoder(D, N, ReLU(), seed=3, designated=4, cost=1.0)(x), plain(x))


def test_a_cell_builds_what_it_says_and_is_another_one_than_a_crosscoders():
    cell = DedicatedCell("BatchTopK", N, 3, dedicated=2)
    assert cell.build(D).dedicated == 2
    assert cell.switches() != dataclasses.replace(cell, dedicated=3).switches()


@pytest.mark.parametrize("dedicated", [0, 7])
def test_no_or_too_many_dedicated_latents_are_refused(dedicated):
    with pytest.raises(ValueError, match="at most half"):
        DedicatedCrosscoder(D, N, BatchTopK(3), dedicated=dedicated)


@pytest.mark.parametrize(
    "wrong", [{"designated": 0}, {"designated": N + 1}, {"cost": 0.0}, {"activation": BatchTopK(3)}]
)
def test_what_cannot_be_designated_is_refused(wrong):
    given = {"activation": ReLU(), "designated": 2, "cost": 0.5} | wrong
    with pytest.raises(ValueError, match="cannot be designated"):
        DesignatedCrosscoder(D, N, **given)
