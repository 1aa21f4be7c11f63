"""Real steps can be timed, what is compared runs in turn, and the works are what they say they are."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from helpers.dictionaries import kernels
from helpers.dictionaries import speed as timings
from helpers.dictionaries.dead_latents import AuxK


def test_a_machine_is_measured():
    machine = timings.measure(seconds=0.02, d_model=8, n_latents=64, k=2, batch=16)
    assert all(math.isfinite(rate) and rate > 0 for rate in dataclasses.astuple(machine))


def test_steps_are_timed():
    assert 0 < timings.time_step(8, 32, 2, 16, repeats=2) < math.inf


def test_latents_count_as_dead_at_every_step(monkeypatch):
    dead, loss = [], AuxK.loss
    monkeypatch.setattr(AuxK, "loss", lambda self, *a: (dead.append(a[3].float().mean().item()), loss(self, *a))[1])
    timings.time_step(8, 32, 2, 16, repeats=3, dead_share=0.25)
    assert dead == [0.25] * 5  # two to warm up


@pytest.mark.parametrize(
    "ratios",
    [
        lambda: timings.remedy_against_none(8, 32, 2, 16, 3, dead_share=0.5),
        lambda: timings.dense_against_sparse(8, 32, 2, 16, 3),
        lambda: timings.encoder_share(8, 32, 2, 16, 3),
    ],
)
def test_ratios_come_one_per_repeat(ratios):
    got = ratios()
    assert got.shape == (3,)
    assert (np.isfinite(got) & (got > 0)).all()


def test_ratios_are_of_works_done_in_turn(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(timings.time, "perf_counter", lambda: next(clock))
    done = []
    slow = lambda: (done.append("slow"), next(clock), next(clock))  # noqa: E731
    assert timings._interleaved([slow, lambda: done.append("fast")], 4).tolist() == [[3, 1]] * 4
    assert done == ["slow", "fast"] * 6


def test_the_dense_decoder_does_what_the_sparse_one_does():
    training, x = timings._training(8, 32, 4, 16)
    code, W_dec = timings._code(training, x), training.sae.W_dec
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timings.torch, "mm", lambda a, b, out: seen.append(a.float() @ b.float()))
        timings._dense_decoder(code, W_dec, x)()
    weight = W_dec.detach().requires_grad_()
    x_hat = kernels.decode_sparse(code, weight)
    by_value, by_row = torch.autograd.grad(x_hat, (code.values, weight), x)
    near = {"rtol": 0.02, "atol": 0.02}  # bf16
    torch.testing.assert_close(seen[0], x_hat.detach(), **near)
    torch.testing.assert_close(seen[1][code.tokens, code.latents], by_value, **near)
    torch.testing.assert_close(seen[2], by_row, **near)
