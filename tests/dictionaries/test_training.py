"""The training step: what is dead, what AuxK may touch, what stays on the unit sphere, what is averaged."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import time

import pytest
import torch

from helpers.base import products
from helpers.base.storage import load_state
from helpers.dictionaries import training
from helpers.dictionaries.autoencoders import BatchTopK, Gated, JumpReLU, MultiTopK, ReLU, SparseAutoencoder, TopK
from helpers.dictionaries.dead_latents import Remedy, Resample
from helpers.dictionaries.quality import evaluate
from helpers.dictionaries.training import TrainConfig, train

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
    "MultiTopK": (lambda: MultiTopK(3), 0.0),
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
    assert record["config"] == json.loads(json.dumps(config.described())) and record["architecture"] == name


def test_batchtopk_l0_by_threshold_is_k():
    sae = train(SparseAutoencoder(D, N, BatchTopK(3)), batches(), CONFIG).sae
    assert evaluate(sae, sparse_data(4096, seed=1)).l0 == pytest.approx(3, rel=0.05)


def watch(monkeypatch, seen):
    """Append seen(sae) after each update."""
    found, plain = [], training.Adam.step

    def watched(optimizer, lr):
        plain(optimizer, lr)
        found.append(seen(optimizer.sae).detach().clone())

    monkeypatch.setattr(training.Adam, "step", watched)
    return found


def test_norms_are_one_after_every_step(monkeypatch):
    norms = watch(monkeypatch, lambda sae: sae.W_dec.norm(dim=1))
    train(SparseAutoencoder(D, N, TopK(3)), batches(), CONFIG)
    assert len(norms) == CONFIG.tokens // 256
    torch.testing.assert_close(torch.stack(norms), torch.ones(len(norms), N), atol=1e-5, rtol=0)


def test_unit_norm_can_be_switched_off():
    config = dataclasses.replace(CONFIG, unit_norm=False)
    sae = train(SparseAutoencoder(D, N, TopK(3)), batches(), config).sae
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() > 1e-3


def test_encoder_scale_sets_the_start():
    x = batches()[0]
    one, four = (SparseAutoencoder(D, N, TopK(3)) for _ in range(2))
    one.start_from(x)
    training.Training(four, dataclasses.replace(CONFIG, encoder_scale=4.0), x)
    torch.testing.assert_close(four.W_enc, 4 * one.W_enc)


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


def test_ema_is_the_bias_corrected_mean_of_the_weights(monkeypatch):
    history = watch(monkeypatch, lambda sae: sae.b_enc)
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
    training._reconstruct_densely(sae, x).other_error.backward()
    assert sae.W_dec.grad is None and sae.W_enc.grad.abs().sum() > 0
    with torch.no_grad():
        expected = (x - sae.pre_acts(x).relu() @ sae.W_dec - sae.b_dec).square().sum(1).mean()
    assert training._reconstruct_densely(sae, x).other_error.item() == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.parametrize(("k", "wider"), [(3, 12), (20, N)])
def test_multitopk_is_the_loss_at_k_and_an_eighth_of_that_at_4k(k, wider, monkeypatch):
    monkeypatch.setattr(products, "compute_dtype", lambda t: t.dtype)
    x, variance = sparse_data(64), torch.tensor(0.5)
    ours, twin = (SparseAutoencoder(D, N, MultiTopK(k)) for _ in range(2))
    training.forward(ours, x, variance, torch.zeros(N, dtype=torch.bool), CONFIG, 0.0).loss.backward()
    code = twin.pre_acts(x).relu()
    errors = [
        (x - twin.decode(code * (code >= code.topk(m).values[:, -1:]))).square().sum(1).mean() for m in (k, wider)
    ]
    ((errors[0] + errors[1] / 8) / variance).backward()
    for a, b in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_schedules_by_hand():
    config = TrainConfig(tokens=1000, lr=2.0, decay=0.5, sparsity=4.0, sparsity_warmup=0.1)
    assert [config.lr_at(t) for t in (0, 500, 750, 1000)] == [2.0, 2.0, 1.0, 0.0]
    assert [config.sparsity_at(t) for t in (0, 50, 100, 900)] == [0.0, 2.0, 4.0, 4.0]
    assert TrainConfig(tokens=1000, lr=2.0, decay=0).lr_at(1000) == 2.0


def test_a_row_of_the_curve_is_the_mean_since_the_row_before(monkeypatch):
    seen, plain = [], training.forward
    monkeypatch.setattr(training, "forward", lambda *a: (seen.append(plain(*a)), seen[-1])[1])
    curve = train(SparseAutoencoder(D, N, TopK(3)), batches(), CONFIG).record["curve"]
    first, second = (row["tokens"] // 256 for row in curve[1:3])
    for key in ("loss", "nmse", "l0"):
        values = [getattr(step, key).item() for step in seen[first:second]]
        assert curve[2][key] == pytest.approx(sum(values) / len(values), rel=1e-5) and second - first > 1


def test_remedy_is_paid_while_latents_are_dead():
    sae, x = SparseAutoencoder(D, N, TopK(3)), sparse_data(64)
    dead, variance, config = torch.zeros(N, dtype=torch.bool), x.var(0).sum(), TrainConfig(tokens=1)
    some = dead.clone().index_fill(0, torch.arange(9), True)
    nothing = training.forward(sae, x, variance, dead, config, 0.0)
    off = training.forward(sae, x, variance, some, dataclasses.replace(config, remedy=Remedy()), 0.0)
    on = training.forward(sae, x, variance, some, config, 0.0)
    assert nothing.loss == off.loss == nothing.nmse and on.loss > on.nmse


RESUMABLE = {
    "TopK, EMA": (lambda: TopK(3), dataclasses.replace(CONFIG, ema=0.9, dead_after=0.02)),
    "BatchTopK": (lambda: BatchTopK(3), dataclasses.replace(CONFIG, remedy=Resample())),
    "JumpReLU": (lambda: JumpReLU(N, 0.2, 0.2), dataclasses.replace(CONFIG, sparsity=0.03)),
}


@pytest.mark.parametrize("name", RESUMABLE)
def test_a_training_that_was_interrupted_ends_with_the_same_weights(name, tmp_path):
    activation, config = RESUMABLE[name]
    whole = train(SparseAutoencoder(D, N, activation()), batches(config), config)

    def power_cut():
        for i, x in enumerate(batches(config)):
            if i == 70:
                raise KeyboardInterrupt
            yield x

    options = {"checkpoint": tmp_path / "t.safetensors", "save_every_minutes": 0}
    with pytest.raises(KeyboardInterrupt):
        train(SparseAutoencoder(D, N, activation()), power_cut(), config, **options)
    resumed = train(SparseAutoencoder(D, N, activation()), batches(config), config, **options)
    for (key, a), b in zip(whole.sae.state_dict().items(), resumed.sae.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert [row["nmse"] for row in whole.record["curve"]] == [row["nmse"] for row in resumed.record["curve"]]


KILLED = """
import sys, pathlib, torch
sys.path[:0] = sys.argv[2:]
from test_training import CONFIG, D, N, SparseAutoencoder, TopK, batches, train
train(SparseAutoencoder(D, N, TopK(3)), batches(), CONFIG, checkpoint=pathlib.Path(sys.argv[1]), save_every_minutes=0)
"""


@pytest.mark.parametrize("patience", [0.0, 0.05, 0.2])
def test_a_training_that_was_killed_ends_with_the_same_weights(patience, tmp_path):
    """kill -9 some time after the first checkpoint, while others are being written."""
    path = tmp_path / "t.safetensors"
    places = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1])]
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path), *places])
    while not path.exists() and process.poll() is None:
        time.sleep(0.001)
    time.sleep(patience)
    process.kill()
    process.wait()
    assert 0 < load_state(path)[1]["tokens"]
    resumed = train(SparseAutoencoder(D, N, TopK(3)), batches(), CONFIG, checkpoint=path).sae
    whole = train(SparseAutoencoder(D, N, TopK(3)), batches(), CONFIG).sae
    assert torch.equal(resumed.W_dec, whole.W_dec) and torch.equal(resumed.W_enc, whole.W_enc)


def test_a_finished_checkpoint_trains_no_more(tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    first = train(SparseAutoencoder(D, N, TopK(3)), batches(), CONFIG, checkpoint=path)
    monkeypatch.setattr(training.Training, "step", None)
    again = train(SparseAutoencoder(D, N, TopK(3)), batches(), CONFIG, checkpoint=path)
    assert torch.equal(first.sae.W_dec, again.sae.W_dec) and first.record == again.record


def test_checkpoints_of_another_training_and_cut_short_are_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    train(SparseAutoencoder(D, N, TopK(3)), batches(), CONFIG, checkpoint=path)
    for sae, config in [
        (SparseAutoencoder(D, N, TopK(4)), CONFIG),
        (SparseAutoencoder(D, N, TopK(3)), dataclasses.replace(CONFIG, remedy=Remedy())),
    ]:
        with pytest.raises(ValueError, match="t.safetensors is of another training"):
            train(sae, batches(), config, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="t.safetensors is not a whole checkpoint"):
        train(SparseAutoencoder(D, N, TopK(3)), batches(), CONFIG, checkpoint=path)


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


def test_a_trained_autoencoder_has_plain_gradients_again():
    sae = train(SparseAutoencoder(D, N, TopK(3)), batches(), CONFIG).sae
    sae(sparse_data(8)).sum().backward()
    assert not hasattr(sae.W_dec, "pending") and not hasattr(sae.W_enc, "pending") and sae.W_dec.grad.any()


def test_latents_that_start_anew_are_not_dead(monkeypatch):
    monkeypatch.setattr(Resample, "renew", lambda *arguments: True)
    config = dataclasses.replace(CONFIG, remedy=Resample(), dead_after=1e-6)
    run = training.Training(SparseAutoencoder(D, N, TopK(3)), config, batches()[0])
    run.step(batches()[0])
    assert not run.dead.any()
