"""Latents that are told what they are for stay so while they train, and cost what they should."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from helpers.base import products
from helpers.dictionaries import training
from helpers.dictionaries.autoencoders import BatchTopK, ReLU
from helpers.dictionaries.crosscoders import Crosscoder
from helpers.dictionaries.designated import (
    DedicatedCell,
    DedicatedCrosscoder,
    DeltaCell,
    DeltaCrosscoder,
    DesignatedCrosscoder,
)
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


# ---- delta latents


def delta_crosscoder(**changes):
    """Its decoder norms differ between latents and models."""
    crosscoder = DeltaCrosscoder(D, N, BatchTopK(2), **{"delta": 5, "k_delta": 1, "weight": 3.0} | changes).train()
    random = torch.Generator().manual_seed(5)
    crosscoder.W_dec.data *= 0.2 + torch.rand(N, 2 * D, generator=random)
    crosscoder.b_dec.data = 0.1 * torch.randn(2 * D, generator=random)
    return crosscoder


def test_delta_latents_have_places_of_their_own():
    crosscoder, x = delta_crosscoder(), batches()[0]
    latents, free = crosscoder.encode(x), crosscoder.pre_acts(x).relu()
    worth = free * crosscoder.sizes()
    for some, places in ((slice(0, 5), 1), (slice(5, N), 2)):
        least = worth[:, some].flatten().topk(places * len(x)).values[-1]
        torch.testing.assert_close(latents[:, some], torch.where(worth >= least, free, 0)[:, some])
        assert (latents[:, some] > 0).sum() == places * len(x)


def test_delta_training_equals_the_formula(monkeypatch):
    monkeypatch.setattr(products, "compute_dtype", lambda t: t.dtype)
    x, variance, alive = batches()[0], torch.tensor(0.7), torch.zeros(N, dtype=torch.bool)
    ours, twin = delta_crosscoder(), delta_crosscoder()
    step = training.forward(ours, x.flatten(1), variance, alive, CONFIG, 0.0)
    step.loss.backward()
    f = twin.pre_acts(x).relu() * (twin.encode(x) > 0)
    base, chat = (x[:, m] - f @ twin.decoders[m] - twin.biases[m] for m in (0, 1))
    written = [f[:, :5] @ rows[:5] + bias for rows, bias in zip(twin.decoders, twin.biases, strict=True)]
    apart = x[:, 1] - x[:, 0] - (written[1] - written[0])
    lengths = (base.norm(dim=1) + chat.norm(dim=1)).mean() / 2
    loss = lengths / (variance / 2).sqrt() + 3.0 * apart.square().sum(1).mean() / variance
    loss.backward()
    torch.testing.assert_close(step.loss, loss)
    torch.testing.assert_close(step.l0, torch.tensor(3.0))
    for (name, a), b in zip(ours.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_delta_latents_learn_what_only_chat_has():
    random = torch.Generator().manual_seed(7)
    directions = F.normalize(torch.randn(10, 16, generator=random), dim=1)
    codes = (torch.rand(64 * 400, 10, generator=random) < 0.15) * (0.5 + torch.rand(64 * 400, 10, generator=random))
    x = torch.stack([codes[:, :8] @ directions[:8], codes @ directions], 1)
    crosscoder = DeltaCrosscoder(16, 24, BatchTopK(2), delta=4, k_delta=1, weight=5.0)
    train(crosscoder, x.split(64), TrainConfig(len(x), lr=1e-2))
    base, chat = crosscoder.decoders.detach()
    best = (F.normalize(chat - base, dim=1) @ directions[8:].T).abs()
    assert best[:4].amax(0).min() > 0.9
    on = (crosscoder.encode(x[:4096]) > 0).float()
    assert on[:, 4:].sum(1).mean().item() == pytest.approx(2, rel=0.1)
    assert 0.2 < on[:, :4].sum(1).mean() < 1  # of the two, 0.3 are on, so one place is more than enough


def test_a_delta_cell_counts_the_places_of_all_latents():
    cell = DeltaCell("BatchTopK", N, 3, delta=4, k_delta=1, weight=2)
    crosscoder = cell.build(D)
    assert (crosscoder.activation.k, crosscoder.activation_delta.k, crosscoder.delta) == (2, 1, 4)
    assert cell.switches() != dataclasses.replace(cell, weight=1.0).switches()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"delta": 0}, "needs as many latents as places"),
        ({"delta": N - 1}, "needs as many latents as places"),
        ({"k_delta": 6}, "needs as many latents as places"),
        ({"k_delta": 0}, "k = 0 keeps nothing"),
        ({"weight": -1.0}, "give BatchTopK, and 0 or more"),
        ({"weight": float("nan")}, "give BatchTopK, and 0 or more"),
        ({"activation": ReLU()}, "ReLU at a weight of 1.0: give BatchTopK"),
    ],
)
def test_delta_latents_that_cannot_be_are_refused(wrong, message):
    given = {"activation": BatchTopK(2), "delta": 4, "k_delta": 1, "weight": 1.0} | wrong
    with pytest.raises(ValueError, match=message):
        DeltaCrosscoder(D, N, **given)
