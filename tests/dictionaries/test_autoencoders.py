"""Architectures: what each activation keeps, what it costs, and how an autoencoder starts."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from helpers.base import products
from helpers.dictionaries import kernels
from helpers.dictionaries.autoencoders import (
    BatchTopK,
    Gated,
    JumpReLU,
    ReLU,
    SparseAutoencoder,
    TopK,
    geometric_median,
)

PRE_ACTS = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [-1.0, 0.5, -3.0, 0.1, -5.0, -6.0]])


def test_topk_keeps_the_k_largest_of_each_token_and_never_a_negative():
    kept = TopK(3)(PRE_ACTS)
    assert kept.tolist() == [[0, 0, 0, 4, 5, 6], [0, 0.5, 0, pytest.approx(0.1), 0, 0]]


def test_batchtopk_shares_k_over_the_batch():
    kept = BatchTopK(3).train()(PRE_ACTS)
    assert kept.tolist() == [[1, 2, 3, 4, 5, 6], [0] * 6]


@given(st.integers(1, 9), st.integers(4, 80), st.integers(1, 4), st.integers(0, 99))
def test_batchtopk_has_k_times_batch_survivors(batch, n, k, seed):
    pre_acts = torch.rand(batch, n, generator=torch.Generator().manual_seed(seed)) + 0.1
    assert (BatchTopK(k).train()(pre_acts) > 0).sum() == k * batch


def test_batchtopk_outside_training_encodes_every_row_alone_as_in_the_batch():
    torch.manual_seed(0)
    pre_acts, activation = torch.randn(64, 32), BatchTopK(4)
    activation.calibrate([pre_acts])
    activation.eval()
    together = activation(pre_acts)
    assert (together > 0).sum() == 4 * 64
    for i in range(len(pre_acts)):
        assert torch.equal(activation(pre_acts[i : i + 1])[0], together[i])


def test_batchtopk_threshold_is_saved_and_asked_for():
    trained, fresh = BatchTopK(2), BatchTopK(2)
    with pytest.raises(RuntimeError, match="no threshold yet"):
        fresh.eval()(PRE_ACTS)
    trained.calibrate([PRE_ACTS])
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh.eval()(PRE_ACTS), trained.eval()(PRE_ACTS))


def test_batchtopk_threshold_is_the_mean_over_batches():
    activation = BatchTopK(1)
    activation.calibrate([torch.tensor([[1.0, 3.0]]), torch.tensor([[5.0, 2.0]])])
    assert activation.threshold == 4.0


def test_gated_separates_whether_from_how_much():
    gated = Gated(2)
    with torch.no_grad():
        gated.log_scale.copy_(torch.tensor([0.0, 1.0]))
        gated.bias.copy_(torch.tensor([0.5, -9.0]))
    kept = gated(torch.tensor([[2.0, 1.0], [-0.1, 2.0]]))
    torch.testing.assert_close(kept, torch.tensor([[2.5, 0.0], [0.0, 0.0]]))
    assert gated.price(torch.tensor([[2.0, -1.0]]), kept[:1]).tolist() == [2.0]


def test_jumprelu_jumps_and_its_threshold_learns_from_the_window_only():
    jump = JumpReLU(1, threshold=2.0, bandwidth=0.5)
    a = torch.tensor([[0.5], [1.9], [2.1], [2.4], [4.0]], requires_grad=True)  # two lie within 2 +- 0.25
    kept = jump(a)
    assert kept.flatten().tolist() == pytest.approx([0, 0, 2.1, 2.4, 4.0])
    kept.sum().backward()
    assert a.grad.flatten().tolist() == [0, 0, 1, 1, 1]
    # d/d log theta = theta * d/d theta, and d/d theta is -theta / bandwidth for each entry in the window
    assert jump.log_threshold.grad.item() == pytest.approx(2 * 2 * -2 / 0.5)


def test_the_price_of_jumprelu_counts_and_moves_the_threshold_alone():
    jump = JumpReLU(1, threshold=2.0, bandwidth=0.5)
    a = torch.tensor([[0.5], [1.9], [2.1], [2.4], [4.0]], requires_grad=True)
    price = jump.price(a, jump(a))
    assert price.tolist() == [0, 0, 1, 1, 1]
    price.sum().backward()
    assert a.grad is None
    assert jump.log_threshold.grad.item() == pytest.approx(2 * 2 * -1 / 0.5)


def test_l1_price_is_the_sum_of_latents():
    latents = ReLU()(PRE_ACTS)
    assert ReLU().price(PRE_ACTS, latents).tolist() == pytest.approx([21.0, 0.6])


@pytest.mark.parametrize("activation", [ReLU(), TopK(2), BatchTopK(2), Gated(6), JumpReLU(6)], ids=repr)
def test_forward_is_the_equation(activation):
    torch.manual_seed(1)
    sae = SparseAutoencoder(4, 6, activation).train()
    with torch.no_grad():
        sae.b_dec.normal_(), sae.b_enc.normal_()
    x = torch.randn(5, 4)
    pre_acts = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    torch.testing.assert_close(sae(x), activation(pre_acts) @ sae.W_dec + sae.b_dec)
    assert type(activation) in (Gated, JumpReLU) or not list(activation.parameters())


def test_starts_with_parallel_unit_rows_and_reconstructions_as_long_as_inputs():
    torch.manual_seed(0)
    x = torch.randn(512, 16) + 3
    sae = SparseAutoencoder(16, 64, TopK(4))
    sae.start_from(x)
    torch.testing.assert_close(sae.b_dec.detach(), geometric_median(x))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    torch.testing.assert_close(F.cosine_similarity(sae.W_enc, sae.W_dec), torch.ones(64))
    got, wanted = (sae(x) - sae.b_dec).norm(dim=1).mean(), (x - sae.b_dec).norm(dim=1).mean()
    assert got.item() == pytest.approx(wanted.item(), rel=1e-4)
    untied = SparseAutoencoder(16, 64, TopK(4), tied_init=False)
    assert F.cosine_similarity(untied.W_enc, untied.W_dec).abs().mean() < 0.5


def test_same_seed_same_start_other_seed_other_start():
    a, b, c = (SparseAutoencoder(8, 16, ReLU(), seed=s) for s in (0, 0, 1))
    assert torch.equal(a.W_dec, b.W_dec) and not torch.equal(a.W_dec, c.W_dec)


def test_geometric_median_is_the_middle_one_on_a_line_and_ignores_an_outlier():
    line = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1000.0, 0.0]])
    torch.testing.assert_close(geometric_median(line, 2000), torch.tensor([1.0, 0.0]), atol=1e-2, rtol=0)


def test_geometric_median_beats_every_small_step_away():
    torch.manual_seed(0)
    x = torch.randn(200, 3).exp()
    median = geometric_median(x)

    def distance(point):
        return (x - point).norm(dim=1).sum()

    assert all(distance(median) <= distance(median + 0.01 * torch.randn(3)) for _ in range(50))


@pytest.mark.parametrize("make, sentence", [
    (lambda: SparseAutoencoder(4, 8, TopK(9)), "k = 9 is more than the 8 latents"),
    (lambda: SparseAutoencoder(4, 8, BatchTopK(9)), "k = 9 is more than the 8 latents"),
    (lambda: TopK(0), "k = 0 keeps nothing"),
    (lambda: BatchTopK(-1), "k = -1 keeps nothing"),
])  # fmt: skip
def test_impossible_k_is_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_topk_module_and_training_kernel_agree():
    torch.manual_seed(0)
    sae = SparseAutoencoder(8, 32, TopK(3))
    x = torch.randn(20, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "compute_dtype", lambda t: t.dtype)
        code = kernels.encode_topk(x, sae.W_enc, sae.b_enc, sae.b_dec, 3)
    dense = torch.zeros(20, 32).index_put((code.tokens.long(), code.latents.long()), code.values)
    torch.testing.assert_close(dense, sae.encode(x))


@pytest.mark.parametrize("activation", [ReLU(), TopK(3), BatchTopK(3)])
def test_gradient_reaches_every_weight_outside_training_too(activation):
    torch.manual_seed(0)
    sae, x = SparseAutoencoder(8, 32, activation), torch.randn(20, 8)
    (sae(x) - x).square().sum().backward()
    code = activation(sae.pre_acts(x)).detach()
    gradient = torch.autograd.grad((code @ sae.W_dec + sae.b_dec - x).square().sum(), sae.W_dec)[0]
    torch.testing.assert_close(sae.W_dec.grad, gradient)
    error = 2 * (sae(x) - x).detach() @ sae.W_dec.detach().T * (code > 0)
    torch.testing.assert_close(sae.W_enc.grad, error.T @ (x - sae.b_dec.detach()))
