"""Splicing against forward hooks on transformers' own model, known answers, and a training curve read by hand.

Scales by hand, a splice of perfect latents, and the splice beside a plain forward pass of transformers' model.
"""

import json
import math

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from twins import BOS, CONTEXT, D_MODEL, N_VOCAB, Twin, save_tiny

from helpers.activations.stream import normalise
from helpers.base.stats import recovered, resampled_columns
from helpers.dictionaries.autoencoders import ReLU, SparseAutoencoder, TopK
from helpers.evaluation.downstream import (
    TrainingCurve,
    _weights,
    ablation,
    compute_shares,
    downstream,
    reconstruction,
    rescaled,
    splice_losses,
    spliced_loss,
    training_curve,
    where,
)
from helpers.evaluation.explanations import firings, site_activations
from helpers.subjects import subject as subject_module
from helpers.subjects.subject import load_subject

LAYER = 1
FALLING = [(1e6, 4.0), (4e6, 2.0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "gpt2", "gpt2")


@pytest.fixture(scope="module")
def subject(folder):
    return load_subject(folder, layer=LAYER)


def some_rows(n_rows=5, length=CONTEXT, seed=0):
    return torch.randint(0, N_VOCAB, (n_rows, length), generator=torch.Generator().manual_seed(seed))


def likely_rows(subject, n_rows=5):
    """Each token is the most likely one, so that whatever changes the prediction costs something."""
    rows = some_rows(n_rows, length=2)
    while rows.shape[1] < CONTEXT:
        rows = torch.cat([rows, subject.logits(rows)[:, -1:].argmax(-1)], 1)
    return rows


def mean_of(subject, rows):
    return normalise(subject.residuals(rows)[:, 1:])[0].flatten(0, 1).mean(0)


def random_sae(seed=0, k=4):
    return SparseAutoencoder(D_MODEL, 64, TopK(k), seed)


def perfect_sae():
    """x = max(0, x) - max(0, -x), coordinate by coordinate."""
    sae, both = SparseAutoencoder(D_MODEL, 2 * D_MODEL, ReLU()), torch.cat([torch.eye(D_MODEL), -torch.eye(D_MODEL)])
    sae.W_enc.data, sae.W_dec.data = both.clone(), both.clone()
    return sae


def constant_sae(mean):
    """No latent is ever on."""
    sae = SparseAutoencoder(D_MODEL, 8, ReLU())
    sae.b_dec.data, sae.b_enc.data = mean.clone(), torch.full((8,), -1e3)
    return sae


def slow_losses(twin, rows, replace):
    """(ce original, ce, kl) of each row: hooks on the plain model, and a loop over tokens."""

    def at_site(residuals):
        replaced = replace(residuals.clone())
        for row in range(len(rows)):
            for t in range(rows.shape[1]):
                if t == 0 or rows[row, t] >= BOS:
                    replaced[row, t] = residuals[row, t]
        return replaced

    before, after = twin.logits(rows).log_softmax(-1), twin.splice(rows, at_site).log_softmax(-1)
    found = []
    for row, p, q in zip(rows.tolist(), before.double(), after.double(), strict=True):
        places = range(1, len(row) - 1)
        terms = [(-p[t, row[t + 1]], -q[t, row[t + 1]], (p[t].exp() * (p[t] - q[t])).sum()) for t in places]
        found.append([float(sum(column)) / len(places) for column in zip(*terms, strict=True)])
    return torch.tensor(found, dtype=torch.float64).T


@pytest.mark.parametrize("batch_rows", [2, 16])
def test_losses_equal_hooks_on_the_plain_model(folder, subject, batch_rows, monkeypatch):
    monkeypatch.setattr(subject_module, "ROWS_A_PASS", batch_rows)
    rows, twin = some_rows(), Twin(folder, LAYER)
    replacements = [lambda r: r / 2 + 1, torch.zeros_like, reconstruction(random_sae())]
    losses = splice_losses(subject, rows, replacements)
    for number, replace in enumerate(replacements):
        original, ce, kl = slow_losses(twin, rows, replace)
        torch.testing.assert_close(losses.original, original, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(losses.ce[number], ce, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(losses.kl[number], kl, rtol=1e-5, atol=1e-5)


def test_the_table_holds_means_over_rows(folder, subject):
    rows, twin, sae = likely_rows(subject), Twin(folder, LAYER), random_sae()
    found = downstream(subject, rows, [sae], mean := mean_of(subject, rows)).iloc[0]
    ce_original, ce, kl = slow_losses(twin, rows, reconstruction(sae)).mean(1).tolist()
    ce_zero = slow_losses(twin, rows, torch.zeros_like)[1].mean().item()
    ce_mean = slow_losses(twin, rows, ablation(mean))[1].mean().item()
    expected = {"ce_original": ce_original, "ce_zero": ce_zero, "ce_mean": ce_mean, "ce": ce, "kl": kl}
    expected |= {"delta_ce": ce - ce_original}
    expected |= {"recovered_zero": (ce_zero - ce) / (ce_zero - ce_original)}
    expected |= {"recovered_mean": (ce_mean - ce) / (ce_mean - ce_original)}
    assert found[list(expected)].to_dict() == pytest.approx(expected, abs=1e-4)
    assert abs(found.recovered_zero - found.recovered_mean) > 0.01


def test_activations_may_be_prepared_otherwise(folder, subject):
    rows, twin, sae = likely_rows(subject), Twin(folder, LAYER), random_sae()
    raw = lambda x: normalise(x, "none")  # noqa: E731 (as a published dictionary passes its own)
    mean = torch.arange(D_MODEL).float()
    found = downstream(subject, rows, [sae], mean, raw).iloc[0]
    ce, kl = slow_losses(twin, rows, lambda r: sae.eval()(r.flatten(0, 1)).view_as(r)).mean(1).tolist()[1:]
    ce_mean = slow_losses(twin, rows, lambda r: mean.expand_as(r).clone())[1].mean().item()
    assert [found.ce, found.kl, found.ce_mean] == pytest.approx([ce, kl, ce_mean], abs=1e-4)
    assert abs(found.ce - downstream(subject, rows, [sae], mean).ce[0]) > 1e-3


def test_a_perfect_reconstruction_costs_nothing_and_is_worth_all_the_compute(subject):
    rows = some_rows()
    table = downstream(subject, rows, [perfect_sae()], mean_of(subject, rows))
    found = table.join(compute_shares(table, TrainingCurve(FALLING))).iloc[0]
    assert [found.delta_ce, found.delta_ce_low, found.delta_ce_high, found.kl] == pytest.approx([0] * 4, abs=1e-5)
    assert found.compute_share == pytest.approx(1, abs=1e-4)
    identity = splice_losses(subject, rows, [lambda residuals: residuals])
    assert torch.equal(identity.ce[0], identity.original) and not identity.kl.any()


def test_the_mean_as_reconstruction_recovers_nothing_and_a_perfect_one_all(subject):
    rows = likely_rows(subject)
    mean = mean_of(subject, rows)
    found = downstream(subject, rows, [constant_sae(mean), perfect_sae()], mean)
    assert found.ce[0] == pytest.approx(found.ce_mean[0], abs=1e-5) and found.ce_mean[0] > found.ce_original[0] + 0.01
    assert found.recovered_mean.tolist() == pytest.approx([0, 1], abs=1e-3)
    assert found.recovered_zero[1] == pytest.approx(1, abs=1e-3)


def test_an_ablation_that_costs_nothing_has_no_share_to_recover():
    assert recovered(torch.tensor([[0.1, 0.1]]), torch.tensor([-1.0, 1.0]))[0].tolist() == pytest.approx(
        [math.nan, 0.9], nan_ok=True
    )


def test_every_token_keeps_its_own_mean_and_norm():
    residuals = torch.randn(2, 3, D_MODEL, generator=torch.Generator().manual_seed(0))
    scaled = 3 * residuals + 5
    for replace in (reconstruction(random_sae()), ablation(torch.ones(D_MODEL).cumsum(0))):
        torch.testing.assert_close(replace(scaled), 3 * replace(residuals) + 5, rtol=1e-4, atol=1e-4)


def test_reconstruction_by_hand():
    residuals = torch.tensor([[[1.0, 5.0]]])  # mean 3, centred (-2, 2), norm 2 sqrt 2
    sae = SparseAutoencoder(2, 1, ReLU())
    sae.W_enc.data = sae.W_dec.data = torch.tensor([[0.0, 1.0]])
    torch.testing.assert_close(reconstruction(sae)(residuals), torch.tensor([[[3.0, 5.0]]]))
    torch.testing.assert_close(ablation(torch.tensor([1.0, 0.0]))(residuals), torch.tensor([[[3 + 8**0.5, 3.0]]]))


@pytest.mark.parametrize(("position", "counts"), [(0, False), (1, True), (CONTEXT - 2, True), (CONTEXT - 1, False)])
def test_which_positions_count(subject, position, counts):
    def poke(residuals):
        residuals = residuals.clone()
        residuals[:, position] *= -1
        return residuals

    losses = splice_losses(subject, some_rows(), [poke])
    assert (losses.kl.abs().max() > 1e-5) == counts


def test_what_is_not_studied_is_kept_and_the_first_prediction_never_counts(subject):
    def poke(residuals):
        return residuals + torch.randn(residuals.shape, generator=torch.Generator().manual_seed(1))

    rows = some_rows()
    rows[1, 4] = BOS
    residuals, studied = subject.residuals(rows), subject.studied(rows)
    kept = where(studied, poke)(residuals)
    assert torch.equal(kept[~studied], residuals[~studied]) and torch.equal(kept[studied], poke(residuals)[studied])
    assert not studied[:, 0].any() and not studied[1, 4]
    two = some_rows()
    two[:, 1] = (two[:, 1] + 1) % N_VOCAB  # the target of position 0, and all that follows it
    one = splice_losses(subject, two[:, :3], [poke]).original
    log_p = subject.logits(two[:, :3]).log_softmax(-1)
    torch.testing.assert_close(one.float(), -log_p[range(5), 1, two[:, 2]], rtol=1e-5, atol=1e-5)


def test_many_together_are_each_alone_in_order(subject):
    rows, saes = some_rows(), [random_sae(seed, k) for seed, k in ((0, 1), (1, 4), (2, 16))]
    mean = mean_of(subject, rows)
    together = downstream(subject, rows, saes, mean)
    alone = pd.concat([downstream(subject, rows, [sae], mean) for sae in saes], ignore_index=True)
    pd.testing.assert_frame_equal(together, alone, rtol=1e-5)
    assert together.ce.nunique() == 3


def test_blocks_below_the_site_run_once_a_batch(subject, monkeypatch):
    monkeypatch.setattr(subject_module, "ROWS_A_PASS", 2)
    ran = []
    handles = [
        block.original_component.register_forward_pre_hook(lambda *_, n=number: ran.append(n))
        for number, block in enumerate(subject.bridge.blocks)
    ]
    splice_losses(subject, some_rows(4), [torch.zeros_like] * 5)
    for handle in handles:
        handle.remove()
    assert [ran.count(n) for n in range(3)] == [2, 2, 2 * 6]


def test_autoencoders_are_put_into_evaluation(subject):
    sae = random_sae().train()
    reconstruction(sae)(subject.residuals(some_rows()))
    assert not sae.training


def test_resampled_weights_by_hand():
    weights = _weights(4)
    assert weights.shape == (1001, 4) and torch.equal(weights[0], torch.full((4,), 0.25, dtype=torch.float64))
    torch.testing.assert_close(weights.sum(1), torch.ones(1001, dtype=torch.float64))
    assert torch.equal(weights * 4, (weights * 4).round()) and len(weights.unique(dim=0)) > 20


def test_the_interval_of_a_mean_is_the_usual_one():
    x = torch.randn(1, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = resampled_columns("x", x @ _weights(400).T)
    half = 1.96 * x.std().item() / 20
    assert found["x"][0] == pytest.approx(x.mean().item())
    assert found["x_low"][0] == pytest.approx(x.mean().item() - half, abs=half / 8)
    assert found["x_high"][0] == pytest.approx(x.mean().item() + half, abs=half / 8)


def test_bad_input_is_refused(subject):
    mean = torch.zeros(D_MODEL)
    for rows in (some_rows(length=2), some_rows(0), some_rows()[0]):
        with pytest.raises(ValueError, match="at least one row of three tokens"):
            downstream(subject, rows, [], mean)
    with pytest.raises(ValueError, match=r"24 wide, autoencoders are \[7\]"):
        downstream(subject, some_rows(), [SparseAutoencoder(7, 8, ReLU())], mean)


def test_a_share_by_hand():
    curve = TrainingCurve(FALLING)
    assert [curve.share(delta) for delta in (0, 1, 2)] == pytest.approx([1, 0.5, 0.25])  # halfway in log tokens
    assert curve.reach == 2
    assert curve.share(-1e-6) == pytest.approx(1)  # no more than rounding


@pytest.mark.parametrize(("delta", "bound"), [(-0.1, "more than 100 %"), (2.1, "less than 25.0%"), (math.nan, "")])
def test_nothing_is_extrapolated(delta, bound):
    with pytest.raises(ValueError, match=f"outside the training curve.*{bound}"):
        TrainingCurve(FALLING).share(delta)


def test_a_point_that_is_not_below_all_before_is_left_out():
    noisy = TrainingCurve([(4e6, 2.0), (1e6, 4.0), (2e6, 5.0), (8e6, 2.0), (9e6, 2.5)])  # in any order
    assert noisy.tokens.tolist() == [1e6, 4e6] and noisy.losses.tolist() == [4, 2]


@pytest.mark.parametrize("points", [[], [(1e6, 2.0)], [(1e6, 2.0), (2e6, 3.0)], [(0, 3.0), (1e6, 2.0)]])
def test_what_is_no_curve_is_refused(points):
    with pytest.raises(ValueError, match="at least two points"):
        TrainingCurve(points)


@given(st.lists(st.tuples(st.floats(0.01, 2), st.floats(0.01, 2)), min_size=1, max_size=8), st.floats(0, 1))
def test_a_share_read_forward_is_the_loss_again(steps, place):
    log_tokens, fallen = np.cumsum([(0, 0), *steps], axis=0).T
    curve = TrainingCurve(zip(np.exp(log_tokens), 30 - fallen, strict=True))
    delta = place * curve.reach
    at = np.log(curve.share(delta)) + log_tokens[-1]
    assert np.interp(at, log_tokens, 30 - fallen) == pytest.approx(30 - fallen[-1] + delta, abs=1e-6)


def test_only_the_constant_rate_of_a_subject_is_its_curve(tmp_path):
    rates = [(1, 9.0, 0.5), (2, 4.0, 1.0), (4, 3.0, 1.0), (6, 2.5, 0.4)]  # warm-up, constant, decay
    record = {"corpus": {}, "curve": [{"tokens": t, "loss": 0.0, "heldout": y, "lr": lr} for t, y, lr in rates]}
    subject = load_subject(save_tiny(tmp_path, "gpt2"))
    with pytest.raises(FileNotFoundError, match="no training.json: make a TrainingCurve from"):
        training_curve(subject)
    (tmp_path / "training.json").write_text(json.dumps(record))
    curve = training_curve(subject)
    assert curve.tokens.tolist() == [2, 4] and curve.losses.tolist() == [4, 3]


def test_a_sweep_goes_on_where_one_lies_outside_the_curve():
    table = {"delta_ce": [1.0, 9.0], "delta_ce_low": [0.0, 8.0], "delta_ce_high": [2.0, 10.0]}
    found = compute_shares(pd.DataFrame(table, index=[3, 7]), TrainingCurve(FALLING))
    expected = {"compute_share": 0.5, "compute_share_low": 0.25, "compute_share_high": 1.0, "why_not": ""}
    assert found.loc[3].to_dict() == pytest.approx(expected)
    assert found.loc[7, list(expected)[:3]].isna().all() and "outside the training curve" in found.why_not[7]


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
def test_perfect_latents_cost_nothing(tiny, rows_a_pass, monkeypatch):
    monkeypatch.setattr(subject_module, "ROWS_A_PASS", rows_a_pass)
    subject, rows, _ = tiny
    sae = perfect(subject.d_model)
    loss = spliced_loss(subject, sae, rows, firings(sae, site_activations(subject, rows), subject.studied(rows)))
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
