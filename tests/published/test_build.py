"""Foldings are exact: the folded autoencoder is the formula it came from, whatever the numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.dictionaries.autoencoders import ReLU
from helpers.published import build

NUMBERS = st.floats(0.1, 10)


@given(st.integers(1, 9), st.integers(1, 9), st.booleans(), NUMBERS, NUMBERS, st.floats(-5, 5), st.integers(0, 99))
def test_scales_means_and_biases_are_folded_exactly(d, n, centred, scale, back, mean, seed):
    random = torch.Generator().manual_seed(seed)
    W_enc, W_dec, b_enc, b_dec, x, m = (
        torch.randn(*shape, generator=random) for shape in ((n, d), (n, d), (n,), (d,), (20, d), (d,))
    )
    sae = build.autoencoder(W_enc, W_dec, b_enc, b_dec, ReLU(), centred, scale, back, mean * m)
    a = (scale * (x - mean * m) - centred * b_dec) @ W_enc.T + b_enc
    torch.testing.assert_close(sae.pre_acts(x), a, rtol=1e-4, atol=2e-4)
    x_hat = (a.relu() @ W_dec + b_dec) / back + mean * m
    torch.testing.assert_close(sae(x), x_hat, rtol=1e-4, atol=1e-2)
    assert (sae.d_model, sae.n_latents) == (d, n)


def test_nothing_to_fold_leaves_every_bit():
    parts = torch.randn(5, 3), torch.randn(5, 3), torch.randn(5), torch.randn(3)
    sae = build.autoencoder(*parts, ReLU())
    assert all(torch.equal(a, b) for a, b in zip((sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec), parts, strict=True))


@pytest.mark.parametrize("value", [-3.0, 0.0, 1e-30, 0.7, 5000.1])
def test_what_equals_the_threshold_is_off(value):
    above = torch.nextafter(torch.tensor(value), torch.tensor(math.inf)).item()
    x = torch.tensor([[value, above if value else 1e-30]])  # some processors take the very least number for zero
    expected = (x.relu() * (x > value) > 0).tolist()
    assert (build.batch_topk(1, value).eval()(x) > 0).tolist() == expected
    assert (build.jump_relu(torch.full((2,), value))(x) > 0).tolist() == expected
    assert torch.equal(build.just_below(build.just_above(x)), x)


def test_more_than_there_is_cannot_be_kept():
    with pytest.raises(ValueError, match="k = 6 is more than the 5 latents there are"):
        build.autoencoder(torch.ones(5, 3), torch.ones(5, 3), torch.ones(5), torch.ones(3), build.top_k(6))
