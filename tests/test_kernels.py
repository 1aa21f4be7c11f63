"""Each fast piece of kernels.py beside its slow twin, forward and backward, over random shapes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from helpers import kernels


@st.composite
def scores(draw):
    """(batch, n) scores with ties, negative rows and n that is or is not a multiple of the group; and k in 1..n."""
    batch, n = draw(st.integers(1, 5)), draw(st.sampled_from([1, 7, 16, 48, 64, 100, 160, 320]))
    k = draw(st.integers(1, n) | st.integers(1, min(n, 4)) | st.just(n))
    seed = draw(st.integers(0, 2**16))
    x = torch.randn(batch, n, generator=torch.Generator().manual_seed(seed))
    kind = draw(st.sampled_from(["plain", "ties", "negative", "constant"]))
    return {"plain": x, "ties": x.round(), "negative": -x.abs(), "constant": torch.zeros_like(x)}[kind], k


def test_topk_by_hand():
    x = torch.zeros(1, 48)
    x[0, [3, 19, 40]] = torch.tensor([5.0, 4.0, 7.0])  # 3 and 19 share a group of the first stage
    values, indices = kernels.topk(x, 1)
    assert values.tolist() == [[7.0]] and indices.tolist() == [[40]]


@given(scores())
def test_topk_finds_the_k_largest(case):
    x, k = case
    values, indices = kernels.topk(x, k)
    assert torch.equal(values.sort(descending=True).values, x.sort(descending=True).values[:, :k])
    assert torch.equal(x.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())


@given(scores())
def test_batch_threshold_keeps_k_per_token_on_average(case):
    x, k = case
    threshold = kernels.batch_topk_threshold(x, k)
    wanted = x.flatten().sort(descending=True).values[k * len(x) - 1]
    assert threshold == wanted.clamp(min=torch.finfo(x.dtype).tiny)


def test_batch_threshold_when_one_token_takes_nearly_all():
    x = torch.rand(8, 64) / 100
    x[0] += 1  # 64 of the 16 * 8 largest: more than the 4 k a row may hold in the fast pass
    k = 8
    assert kernels.batch_topk_threshold(x, k) == x.flatten().sort(descending=True).values[k * 8 - 1]


def dense_twin(x, W_enc, b_enc, b_dec, W_dec, k):
    """The same autoencoder with dense codes and autograd only."""
    pre_acts = F.linear(x - b_dec, W_enc, b_enc)
    kept = torch.zeros_like(pre_acts).scatter(1, pre_acts.topk(k).indices, 1.0)
    return (pre_acts.relu() * kept) @ W_dec + b_dec


@given(
    st.integers(1, 6), st.integers(1, 9), st.sampled_from([1, 5, 16, 64, 112]), st.integers(1, 112), st.integers(0, 99)
)
def test_sparse_step_equals_dense_autograd(batch, d, n, k, seed):
    k = min(k, n)
    random = torch.Generator().manual_seed(seed)
    weights = [torch.randn(*s, generator=random, dtype=torch.float64) for s in [(n, d), (n,), (d,), (n, d)]]
    x = torch.randn(batch, d, generator=random, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "compute_dtype", lambda t: t.dtype)
        ours, twin = ([w.clone().float().requires_grad_() for w in weights] for _ in range(2))
        values, indices, pairs = kernels.encode_topk(x.float(), *ours[:3], k)
        x_hat = kernels.decode_sparse(values, indices, pairs, ours[3]) + ours[2]
        expected = dense_twin(x.float(), *twin, k)
        torch.testing.assert_close(x_hat, expected, rtol=1e-4, atol=1e-4)
        (x_hat - x.float()).square().sum().backward()
        (expected - x.float()).square().sum().backward()
        for a, b in zip(ours, twin, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)


def test_transposed_sums_by_hand():
    pairs = kernels.Transposed(torch.tensor([[0, 2], [2, 3]]), n_latents=4)
    values, rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[10.0], [100.0]])
    assert pairs.sum(values, rows).tolist() == [[10.0], [0.0], [2 * 10.0 + 3 * 100.0], [400.0]]


def test_bf16_products_are_used_only_where_they_are_fast(monkeypatch):
    monkeypatch.setattr(kernels, "has_fast_bf16", lambda device: False)
    assert kernels.compute_dtype(torch.zeros(1)) == torch.float32
    with kernels.fast_products(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    monkeypatch.setattr(kernels, "has_fast_bf16", lambda device: True)
    assert kernels.compute_dtype(torch.zeros(1)) == torch.bfloat16
