"""NMSE, L0 and dead latents by hand; refinement against scipy's non-negative least squares."""

import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.dictionaries.autoencoders import ReLU, SparseAutoencoder, TopK
from helpers.dictionaries.quality import at_matched_l0, evaluate, nmse, refine


def random_sae(activation, d=6, n=20, seed=0):
    torch.manual_seed(seed)
    sae = SparseAutoencoder(d, n, activation)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.2), sae.b_dec.normal_(std=0.2)
    return sae


def test_the_mean_scores_one_and_perfection_zero():
    x = torch.randn(100, 5) + 7
    assert nmse(x, x.mean(0).expand_as(x)) == pytest.approx(1, abs=1e-6)
    assert nmse(x, x) == 0


def test_nmse_by_hand():
    x = torch.tensor([[0.0], [2.0]])
    assert nmse(x, torch.tensor([[1.0], [2.0]])) == pytest.approx(0.5)  # 1 over (1 + 1)
    assert nmse(x, torch.zeros(2, 1), mean=torch.zeros(1)) == pytest.approx(1.0)


def test_evaluate_against_a_full_code_in_any_batch_size():
    sae, x = random_sae(ReLU()), torch.randn(50, 6)
    latents = sae.encode(x)
    for batch in (7, 50, 4096):
        quality = evaluate(sae, x, batch)
        assert quality.nmse == pytest.approx(nmse(x, sae(x)), rel=1e-5)
        assert quality.l0 == pytest.approx((latents > 0).sum(1).float().mean().item())
        assert quality.l0_sd == pytest.approx((latents > 0).sum(1).float().std().item(), rel=1e-5)
        torch.testing.assert_close(quality.density, (latents > 0).float().mean(0))


def test_dead_share_by_hand():
    sae = SparseAutoencoder(2, 4, ReLU())
    with torch.no_grad():
        sae.b_enc.copy_(torch.tensor([-100.0, 100.0, 100.0, -100.0]))
    assert evaluate(sae, torch.randn(30, 2)).dead == 0.5


def test_matched_l0_by_hand():
    assert at_matched_l0([10, 40], [0.4, 0.1], 20) == pytest.approx(0.2)  # a straight line in log-log
    assert at_matched_l0([40, 10], [0.1, 0.4], 10) == pytest.approx(0.4)
    for outside in (9.9, 41):
        with pytest.raises(ValueError, match="outside the measured range"):
            at_matched_l0([10, 40], [0.4, 0.1], outside)


@given(st.lists(st.floats(1, 100), min_size=2, max_size=6, unique=True), st.floats(-2, -0.1))
def test_matched_l0_is_exact_on_a_power_law(l0, slope):
    wanted = sum(l0) / len(l0)
    assert at_matched_l0(l0, [v**slope for v in l0], wanted) == pytest.approx(wanted**slope, rel=1e-6)


@pytest.mark.parametrize("activation", [ReLU(), TopK(4)], ids=["ReLU", "TopK"])
def test_refinement_is_non_negative_least_squares_on_the_support(activation):
    sae, x = random_sae(activation), torch.randn(25, 6)
    refined = refine(sae, x, n_iterations=3000)
    assert ((refined.after > 0) <= (refined.before > 0)).all()
    for before, after, row in zip(refined.before, refined.after, x, strict=True):
        on = before > 0
        if on.any():
            A, b = sae.W_dec[on].T.detach().double().numpy(), (row - sae.b_dec).detach().double().numpy()
            best = scipy.optimize.nnls(A, b)[1]
            assert torch.linalg.norm(row - sae.decode(after)).item() == pytest.approx(best, abs=1e-3)


@given(st.integers(0, 200), st.integers(1, 30))
def test_refinement_never_increases_the_error(seed, n_iterations):
    sae = random_sae(ReLU(), seed=seed)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
    before, after = (sae.decode(z) for z in refine(sae, x, n_iterations))
    assert ((x - after).norm(dim=1) <= (x - before).norm(dim=1) + 1e-4).all()


def test_shift_sees_shrinkage():
    """A code whose values are a tenth too small grows by a ninth; a token with nothing on does not count."""
    sae = SparseAutoencoder(4, 4, ReLU())
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(4)), sae.W_enc.copy_(0.9 * torch.eye(4))
    x = torch.cat([torch.rand(10, 4) + 0.5, -torch.ones(3, 4)])
    shift = refine(sae, x).shift()
    torch.testing.assert_close(shift, torch.full((10,), 1 / 9), atol=1e-4, rtol=0)
