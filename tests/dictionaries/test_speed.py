"""Real steps can be timed, what is compared runs in turn, and the works are what they say they are."""

import math

import numpy as np
import pytest
import torch

from helpers.dictionaries import kernels
from helpers.dictionaries import speed as timings
from helpers.dictionaries.dead_latents import AuxK


def test_sparse_products_are_two_of_the_dense_ten():
    d, n, k, tokens = 3, 16, 2, 5
    encoder, sparse = 2 * 3 * 16 * 5, 4 * (2 * 3 * 2 * 5)  # a dense product, and four over the pairs alone
    assert timings.training_flops(d, n, k, tokens) == encoder + sparse == 720
    assert timings.training_flops(d, np.array([16, 32]), np.array([2, 2]), np.array([5, 5])).tolist() == [720, 1200]


def test_auxk_pays_for_the_dead_latents_and_for_its_own_code():
    step, product = 2 * 16 + 8 * 2, 2 * 4
    assert timings.auxk_flops(6, 16, 2, 4) == (product + 8 * 3) / step  # d / 2 of the four dead
    assert timings.auxk_flops(6, 16, 2, 4, AuxK(k=9)) == (product + 8 * 4) / step  # no more than are dead
    assert timings.auxk_flops(6, 16, 2, 4, AuxK(share=0.5)) == timings.auxk_flops(6, 16, 2, 4) / 2
    assert timings.auxk_flops(6, 16, 2, 0) == 0


def test_trainings_take_their_steps_one_after_another(monkeypatch):
    monkeypatch.setattr(timings, "time_step", lambda d, n, k, batch, repeats: n / 100)
    seconds = timings.time_trainings(8, [(16, 2, 1_000), (32, 2, 1_001)], batch=500)
    assert seconds == pytest.approx(2 * 0.16 + 3 * 0.32)  # a last short batch is a step, too


def test_steps_are_timed():
    assert 0 < timings.time_step(8, 32, 2, 16, repeats=2) < math.inf


def test_latents_count_as_dead_at_every_step(monkeypatch):
    dead, loss = [], AuxK.loss
    monkeypatch.setattr(AuxK, "loss", lambda self, *a: (dead.append(a[3].float().mean().item()), loss(self, *a))[1])
    timings.remedy_against_none(8, 32, 2, 16, repeats=3, dead_share=0.25)
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


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: timings.time_step(8, 16, 17, 4, 1), "k at most n_latents, .*n=16, k=17"),
        (lambda: timings.time_step(0, 16, 2, 4, 1), "sizes must be at least 1 .*d=0"),
        (lambda: timings.time_step(8, 16, 2, -1, 1), "with -1 tokens"),
        (lambda: timings.time_step(8, 16, 2, 4, 0), "repeats = 0"),
        (lambda: timings.remedy_against_none(8, 16, 2, 4, 1, dead_share=1.5), "dead_share .* not 1.5"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
