"""Whose latent is it? Classes by norm, Latent Scaling against its definition, twins."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.dictionaries.autoencoders import BatchTopK, ReLU
from helpers.dictionaries.crosscoders import Crosscoder
from helpers.dictionaries.training import TrainConfig, train
from helpers.diffing.norms import (
    TARGETS,
    activation_scaling,
    classes,
    decoder_cosine,
    delta_norm,
    divergence,
    inside_shared,
    latent_scaling,
    latent_table,
    twins,
    variance_explained,
)

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


def with_norms(base, chat):
    """A crosscoder whose latents have these decoder norms."""
    crosscoder = Crosscoder(2, len(base), ReLU())
    rows = torch.stack([torch.tensor(base), torch.tensor(chat)], 1)
    crosscoder.W_dec.data = torch.stack([rows, torch.zeros_like(rows)], 2).flatten(1)  # along the first axis
    return crosscoder


def test_delta_norm_and_classes_by_hand():
    delta = delta_norm(with_norms([1.0, 2.0, 0.0, 4.0, 0.0, 1.0], [1.0, 0.0, 3.0, 1.0, 0.0, 10.0]))
    assert delta.tolist() == pytest.approx([0.5, 0.0, 1.0, 0.125, 0.5, 0.95])
    assert classes(delta).tolist() == ["shared", "base-only", "chat-only", "other", "shared", "chat-only"]
    assert classes(torch.tensor([0.1, 0.4, 0.6, 0.9])).tolist() == ["base-only", "shared", "shared", "chat-only"]


@given(st.integers(0, 50))
def test_swapping_the_models_turns_delta_around(seed):
    crosscoder, swapped = random_crosscoder(seed), random_crosscoder(seed)
    swapped.W_dec.data = crosscoder.W_dec.data.roll(D, dims=1)
    torch.testing.assert_close(delta_norm(swapped), 1 - delta_norm(crosscoder))
    torch.testing.assert_close(decoder_cosine(swapped), decoder_cosine(crosscoder))


def test_cosine_by_hand():
    crosscoder = Crosscoder(2, 2, ReLU())
    crosscoder.W_dec.data = torch.tensor([[1.0, 0.0, 0.0, 3.0], [1.0, 1.0, -2.0, -2.0]])
    assert decoder_cosine(crosscoder).tolist() == pytest.approx([0.0, -1.0], abs=1e-6)


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
    assert found.nu("reconstruction").item() == pytest.approx(0.25) and not found.chat_specific().item()


def test_chat_specific_needs_both_ratios_low():
    beta = {"reconstruction": [[0.4, 0.4, 0.6], [1.0, 1.0, 1.0]], "error": [[0.1, 0.3, 0.1], [1.0, 1.0, 1.0]]}
    scaling = latent_scaling(random_crosscoder(), [random_pairs()])._replace(
        beta={name: torch.tensor(values) for name, values in beta.items()}
    )
    assert scaling.chat_specific().tolist() == [True, False, False]


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
    assert not found.chat_specific()[3]


def test_activation_scaling_is_that_of_a_crosscoder_with_the_same_code():
    crosscoder, x = random_crosscoder(), random_pairs()
    whole = latent_scaling(crosscoder, [x])
    alone = activation_scaling([(crosscoder.encode(x).detach(), x)], crosscoder.decoders[1])
    torch.testing.assert_close(alone.beta["activation"], whole.beta["activation"], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="there is no target 'error': use one of activation"):
        alone.nu("error")


def test_variance_explained_by_hand():
    crosscoder = with_norms([0.0], [0.0])
    x = random_pairs()[:, :, :2]
    assert variance_explained(crosscoder, x, batch=10) == pytest.approx((0.0, 0.0, 0.0), abs=1e-6)
    crosscoder.W_enc.data = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    crosscoder.W_dec.data = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    x = torch.tensor([[[1.0, 0.0], [2.0, 1.0]], [[-1.0, 0.0], [4.0, 1.0]]])  # chat is rebuilt but for a constant
    assert variance_explained(crosscoder, x) == pytest.approx((0.5, 0.0, 1.0))


def test_twins_by_hand():
    crosscoder = Crosscoder(2, 4, ReLU())
    crosscoder.W_dec.data = torch.tensor(
        [[0.0, 0.0, 1.0, 0.1], [0.0, 0.0, 0.0, 1.0], [2.0, 0.0, 0.0, 0.0], [0.0, 2.0, 1.9, 0.0]]
    )
    assert twins(crosscoder).tolist() == [[0, 2]]
    assert twins(crosscoder, cosine=0.999).tolist() == []


def test_divergence_by_hand():
    worth = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.8, 0.8], [0.5, 0.5, 0.2], [0.05, 0.05, 0.0]])
    worth = torch.cat([worth, torch.full((4, 1), 10.0)], 1)  # another latent, far stronger
    # pair (0, 1): tokens 0 and 1 apart, token 2 together, token 3 low; pair (0, 2): tokens 1 apart, 0 and 2 not
    found = divergence(torch.tensor([[0, 1], [0, 2]]), worth)
    assert found.tolist() == pytest.approx([2 / 3, 1 / 3])
    assert divergence(torch.empty(0, 2, dtype=torch.int64), worth).tolist() == []


def test_empty_input():
    with pytest.raises(ValueError, match="the batches are empty"):
        latent_scaling(random_crosscoder(), [])


def test_a_row_for_each_latent():
    crosscoder, x = random_crosscoder(), random_pairs()
    table = latent_table(crosscoder, x, batch=7)
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
