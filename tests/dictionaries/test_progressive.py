"""Keeping the k' largest against separate passes, thresholds against counting, and codes with a known answer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.dictionaries.autoencoders import Gated, MultiTopK, ReLU, SparseAutoencoder, TopK
from helpers.dictionaries.progressive import keep_largest, recovery, threshold
from helpers.dictionaries.quality import evaluate, nmse


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
