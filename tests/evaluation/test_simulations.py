"""Scales by hand, a splice of perfect latents, and the splice beside a plain forward pass of transformers' model."""

import numpy as np
import pytest
import scipy.sparse
import torch
from twins import CONTEXT, N_VOCAB, Twin, save_tiny

from helpers.dictionaries.autoencoders import ReLU, SparseAutoencoder
from helpers.evaluation.explanations import firings, site_activations
from helpers.evaluation.simulations import rescaled, spliced_loss
from helpers.subjects.subject import load_subject


def sparse(rows):
    return scipy.sparse.csc_array(np.array(rows, np.float32))


def test_scales_are_least_squares_fits_by_hand():
    predicted, codes = sparse([[1, 0, 0], [2, 1, 0], [0, 1, 0]]), sparse([[3, 0, 1], [1, 0, 1], [7, 0, 1]])
    fitted = rescaled(sparse([[10, 10, 10], [0, 0, 5]]), predicted, codes)  # (3 + 2) / (1 + 4), 0 / 2, unknown
    assert fitted.toarray().tolist() == [[10, 0, 0], [0, 0, 0]]


def test_scales_equal_numpys_least_squares():
    random = np.random.default_rng(0)
    predicted, codes = random.random((50, 4)) * (random.random((50, 4)) < 0.5), random.random((50, 4))
    scales = rescaled(sparse(np.eye(4)), sparse(predicted), sparse(codes)).toarray().diagonal()
    expected = [np.linalg.lstsq(predicted[:, [j]], codes[:, j], rcond=None)[0][0] for j in range(4)]
    np.testing.assert_allclose(scales, expected, rtol=1e-5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("tiny"), "gpt2")
    subject = load_subject(folder, layer=1)  # with a block above it
    rows = torch.randint(N_VOCAB, (5, CONTEXT), generator=torch.Generator().manual_seed(0))
    return subject, rows, Twin(folder, subject.layer)


def perfect(d_model):
    """An autoencoder that is the identity: each latent and its opposite."""
    sae = SparseAutoencoder(d_model, 2 * d_model, ReLU())
    both = torch.cat([torch.eye(d_model), -torch.eye(d_model)])
    sae.W_enc.data, sae.W_dec.data = both.clone(), both.clone()
    return sae


@pytest.mark.parametrize("rows_a_pass", [16, 2])
def test_perfect_latents_cost_nothing(tiny, rows_a_pass):
    subject, rows, _ = tiny
    sae = perfect(subject.d_model)
    loss = spliced_loss(subject, sae, rows, firings(sae, site_activations(subject, rows)), rows_a_pass)
    assert loss == pytest.approx(subject.losses(rows)[:, 1:].mean().item(), rel=1e-5)


def test_a_splice_equals_replacing_by_hand(tiny):
    subject, rows, twin = tiny
    sae = SparseAutoencoder(subject.d_model, 30, ReLU())
    sae.b_dec.data.normal_(generator=torch.Generator().manual_seed(1))
    codes = torch.rand(rows.numel(), 30, generator=torch.Generator().manual_seed(2))

    def replace(residual):
        new = residual.clone()
        for b in range(len(rows)):
            for t in range(1, CONTEXT):
                centred = residual[b, t] - residual[b, t].mean()
                decoded = codes[b * CONTEXT + t] @ sae.W_dec + sae.b_dec
                new[b, t] = decoded * centred.norm() + residual[b, t].mean()
        return new

    log_probs = twin.splice(rows, replace).log_softmax(-1)
    losses = [-log_probs[b, t, rows[b, t + 1]].item() for b in range(len(rows)) for t in range(1, CONTEXT - 1)]
    assert spliced_loss(subject, sae, rows, sparse(codes)) == pytest.approx(np.mean(losses), rel=1e-4)


def test_codes_of_other_rows_are_refused(tiny):
    subject, rows, _ = tiny
    sae = perfect(subject.d_model)
    with pytest.raises(ValueError, match="3 codes for 80 tokens"):
        spliced_loss(subject, sae, rows, sparse(np.zeros((3, sae.n_latents))))
