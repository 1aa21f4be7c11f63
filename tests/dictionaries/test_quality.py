"""NMSE, L0 and dead latents by hand; refinement against scipy's non-negative least squares.

Keeping the k' largest against separate passes, thresholds against counting, and codes with a known answer.
"""

import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.dictionaries.autoencoders import Gated, MultiTopK, ReLU, SparseAutoencoder, TopK
from helpers.dictionaries.quality import (
    at_matched_l0,
    evaluate,
    keep_largest,
    nmse,
    recovery,
    refine,
    silent,
    threshold,
)


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


def test_a_rare_latent_is_silent_in_a_short_window_and_a_dead_one_in_each():
    sae = SparseAutoencoder(3, 3, ReLU())
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(3))
    batches = [torch.tensor([[1.0, -1, -1]] * 2), torch.tensor([[-1.0, -1, -1]] * 2), torch.tensor([[1.0, 1, -1]] * 2)]
    assert silent(sae, batches, [1, 2, 5, 6]) == pytest.approx({1: 1, 2: 2 / 3, 5: 2 / 3, 6: 1 / 3})
    with pytest.raises(ValueError, match="a window of 7 tokens in 6: give more batches"):
        silent(sae, batches, [2, 7])


@pytest.mark.parametrize("activation", [TopK(1), MultiTopK(1), ReLU()], ids=lambda each: type(each).__name__)
def test_silence_in_all_of_a_sample_is_its_dead_share(activation):
    sae, x = random_sae(activation), torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    assert silent(sae, x.split(7), [40])[40] == pytest.approx(evaluate(sae, x).dead)


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


def some_sae(activation, d=10, n=30, seed=0):
    random = torch.Generator().manual_seed(seed)
    sae = SparseAutoencoder(d, n, activation, seed)
    with torch.no_grad():
        sae.b_enc.normal_(0, 0.3, generator=random), sae.b_dec.normal_(0, 0.3, generator=random)
    return sae.eval()


def some_x(n=200, d=10, seed=7):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def axes(values):
    """An autoencoder whose latents are the coordinates."""
    sae = SparseAutoencoder(values, values, TopK(1))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(values)), sae.W_dec.copy_(torch.eye(values))
    return sae


def test_both_rules_by_hand():
    x = torch.tensor([[4.0, 3.0, 0.0], [1.0, 2.0, 0.0]])  # the mean is (2.5, 2.5, 0), the variance 5 in all
    found = recovery(axes(3), x, [1, 2, 3]).set_index(["rule", "kept"])
    assert found.loc["TopK"].nmse.tolist() == pytest.approx([(9 + 1) / 5, 0, 0])
    assert found.loc["threshold"].nmse.tolist() == pytest.approx([(1 + 4) / 5, 0, 0])  # keeps 4 and 3
    assert found.l0.groupby("rule").agg(list).to_dict() == {"TopK": [1, 2, 2], "threshold": [1, 2, 2]}


def test_the_rules_are_compared_at_equal_l0():
    x = torch.tensor([[4.0, 3.0, 2.0], [1.0, 0.0, 0.0]])  # the second token has one positive latent
    found = recovery(axes(3), x, [2]).set_index("rule")
    assert found.l0.to_dict() == {"TopK": 1.5, "threshold": 1.5}
    assert found.nmse.to_dict() == pytest.approx({"TopK": 4 / 11, "threshold": 1 / 11})  # the variance is 11


def test_at_the_training_k_it_is_the_autoencoder():
    sae, x = some_sae(TopK(5)), some_x()
    found = recovery(sae, x, [2, 5, 9]).set_index(["rule", "kept"]).loc["TopK", 5]
    quality = evaluate(sae, x)
    assert found.nmse == pytest.approx(quality.nmse, rel=1e-5)
    assert found.l0 == quality.l0


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5, unique=True).map(sorted), st.integers(0, 20))
def test_one_pass_equals_a_pass_for_each(kept, seed):
    sae, x = some_sae(MultiTopK(4), seed=seed), some_x()
    found = list(keep_largest(sae, sae.pre_acts(x).relu(), kept))
    for k, (l0, x_hat) in zip(kept, found, strict=True):
        alone = TopK(k)(sae.pre_acts(x))
        assert l0 == pytest.approx((alone > 0).sum(1).double().mean().item())
        torch.testing.assert_close(x_hat, sae.decode(alone), rtol=1e-4, atol=1e-4)


def test_the_encoder_runs_once(monkeypatch):
    sae, calls = some_sae(TopK(4)), []
    encode = sae.pre_acts
    monkeypatch.setattr(sae, "pre_acts", lambda x: calls.append(len(x)) or encode(x))
    recovery(sae, some_x(), [1, 2, 4, 8])
    assert calls == [200]


def test_the_threshold_keeps_the_largest_of_all_tokens_and_hits_its_l0():
    sae, x = some_sae(ReLU()), some_x()
    found = recovery(sae, x, [1, 3, 8, 30])
    rules = {rule: part.l0.tolist() for rule, part in found.groupby("rule")}
    assert rules["threshold"] == rules["TopK"]
    latents = sae.pre_acts(x).relu()
    cut = latents.flatten().sort(descending=True).values[600]  # 200 tokens, 3 each
    expected = nmse(x, sae.decode(latents * (latents > cut)))
    assert found[(found.rule == "threshold") & (found.kept == 3)].nmse.item() == pytest.approx(expected, rel=1e-5)


def test_keeping_all_is_the_relu_autoencoder_under_both_rules():
    sae, x = some_sae(ReLU()), some_x()
    found = recovery(sae, x, [5, 30])
    assert found[found.kept == 30].nmse.tolist() == pytest.approx([evaluate(sae, x).nmse] * 2, rel=1e-5)


def test_threshold_by_hand():
    largest = torch.tensor([5.0, 4.0, 2.0, 2.0])
    assert [threshold(largest, count) for count in range(5)] == [5, 4, 2, 2, 0]


@given(st.integers(1, 8))
def test_a_planted_code_is_recovered_at_its_own_k(k):
    random = torch.Generator().manual_seed(k)
    on = torch.rand(100, 8, generator=random).argsort(1) < k  # k of 8 coordinates
    x = on * (1 + torch.rand(100, 8, generator=random))
    found = recovery(axes(8), x, list(range(1, 9)))
    errors = found[found.rule == "TopK"].nmse.tolist()
    assert all(a > b for a, b in zip(errors[: k - 1], errors[1:k], strict=True))  # each latent of a true code helps
    assert errors[k - 1 :] == pytest.approx([0] * (9 - k), abs=1e-6)


@pytest.mark.parametrize("kept", [[0, 2], [2, 2], [3, 1], [2, 31]])
def test_numbers_of_latents_that_make_no_sense_are_refused(kept):
    with pytest.raises(ValueError, match=r"`kept` must ascend between 1 and 30, it is \["):
        recovery(some_sae(TopK(2)), some_x(), kept)


def test_an_activation_that_changes_values_is_refused():
    with pytest.raises(ValueError, match="Gated does more than to select latents"):
        recovery(some_sae(Gated(30)), some_x(), [1, 2])
