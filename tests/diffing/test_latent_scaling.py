"""Latent Scaling against its definition, and a crosscoder in numbers: each by hand, and what must not count."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.dictionaries.autoencoders import BatchTopK, ReLU, SparseAutoencoder
from helpers.dictionaries.crosscoders import Crosscoder
from helpers.dictionaries.training import TrainConfig, train
from helpers.diffing.latent_scaling import (
    TARGETS,
    artefact_share,
    crosscoder_summary,
    inside_shared,
    latent_scaling,
    latent_table,
    rank_sum,
    sae_table,
)
from helpers.diffing.norms import classes, decoder_cosine, delta_norm

D, N = 6, 12


def random_crosscoder(seed=0, threshold=None):
    """Every weight at random, in float64."""
    crosscoder = Crosscoder(D, N, ReLU() if threshold is None else BatchTopK(2))
    random = torch.Generator().manual_seed(seed)
    for parameter in crosscoder.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=random)
    if threshold is not None:
        crosscoder.activation.threshold.fill_(threshold)
    return crosscoder.eval()


def random_pairs(n=64, seed=1):
    return torch.randn(n, 2, D, generator=torch.Generator().manual_seed(seed))


def slow_beta(crosscoder, x, latent, target, model):
    """Least squares on the flattened vectors, as the definition says."""
    crosscoder, x = copy.deepcopy(crosscoder).double(), x.double()
    f = crosscoder.encode(x).detach()
    x_hat = crosscoder.decode(f).detach()[:, model]
    own = f[:, latent, None] * crosscoder.decoders[model, latent].detach()
    y = {
        "error": x[:, model] - x_hat + own,
        "reconstruction": x_hat,
        "activation": x[:, model],
        "activation_no_bias": x[:, model] - crosscoder.biases[model].detach(),
    }[target]
    design = (f[:, latent, None] * crosscoder.decoders[1, latent].detach()).flatten()
    return np.linalg.lstsq(design[:, None].numpy(), y.flatten().numpy(), rcond=None)[0].item()


@pytest.mark.parametrize("threshold", [None, 0.8])
@pytest.mark.parametrize("target", TARGETS)
def test_beta_is_the_least_squares_fit(target, threshold):
    crosscoder, x = random_crosscoder(threshold=threshold).double(), random_pairs().double()
    found = latent_scaling(crosscoder, x.split(20))
    assert (found.fired > 0).all() and found.fired.tolist() == (crosscoder.encode(x) > 0).sum(0).tolist()
    for latent in range(N):
        for model in (0, 1):
            expected = slow_beta(crosscoder, x, latent, target, model)
            assert found.beta[target][model, latent].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_beta_of_the_error_is_one_where_the_rest_is_orthogonal():
    crosscoder = Crosscoder(2, 1, ReLU())
    crosscoder.W_enc.data = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    crosscoder.W_dec.data = torch.tensor([[0.25, 0.0, 1.0, 0.0]])
    f, other = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, -1.0, 2.0])
    x = torch.stack(
        [torch.stack([0.5 * f, other], 1), torch.stack([f, other], 1)], 1
    )  # the error is along the other axis
    found = latent_scaling(crosscoder, [x])
    assert found.beta["error"].flatten().tolist() == pytest.approx([0.5, 1.0])
    assert found.beta["reconstruction"].flatten().tolist() == pytest.approx([0.25, 1.0])
    assert found.nu("error").item() == pytest.approx(0.5) and found.nu("activation").item() == pytest.approx(0.5)
    assert found.nu("reconstruction").item() == pytest.approx(0.25)


@given(st.integers(0, 50))
def test_rescaling_a_latent_changes_no_ratio(seed):
    crosscoder, x = random_crosscoder(seed), random_pairs(seed=seed + 1)
    scaled = copy.deepcopy(crosscoder)
    factors = torch.linspace(0.5, 2, N)
    scaled.W_dec.data *= factors[:, None]
    scaled.W_enc.data /= factors[:, None]
    scaled.b_enc.data /= factors
    before, after = (latent_scaling(each, [x]) for each in (crosscoder, scaled))
    torch.testing.assert_close(delta_norm(scaled), delta_norm(crosscoder))
    for target in TARGETS:
        torch.testing.assert_close(after.beta[target], before.beta[target], rtol=1e-3, atol=1e-4, equal_nan=True)


def test_base_against_itself_has_nothing_of_its_own():
    x = random_pairs(4096)[:, :1].expand(-1, 2, -1)
    for activation, price in ((ReLU(), 0.05), (BatchTopK(2), 0.0)):
        config = TrainConfig(4096, lr=3e-3, sparsity=price)
        crosscoder = train(Crosscoder(D, N, activation), x.split(128), config).sae
        found = latent_scaling(crosscoder, x.split(512))
        on = found.fired > 0
        torch.testing.assert_close(delta_norm(crosscoder), torch.full((N,), 0.5), atol=1e-3, rtol=0)
        torch.testing.assert_close(decoder_cosine(crosscoder), torch.ones(N), atol=1e-3, rtol=0)
        for target in TARGETS:
            torch.testing.assert_close(found.nu(target)[on], torch.ones(int(on.sum())).double(), atol=1e-2, rtol=0)


def test_latents_that_never_fire_have_no_ratio():
    crosscoder = random_crosscoder()
    crosscoder.b_enc.data[3] = -1e6
    found = latent_scaling(crosscoder, [random_pairs()])
    assert found.fired[3] == 0 and all(found.nu(target)[3].isnan() for target in TARGETS)


def test_an_autoencoder_of_chat_is_scaled_as_a_crosscoder_with_the_same_code():
    crosscoder, x, sae = random_crosscoder(), random_pairs(), SparseAutoencoder(D, N, ReLU()).eval()
    crosscoder.W_enc.data[:, :D] = 0  # base is not read
    crosscoder.b_dec.data[:D] = 0
    sae.W_enc.data, sae.b_enc.data, sae.b_dec.data = crosscoder.encoders[1], crosscoder.b_enc.data, crosscoder.biases[1]
    sae.W_dec.data = crosscoder.decoders[1]
    whole, alone = latent_table(crosscoder, x), sae_table(sae, "chat", x)
    assert (alone.rate > 0).all()
    np.testing.assert_allclose(alone.rate, whole.rate)
    np.testing.assert_allclose(alone.nu_activation, whole.nu_activation, rtol=1e-4)


def test_empty_input():
    with pytest.raises(ValueError, match="no activations came"):
        latent_scaling(random_crosscoder(), [])
    with pytest.raises(ValueError, match="no activations came"):
        sae_table(SparseAutoencoder(D, N, ReLU()), "chat", random_pairs()[:0])
    with pytest.raises(ValueError, match="there is no target 'errors': use one of error, reconstruction"):
        latent_scaling(random_crosscoder(), [random_pairs()]).nu("errors")


def test_a_row_for_each_latent(monkeypatch):
    monkeypatch.setattr("helpers.diffing.latent_scaling.BATCH", 7)
    crosscoder, x = random_crosscoder(), random_pairs()
    table = latent_table(crosscoder, x)
    scaling = latent_scaling(crosscoder, [x])
    np.testing.assert_allclose(table.delta, delta_norm(crosscoder))
    np.testing.assert_allclose(table.rate, scaling.fired / len(x))
    np.testing.assert_allclose(table.nu_error, scaling.nu("error"), rtol=1e-5)
    assert list(table["class"]) == list(classes(delta_norm(crosscoder)))


def test_inside_the_middle_of_the_shared_ones():
    ratios = [*np.linspace(0, 1, 101), 0.5, 0.01, 2.0, np.nan]
    table = pd.DataFrame({"class": ["shared"] * 101 + ["chat-only"] * 4, "nu_reconstruction": ratios})
    inside = inside_shared(table)
    assert inside[101:].tolist() == [True, False, False, False]
    assert inside[:101].sum() == 95
    assert not inside_shared(table[101:]).any()


def test_artefacts_are_chat_only_by_norm_and_not_by_ratio():
    names = ["shared", *["chat-only"] * 5]
    ratios = {"nu_reconstruction": [1.0, 0.4, 0.6, 0.4, np.nan, 0.0], "nu_error": [1.0, 0.1, 0.1, 0.3, np.nan, 0.0]}
    table = pd.DataFrame({"class": names, "rate": [0.1] * 5 + [0.0]} | ratios)  # the last never fires
    assert artefact_share(table) == 3 / 4
    assert np.isnan(artefact_share(table[:1])) and np.isnan(artefact_share(table[5:]))


def test_summary_leaves_dead_latents_out():
    crosscoder, x = random_crosscoder(), torch.randn(64, 2, 6, generator=torch.Generator().manual_seed(1))
    crosscoder.b_enc.data[:3] = -1e3  # never on
    table = latent_table(crosscoder, x)
    found, alive = crosscoder_summary(crosscoder, table), table[table.rate > 0]
    assert found["dead"] == 12 - len(alive) >= 3 and found["live"] == len(alive)
    share = {name: (alive["class"] == name).mean() for name in ("base-only", "shared", "chat-only", "other")}
    rates = [found[name.replace("-", "_")] for name in share]
    assert rates == pytest.approx([1000 * value for value in share.values()]) and sum(rates) == pytest.approx(1000)
    assert found["outer"] == pytest.approx(((alive.delta <= 0.1) | (alive.delta >= 0.9)).mean())
    shared = alive[alive["class"] == "shared"]
    assert found["cosine"] == pytest.approx(shared.cosine.median())
    assert found["low_share"] == pytest.approx((shared.cosine < 0.5).mean())


def test_dead_latents_make_no_mode_and_no_chance():
    crosscoder, dead = Crosscoder(8, 160, ReLU()), np.arange(160) >= 60
    crosscoder.b_enc.data = torch.from_numpy(np.where(dead, -1e3, 10.0)).float()
    crosscoder.W_dec.data[60:] = torch.eye(8)[0].repeat(2)  # dead, and all of one direction
    crosscoder.W_dec.data[120:, :8] = 0  # dead, and chat-only
    x = torch.randn(16, 2, 8, generator=torch.Generator().manual_seed(0))
    found = crosscoder_summary(crosscoder, latent_table(crosscoder.eval(), x))
    assert (found["live"], found["modes"]) == (60, 1) and found["shuffled"] < 0.95


def test_summary_of_a_crosscoder_that_is_dead():
    crosscoder = random_crosscoder()
    crosscoder.b_enc.data[:] = -1e3
    found = crosscoder_summary(crosscoder, latent_table(crosscoder, torch.randn(8, 2, 6)))
    assert found["live"] == 0 and found["modes"] == 0 and np.isnan(found["outer"])


def test_rank_sum_by_hand():
    table = pd.DataFrame({"nu_error": [0.0, 0.3, 0.1, 0.2], "nu_reconstruction": [0.4, 0.1, 0.1, 0.2]})
    assert rank_sum(table).tolist() == [-(1 + 4), -(4 + 1.5), -(2 + 1.5), -(3 + 3)]
