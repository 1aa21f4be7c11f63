"""The training step: what is dead, what AuxK may touch, what stays on the unit sphere, what is averaged."""

import dataclasses

import pytest
import torch

from helpers import training
from helpers.autoencoders import BatchTopK, Gated, JumpReLU, ReLU, SparseAutoencoder, TopK
from helpers.metrics import evaluate
from helpers.training import TrainConfig, auxk_loss, train

D, N = 12, 48


def sparse_data(n=4096, seed=0):
    """Sums of few of 24 fixed unit directions: something a sparse code can find."""
    random = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(24, D, generator=torch.Generator().manual_seed(9)), dim=1)
    on = (torch.rand(n, 24, generator=random) < 0.08) * (0.5 + torch.rand(n, 24, generator=random))
    return on @ directions + 0.1


CONFIG = TrainConfig(tokens=4096 * 8, lr=5e-3)


def batches(config=CONFIG, size=256, seed=0):
    x = sparse_data(config.tokens, seed)
    return x.split(size)


ACTIVATIONS = {
    "ReLU": (lambda: ReLU(), 0.15),
    "Gated": (lambda: Gated(N), 0.2),
    "JumpReLU": (lambda: JumpReLU(N, 0.2, 0.2), 0.03),
    "TopK": (lambda: TopK(3), 0.0),
    "BatchTopK": (lambda: BatchTopK(3), 0.0),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_architecture_learns_and_keeps_unit_norm(name):
    activation, sparsity = ACTIVATIONS[name]
    config = dataclasses.replace(CONFIG, sparsity=sparsity)
    sae, record = train(SparseAutoencoder(D, N, activation()), batches(config), config)
    quality = evaluate(sae, sparse_data(2048, seed=1))
    assert quality.nmse < 0.25 and quality.l0 < 12
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N), atol=1e-5, rtol=0)
    assert record["tokens"] == config.tokens and record["curve"][-1]["nmse"] < record["curve"][0]["nmse"]
    assert record["config"] == dataclasses.asdict(config) and record["architecture"] == name


def test_batchtopk_l0_by_threshold_is_k():
    sae = train(SparseAutoencoder(D, N, BatchTopK(3)), batches(), CONFIG).sae
    assert evaluate(sae, sparse_data(4096, seed=1)).l0 == pytest.approx(3, rel=0.05)


def test_norms_are_one_after_every_step(monkeypatch):
    norms, plain = [], training._update

    def watched(sae, *arguments):
        plain(sae, *arguments)
        norms.append(sae.W_dec.norm(dim=1).detach().clone())

    monkeypatch.setattr(training, "_update", watched)
    train(SparseAutoencoder(D, N, TopK(3)), batches(), CONFIG)
    assert len(norms) == CONFIG.tokens // 256
    torch.testing.assert_close(torch.stack(norms), torch.ones(len(norms), N), atol=1e-5, rtol=0)


def test_unit_norm_can_be_switched_off(monkeypatch):
    config = dataclasses.replace(CONFIG, unit_norm=False)
    monkeypatch.setattr(SparseAutoencoder, "project_decoder_gradient", None)  # lengths are free: nothing to project out
    sae = train(SparseAutoencoder(D, N, TopK(3)), batches(), config).sae
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() > 1e-3


def test_dead_means_silent_for_exactly_the_window(monkeypatch):
    """Latent 0 fires in every batch, latent 1 in the first only, latent 2 never."""
    sae = SparseAutoencoder(D, 3, TopK(1))
    seen, plain = [], training.forward

    def fake(sae, x, variance, dead, config, sparsity):
        seen.append(dead.tolist())
        fired = torch.tensor([True, len(seen) == 1, False])
        return plain(sae, x, variance, dead, config, sparsity)._replace(fired=fired)

    monkeypatch.setattr(training, "forward", fake)
    config = TrainConfig(tokens=500, dead_after=0.4)  # a window of 200 tokens, two batches of 100
    train(sae, sparse_data(500).split(100), config)
    assert [row[2] for row in seen] == [False, False, True, True, True]  # dead once 200 tokens passed in silence
    assert [row[1] for row in seen] == [False, False, False, True, True]  # one batch later
    assert not any(row[0] for row in seen)


def aux_case(b_dec=0.0):
    torch.manual_seed(0)
    sae = SparseAutoencoder(D, N, TopK(3))
    with torch.no_grad():
        sae.b_dec.fill_(b_dec)
    x = sparse_data(64)
    dead = torch.zeros(N, dtype=torch.bool)
    dead[5:20] = True
    return sae, x, dead


def test_auxk_reaches_dead_rows_only():
    sae, x, dead = aux_case()
    error = x - sae(x)  # carries a graph: the residual must be detached inside
    auxk_loss(sae, x, error, dead, k_aux=4).backward()
    for weight in (sae.W_dec, sae.W_enc):
        assert (weight.grad[~dead] == 0).all() and (weight.grad[dead] != 0).any()


@pytest.mark.parametrize("b_dec", [0.0, 2.5])
def test_auxk_has_no_bias(b_dec):
    """Dead latents that equal the residual give zero loss, whatever b_dec is."""
    sae, _, _ = aux_case(b_dec)
    dead = torch.zeros(N, dtype=torch.bool)
    dead[7] = True
    amount = torch.linspace(1, 3, 16)[:, None]
    with torch.no_grad():
        sae.W_enc[7] = sae.W_dec[7]
    x = sae.b_dec.detach() + amount * sae.W_dec[7].detach()
    assert auxk_loss(sae, x, amount * sae.W_dec[7].detach(), dead, k_aux=4).item() < 1e-4


def test_auxk_with_fewer_dead_latents_than_k_aux_and_a_perfect_reconstruction():
    sae, x, _ = aux_case()
    dead = torch.zeros(N, dtype=torch.bool)
    dead[3] = True
    assert auxk_loss(sae, x, x - sae(x), dead, k_aux=30).isfinite()
    assert auxk_loss(sae, x, torch.zeros_like(x), dead, k_aux=30).isfinite()


def test_auxk_is_zero_when_nothing_is_dead_and_when_switched_off():
    sae, x, dead = aux_case()
    variance = x.var(0).sum()
    config = TrainConfig(tokens=1)
    nothing = training.forward(sae, x, variance, torch.zeros_like(dead), config, 0.0)
    off = training.forward(sae, x, variance, dead, dataclasses.replace(config, auxk=0.0), 0.0)
    on = training.forward(sae, x, variance, dead, config, 0.0)
    assert nothing.loss == off.loss == nothing.nmse and on.loss > on.nmse


def test_ema_is_the_bias_corrected_mean_of_the_weights(monkeypatch):
    history, plain = [], training._update

    def watched(sae, *arguments):
        plain(sae, *arguments)
        history.append(sae.b_enc.detach().clone())

    monkeypatch.setattr(training, "_update", watched)
    config = TrainConfig(tokens=1024, ema=0.5)
    sae = train(SparseAutoencoder(D, N, ReLU()), sparse_data(1024).split(256), config).sae
    weights = torch.tensor([0.5**i for i in reversed(range(len(history)))])
    mean = (weights[:, None] * torch.stack(history)).sum(0) / weights.sum()
    torch.testing.assert_close(sae.b_enc.detach(), mean)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N), atol=1e-5, rtol=0)


def test_gate_must_reconstruct_through_a_decoder_it_cannot_change():
    torch.manual_seed(0)
    sae = SparseAutoencoder(D, N, Gated(N))
    x = sparse_data(64)
    training._reconstruct_densely(sae, x).gate_error.backward()
    assert sae.W_dec.grad is None and sae.W_enc.grad.abs().sum() > 0
    with torch.no_grad():
        expected = (x - sae.pre_acts(x).relu() @ sae.W_dec - sae.b_dec).square().sum(1).mean()
    assert training._reconstruct_densely(sae, x).gate_error.item() == pytest.approx(expected.item(), rel=0.02)


def test_schedules_by_hand():
    config = TrainConfig(tokens=1000, lr=2.0, decay=0.5, sparsity=4.0, sparsity_warmup=0.1)
    assert [config.lr_at(t) for t in (0, 500, 750, 1000)] == [2.0, 2.0, 1.0, 0.0]
    assert [config.sparsity_at(t) for t in (0, 50, 100, 900)] == [0.0, 2.0, 4.0, 4.0]
    assert TrainConfig(tokens=1000, lr=2.0, decay=0).lr_at(1000) == 2.0


def test_same_seed_same_weights():
    a, b = (train(SparseAutoencoder(D, N, TopK(3), seed=4), batches(), CONFIG).sae for _ in range(2))
    assert torch.equal(a.W_dec, b.W_dec) and torch.equal(a.W_enc, b.W_enc)


@pytest.mark.parametrize("x, sentence", [
    ([], "nothing to train on"),
    ([torch.zeros(4, D + 1)], "match d_model"),
    ([torch.full((4, D), float("nan"))], "NaN or infinite"),
    ([torch.rand(4, D)], "batches ended after 4 of"),
])  # fmt: skip
def test_unusable_batches_are_refused(x, sentence):
    with pytest.raises(ValueError, match=sentence):
        train(SparseAutoencoder(D, N, TopK(3)), x, CONFIG)
