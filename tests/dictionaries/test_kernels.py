"""Each fast piece of kernels.py beside its slow twin, forward and backward, over random shapes."""

import concurrent.futures
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from helpers.base import products
from helpers.dictionaries import kernels


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
    x[0, [3, 19, 40]] = torch.tensor([5.0, 4.0, 7.0])  # 3, 15, 27 and 39 share a group of the first stage
    values, indices = kernels.topk(x, 1)
    assert values.tolist() == [[7.0]] and indices.tolist() == [[40]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@given(scores())
def test_topk_finds_the_k_largest_above_zero(dtype, case):
    x, k = case[0].to(dtype), case[1]
    values, indices = kernels.topk(x, k)
    assert torch.equal(values.sort(descending=True).values, x.relu().sort(descending=True).values[:, :k])
    assert torch.equal(x.gather(1, indices).relu(), values)
    assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
@given(scores())
def test_vectorised_selection_equals_torch(dtype, case):
    x, k = (1000 * case[0]).to(dtype), case[1]
    values, indices = kernels._select(x, k)
    assert torch.equal(values.sort(descending=True).values, x.topk(k).values)
    assert torch.equal(x.gather(1, indices), values)


def test_more_columns_than_sixteen_bits_can_count():
    x = torch.zeros(1, 70_001, dtype=torch.bfloat16)
    x[0, [5, 65_541, 70_000]] = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    values, indices = kernels.topk(x, 3)
    assert dict(zip(indices[0].tolist(), values[0].tolist(), strict=True)) == {5: 1.0, 65_541: 2.0, 70_000: 3.0}


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


def dense_twin(x, W_enc, b_enc, b_dec, W_dec, k, of_batch):
    """The same autoencoder with dense codes and autograd only."""
    pre_acts = F.linear(x - b_dec, W_enc, b_enc)
    least = pre_acts.flatten().topk(k * len(x)).values[-1] if of_batch else pre_acts.topk(k).values[:, -1:]
    return (pre_acts.relu() * (pre_acts >= least)) @ W_dec + b_dec


@pytest.mark.parametrize("of_batch", [False, True])
@given(
    st.integers(1, 6), st.integers(1, 9), st.sampled_from([1, 5, 16, 64, 112]), st.integers(1, 112), st.integers(0, 99)
)
def test_sparse_step_equals_dense_autograd(of_batch, batch, d, n, k, seed):
    k = min(k, n)
    random = torch.Generator().manual_seed(seed)
    weights = [torch.randn(*s, generator=random) for s in [(n, d), (n,), (d,), (n, d)]]
    x = torch.randn(batch, d, generator=random)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "compute_dtype", lambda t: t.dtype)
        patch.setitem(kernels.BLOCK, "cpu", 4)  # several blocks of tokens
        ours, twin = ([w.clone().requires_grad_() for w in weights] for _ in range(2))
        code = (kernels.encode_batch_topk if of_batch else kernels.encode_topk)(x, *ours[:3], k)
        x_hat = kernels.decode_sparse(code, ours[3]) + ours[2]
        expected = dense_twin(x, *twin, k, of_batch)
        torch.testing.assert_close(x_hat, expected, rtol=1e-4, atol=1e-4)
        (x_hat - x).square().sum().backward()
        (expected - x).square().sum().backward()
        for a, b in zip(ours, twin, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)


def pairs_of(code):
    return list(zip(code.tokens.tolist(), code.latents.tolist(), code.values.tolist(), strict=True))


def test_above_a_window_by_hand():
    x, identity, zeros = (
        torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.0, 0.0], [0.5, 3.0, 2.0]]),
        torch.eye(3),
        torch.zeros(3),
    )
    code, near = kernels.encode_above(x, identity, zeros, zeros)
    assert pairs_of(code) == [(0, 0, 1.0), (2, 0, 0.5), (2, 1, 3.0), (2, 2, 2.0)] and near is None
    assert code.starts.tolist() == [0, 1, 1]
    window = torch.tensor([0.25, -2.0, 1.0]), torch.tensor([0.5, 1.0, 2.0])
    code, near = kernels.encode_above(x, identity, zeros, zeros, window)
    assert pairs_of(code) == [(0, 0, 1.0), (2, 1, 3.0)] and code.starts.tolist() == [0, 1, 1]
    assert pairs_of(near) == [(1, 1, 0.0), (2, 0, 0.5), (2, 2, 2.0)] and near.starts.tolist() == [0, 0, 1]


def test_a_batch_that_is_not_sparse_is_left_alone(monkeypatch):
    monkeypatch.setattr(kernels, "SAMPLE", 2)
    x = torch.tensor([[1.0, -1.0], [-1.0, -1.0], [1.0, 1.0], [1.0, 1.0]])  # the first two tokens decide: a quarter
    weights = torch.eye(2), torch.zeros(2), torch.zeros(2)
    assert kernels.encode_above(x, *weights, most=0.24) is None
    assert len(kernels.encode_above(x, *weights, most=0.25)[0].values) == 5


@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([1, 5, 64, 112]),
    st.sampled_from(["plain", "ties", "all off", "all on", "empty rows"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_what_is_above_a_threshold_equals_dense_autograd(batch, d, n, kind, windowed, seed):
    random = torch.Generator().manual_seed(seed)
    weights = [torch.randn(*s, generator=random) for s in [(n, d), (n,), (d,), (n, d)]]
    x, threshold = torch.randn(batch, d, generator=random), torch.randn(n, generator=random).abs() * windowed
    if kind == "ties":  # many pre-activations are exactly at the threshold
        x, threshold, weights = x.round(), threshold.round(), [w.round() for w in weights]
    weights[1] += {"all off": -100.0, "all on": 100.0}.get(kind, 0.0)
    if kind == "empty rows":
        x[::2], weights[1] = weights[2], -weights[1].abs() - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "compute_dtype", lambda t: t.dtype)
        patch.setitem(kernels.BLOCK, "cpu", 4)  # several blocks of tokens
        patch.setattr(kernels, "SAMPLE", 2)
        ours, twin = ([w.clone().requires_grad_() for w in weights] for _ in range(2))
        code, near = kernels.encode_above(x, *ours[:3], (threshold - 1, threshold) if windowed else None)
        x_hat = kernels.decode_sparse(code, ours[3])
        pre_acts = F.linear(x - twin[2], *twin[:2])
        expected = (pre_acts * (pre_acts > threshold)) @ twin[3]
        assert len(code.values) == (pre_acts > threshold).sum()
        if windowed:
            assert len(near.values) == ((pre_acts > threshold - 1) & (pre_acts <= threshold)).sum()
        assert_close(x_hat, expected)
        x_hat.square().sum().backward()
        expected.square().sum().backward()
    for a, b in zip(ours, twin, strict=True):
        assert_close(a.grad, b.grad)


def assert_close(a, b):
    """Within 1e-5 of the largest entry: of what is summed, that is, since sums may cancel."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


@given(st.integers(0, 99), st.integers(1, 6), st.integers(1, 40))
def test_a_code_among_some_latents_is_that_of_a_smaller_autoencoder(seed, k, m):
    random = torch.Generator().manual_seed(seed)
    W_enc, W_dec = torch.randn(2, 40, 6, generator=random).unbind()
    b_enc, b_dec, x = (torch.randn(size, generator=random) for size in (40, 6, (5, 6)))
    some = torch.randperm(40, generator=random)[:m].sort().values
    k = min(k, m)
    whole = [w.clone().requires_grad_() for w in (W_enc, b_enc, b_dec, W_dec)]
    part = [w.clone().requires_grad_() for w in (W_enc[some], b_enc[some], b_dec, W_dec[some])]
    for (*encoder, decoder), among in ((whole, some), (part, None)):
        kernels.decode_sparse(kernels.encode_topk(x, *encoder, k, among=among), decoder).square().sum().backward()
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a.grad[some] if len(a) == 40 else a.grad, b.grad, rtol=1e-4, atol=1e-3)
    assert (whole[3].grad[[i for i in range(40) if i not in some]] == 0).all()


def a_code(latents, values, k, n_latents):
    tokens = torch.arange(len(latents) // k, dtype=torch.int32)
    latents = torch.tensor(latents, dtype=torch.int32)
    return kernels.Code(torch.tensor(values), latents, tokens.repeat_interleave(k), k * tokens, n_latents)


def test_sums_over_the_tokens_of_a_latent_by_hand():
    code = a_code([0, 2, 2, 3], [1.0, 2.0, 3.0, 4.0], k=2, n_latents=4)
    rows = torch.tensor([[10.0], [100.0]])
    assert code.sums(code.values, rows).tolist() == [[10.0], [0.0], [2 * 10.0 + 3 * 100.0], [400.0]]
    assert code.sums(code.values, rows, first=1, last=3).tolist() == [[0.0], [320.0]]


def test_dots_of_the_pairs_by_hand():
    code = a_code([0, 2, 2, 1], [1.0, 2.0, 3.0, 4.0], k=2, n_latents=3)
    rows, weight = torch.tensor([[1.0, 0.0], [2.0, 1.0]]), torch.tensor([[5.0, 9.0], [7.0, 7.0], [3.0, 4.0]])
    assert code.dots(rows, weight).tolist() == [5.0, 3.0, 10.0, 21.0]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.floats(0, 1), st.integers(0, 99))
def test_pairs_of_any_code_equal_the_dense_product(batch, d, n, share, seed):
    random = torch.Generator().manual_seed(seed)
    rows, weight = torch.randn(batch, d, generator=random), torch.randn(n, d, generator=random)
    dense = torch.rand(batch, n, generator=random) * (torch.rand(batch, n, generator=random) < share)
    code = kernels.code_of(dense)  # tokens and latents without a pair included
    torch.testing.assert_close(code.dots(rows, weight), (rows @ weight.T)[dense > 0], rtol=1e-5, atol=1e-5)
    middle = n // 2
    for first, last in ((0, n), (0, middle), (middle, n)):
        torch.testing.assert_close(code.sums(code.values, rows, first, last), (dense.T @ rows)[first:last])


def test_fired_by_hand():
    code = a_code([0, 2, 2, 3], [1.0, 0.0, 3.0, 0.0], k=2, n_latents=5)
    assert code.fired().tolist() == [True, False, True, False, False]


def test_largest_of_each_token_by_hand():
    code = a_code([4, 1, 3, 0, 2, 4], [1.0, 5.0, 2.0, 9.0, 0.0, 3.0], k=3, n_latents=5)
    code.values.requires_grad_()
    two = code.largest(2)
    pairs = [set(zip(two.latents[i : i + 2].tolist(), two.values[i : i + 2].tolist(), strict=True)) for i in (0, 2)]
    assert pairs == [{(1, 5.0), (3, 2.0)}, {(0, 9.0), (4, 3.0)}]
    assert two.tokens.tolist() == [0, 0, 1, 1] and two.starts.tolist() == [0, 2] and two.n_latents == 5
    two.values.sum().backward()
    assert code.values.grad.tolist() == [0, 1, 1, 1, 0, 1]


def test_gradients_stay_unsummed_where_that_is_asked_for():
    W_enc, W_dec = (torch.nn.Parameter(torch.randn(8, 3)) for _ in range(2))
    biases, x = (torch.zeros(8), torch.zeros(3)), torch.randn(4, 3)
    kernels.decode_sparse(kernels.encode_topk(x, W_enc, *biases, 2), W_dec).sum().backward()
    expected = W_enc.grad, W_dec.grad
    W_enc.grad = W_dec.grad = None
    with kernels.unsummed(W_enc, W_dec) as unsummed:
        kernels.decode_sparse(kernels.encode_topk(x, W_enc, *biases, 2), W_dec).sum().backward()
    assert W_enc.grad is None and W_dec.grad is None
    for weight, gradient in zip((W_enc, W_dec), expected, strict=True):
        [(code, values, rows)] = unsummed[weight]
        torch.testing.assert_close(code.sums(values, rows), gradient)
    kernels.decode_sparse(kernels.encode_topk(x, W_enc, *biases, 2), W_dec).sum().backward()
    torch.testing.assert_close(W_dec.grad, expected[1])  # outside it is as before


def test_bf16_products_are_used_only_where_they_are_fast(monkeypatch):
    monkeypatch.setattr(products, "has_fast_bf16", lambda device: False)
    assert products.compute_dtype(torch.zeros(1)) == torch.float32
    with products.fast_products(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    monkeypatch.setattr(products, "has_fast_bf16", lambda device: True)
    assert products.compute_dtype(torch.zeros(1)) == torch.bfloat16


def test_buffers_are_used_again_and_grow(monkeypatch):
    monkeypatch.setattr(kernels, "_buffers", {})
    kind = (torch.float32, torch.device("cpu"))
    first = kernels._scratch("weights", (4, 6), *kind)
    assert first.shape == (4, 6) and kernels._scratch("weights", (3, 2), *kind).data_ptr() == first.data_ptr()
    assert kernels._scratch("pre_acts", (4, 6), *kind).data_ptr() != first.data_ptr()
    assert kernels._scratch("weights", (5, 6), *kind).shape == (5, 6)


def test_threads_do_not_share_buffers():
    def address():
        return kernels._scratch("weights", (4, 6), torch.float32, torch.device("cpu")).data_ptr()

    with concurrent.futures.ThreadPoolExecutor(1) as other:
        assert other.submit(address).result() != address()


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("encode", ["topk", "batch_topk", "above"])
def test_a_code_is_freed_when_nobody_needs_it(encode, backward):
    """Not by the collector, which does not see through autograd: a cycle there is never freed."""
    x, W = torch.randn(6, 4), torch.nn.Parameter(torch.randn(16, 4))
    weights = x, W, torch.zeros(16), torch.zeros(4)
    made = kernels.encode_above(*weights)[0] if encode == "above" else getattr(kernels, f"encode_{encode}")(*weights, 2)
    freed = [weakref.ref(made), weakref.ref(made.values), weakref.ref(made.latents)]
    loss = kernels.decode_sparse(made, W).square().sum()
    if backward:
        loss.backward()
    del made, loss
    assert [ref() for ref in freed] == [None] * 3
