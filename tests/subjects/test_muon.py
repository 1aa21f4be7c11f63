"""Muon against torch's own, against an SVD, and on matrices of any shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.base import products
from helpers.subjects.muon import Muon, orthogonal

SETTINGS = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.05}


def matrix(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def trained(kind: type[torch.optim.Muon], n_steps: int = 5, **more) -> list[torch.Tensor]:
    """Weights of three shapes after some steps on the same gradients."""
    weights = [torch.nn.Parameter(matrix(*shape)) for shape in ((6, 4), (4, 6), (5, 5))]
    optimizer = kind(weights, **SETTINGS, **more)
    for step in range(n_steps):
        for weight in weights:
            weight.grad = matrix(*weight.shape, seed=step + 1)
        optimizer.step()
    return weights


def test_it_is_torchs_bit_for_bit_where_products_are_in_bf16(monkeypatch):
    monkeypatch.setattr(products, "compute_dtype", lambda x: torch.bfloat16)
    for ours, theirs in zip(trained(Muon), trained(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"), strict=True):
        assert torch.equal(ours, theirs)


def test_it_is_torchs_but_for_rounding_where_they_are_in_fp32(monkeypatch):
    monkeypatch.setattr(products, "compute_dtype", lambda x: x.dtype)
    for ours, theirs in zip(trained(Muon), trained(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"), strict=True):
        start = matrix(*ours.shape)
        assert not torch.equal(ours, theirs)
        assert (ours - theirs).norm() < 0.02 * (ours - start).norm()


def test_a_turn_stays_the_turn_it_is(monkeypatch):
    monkeypatch.setattr(products, "compute_dtype", lambda x: x.dtype)
    quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    found = orthogonal(3 * quarter)
    assert found[1, 0] == pytest.approx(1, abs=0.3)
    assert torch.allclose(found, found[1, 0] * quarter, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 9), n=st.integers(1, 9), seed=st.integers(0, 99))
def test_directions_stay_and_lengths_become_about_one(m, n, seed):
    given_one = matrix(m, n, seed).double()
    u, s, vh = torch.linalg.svd(given_one, full_matrices=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "compute_dtype", lambda x: x.dtype)
        along = u.T @ orthogonal(given_one) @ vh.T
    assert torch.allclose(along, torch.diag(along.diagonal()), atol=1e-6)
    large = s > 0.05 * s.norm()
    assert (along.diagonal()[large] > 0.6).all()
    assert (along.diagonal() < 1.3).all()


def test_of_nothing_it_makes_nothing():
    assert not orthogonal(torch.zeros(3, 2)).any()
