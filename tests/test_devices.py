"""Whatever reads activations follows their device, and gives there what it gives on the processor."""

import types

import pandas as pd
import pytest
import torch
from pretend_gpu import DEVICE, device, run_notebook
from twins import CountingSubject

from helpers.activations.injected import InjectedPair, Plan
from helpers.activations.stream import ActivationStream, Harvest
from helpers.base import products
from helpers.dictionaries import sweeps
from helpers.dictionaries.autoencoders import BatchTopK, Gated, JumpReLU, MultiTopK, ReLU, SparseAutoencoder, TopK
from helpers.dictionaries.crosscoders import Crosscoder, DecoupledCrosscoder
from helpers.dictionaries.dead_latents import AuxK, GhostGrads, Remedy, Resample
from helpers.dictionaries.designated import DeltaCrosscoder
from helpers.dictionaries.quality import evaluate, recovery, refine
from helpers.dictionaries.sweeps import Cell, CrosscoderCell, sweep
from helpers.dictionaries.training import TrainConfig, train
from helpers.diffing.latent_scaling import latent_table, sae_table
from helpers.diffing.recovery import planted_of
from helpers.suite.run import find

D, N = 12, 24


@pytest.fixture(autouse=True)
def in_full_precision(monkeypatch):
    monkeypatch.setattr(products, "compute_dtype", lambda t: t.dtype)
    monkeypatch.setattr(products, "has_fast_bf16", lambda device: False)


def activations(n=512, width=D):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(0)) + 0.5


def on_both(make):
    """What `make` gives on the processor and on the device, both as tensors in memory."""
    here = make(torch.device("cpu"))
    with device() as there:
        found = make(there)
        return here, [each.cpu() for each in found]


MAKES = {
    "ReLU": lambda: SparseAutoencoder(D, N, ReLU()),
    "Gated": lambda: SparseAutoencoder(D, N, Gated(N)),
    "JumpReLU": lambda: SparseAutoencoder(D, N, JumpReLU(N)),
    "TopK": lambda: SparseAutoencoder(D, N, TopK(3)),
    "MultiTopK": lambda: SparseAutoencoder(D, N, MultiTopK(3)),
    "BatchTopK": lambda: SparseAutoencoder(D, N, BatchTopK(3)),
    "crosscoder": lambda: Crosscoder(D // 2, N, ReLU()),
    "BatchTopK crosscoder": lambda: Crosscoder(D // 2, N, BatchTopK(3)),
    "decoupled crosscoder": lambda: DecoupledCrosscoder(D // 2, N, BatchTopK(3)),
    "delta crosscoder": lambda: DeltaCrosscoder(D // 2, N, BatchTopK(2), delta=8, k_delta=1, weight=2.0),
}


@pytest.mark.parametrize("remedy", [AuxK(), GhostGrads(), Resample(), Remedy()], ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_training_gives_the_same_weights_there(make, remedy):
    config = TrainConfig(512, lr=5e-3, sparsity=0.1, remedy=remedy, dead_after=0.1, ema=0.5)

    def weights(place):
        sae = make()  # where it is made does not matter
        x = activations().to(place)
        x = x.unflatten(1, (2, -1)) if isinstance(sae, Crosscoder) else x
        sae = train(sae, x.split(64), config).sae
        assert all(p.device.type == place.type for p in [*sae.parameters(), *sae.buffers()])
        assert evaluate(sae, x).density.device.type == place.type
        return [p.detach() for p in sae.parameters()]

    for here, there in zip(*on_both(weights), strict=True):
        torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("cell", [Cell("TopK", N, 3), CrosscoderCell("BatchTopK", N, 3)], ids=lambda each: each.method)
def test_a_sweep_trains_stores_and_loads_there(cell, tmp_path, monkeypatch):
    width = 2 * D if isinstance(cell, CrosscoderCell) else D
    x = activations(width=width)

    def batches(tokens):
        return (x.unflatten(1, (2, -1)) if width > D else x).to(DEVICE).split(64)

    batches.fingerprint = "noise"
    with device():
        heldout = batches(0)[0]
        trained = sweep([cell], batches, heldout, 512, tmp_path)
        monkeypatch.setattr(sweeps, "train", lambda *_, **__: pytest.fail("it was trained again"))
        loaded = sweep([cell], batches, heldout, 512, tmp_path)
        for found in (trained, loaded):
            assert found.saes[cell].encode(heldout).device == DEVICE
    assert trained.frame.equals(loaded.frame)


def stream(place, **options):
    subject = CountingSubject()
    subject.device = place
    subject.residuals = lambda tokens: CountingSubject.residuals(subject, tokens).to(place)
    return ActivationStream(subject, torch.arange(320), Harvest(context=8), batch_size=32, seed=1, **options)


@pytest.mark.parametrize("cache", [False, True])
def test_a_stream_gives_batches_there(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("SUITE_CACHE", str(tmp_path))
    here, there = on_both(lambda place: list(stream(place, cache=cache).batches(64)))
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_measures_of_dictionaries_leave_the_device_as_tables():
    x = activations(width=D)
    with device() as there:
        sae = SparseAutoencoder(D, N, TopK(3)).to(there)
        table = recovery(sae, x.to(there), [1, 2, 4])
        refined = refine(sae, x.to(there), 5).after.cpu()
        pairs, crosscoder = x.unflatten(1, (2, -1)).to(there), Crosscoder(D // 2, N, ReLU()).to(there)
        tables = [
            latent_table(crosscoder, pairs),
            sae_table(SparseAutoencoder(D // 2, N, ReLU()).to(there), "chat", pairs),
        ]
    sae = SparseAutoencoder(D, N, TopK(3))
    assert table.equals(recovery(sae, x, [1, 2, 4]))
    torch.testing.assert_close(refined, refine(sae, x, 5).after)
    assert [len(each) for each in tables] == [N, N]
    pd.testing.assert_frame_equal(tables[0], latent_table(Crosscoder(D // 2, N, ReLU()), pairs.cpu()), rtol=1e-4)


def test_what_is_planted_is_planted_there():
    x = activations(n=4096)

    def planted(place):
        background = types.SimpleNamespace(
            take=lambda n: x[:n].to(place),
            batches=lambda *_: x.to(place).split(512),
            batch_size=512,
            n_activations=4096,
        )
        pair = InjectedPair(background, Plan(each=2, rotation=0.1))
        (batch, truth), *_ = pair.with_truth(512)
        rows = planted_of(Crosscoder(D, 48, ReLU()).to(place), pair)
        return [batch, truth.base, truth.chat, torch.tensor(rows.match.tolist())]

    for here, there in zip(*on_both(planted), strict=True):
        torch.testing.assert_close(there, here)


def test_the_device_refuses_what_a_gpu_refuses():
    with device() as there:
        x = torch.ones(3, device=there)
        for mixed in (
            lambda: x + torch.ones(3),
            lambda: torch.cat([x, torch.ones(1)]),
            x.numpy,
            lambda: x[:1] @ x.cpu()[:1],
        ):
            with pytest.raises(RuntimeError):
                mixed()
        assert (x * torch.tensor(2.0)).tolist() == [2, 2, 2] and x[torch.tensor([0, 2])].sum().item() == 2


@pytest.mark.parametrize(("number", "subject"), [("05", "model"), ("11", "pair")])
def test_a_notebook_runs_there(number, subject, tmp_path, monkeypatch, results_folder):
    """One of the autoencoders, one of the pair; all others on request, in tests/benchmarks."""
    monkeypatch.setenv("SUITE_CACHE", str(tmp_path))
    (path,) = find(number)
    assert run_notebook(path)[subject].device == DEVICE
    assert (results_folder / "embedded-smoke" / f"{number}.json").is_file()
