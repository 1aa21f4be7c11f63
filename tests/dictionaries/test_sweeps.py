"""Sweeps: every cell is trained as if it were alone, is trained once, and methods are compared at the same L0."""

import dataclasses
import functools
import math
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import joblib
import killed
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from distributed import Client, LocalCluster
from killed import STEPS, Killing, noted
from twins import CountingSubject

from helpers.activations.injected import InjectedPair
from helpers.activations.stream import ActivationStream, Harvest
from helpers.activations.views import ViewedStream
from helpers.base import products
from helpers.base.storage import ROOT
from helpers.dictionaries import sweeps
from helpers.dictionaries.dead_latents import AuxK, Remedy, Resample
from helpers.dictionaries.designated import DeltaCell
from helpers.dictionaries.quality import evaluate
from helpers.dictionaries.sweeps import Cell, CrosscoderCell, grid, matched_ratios, sweep
from helpers.dictionaries.training import Training, train

HELDOUT = torch.randn(256, 8, generator=torch.Generator().manual_seed(1))
FIRST = Cell("TopK", 16, 2)
CELLS = [FIRST, Cell("ReLU", 16, 0.1, seed=1), Cell("BatchTopK", 24, 3, remedy=Remedy())]


def batches(tokens, batch_size=64):
    random = torch.Generator().manual_seed(0)
    return torch.randn(tokens, 8, generator=random).split(batch_size)


batches.fingerprint = "normal numbers"
batches.batch_size = 64


@pytest.fixture
def trained(monkeypatch):
    """The cells that are trained in this test, as (method, n_latents)."""
    seen = []

    def watched(sae, *args, **options):
        seen.append((type(sae.activation).__name__, sae.n_latents))
        return train(sae, *args, **options, save_every_minutes=0)

    monkeypatch.setattr(sweeps, "train", watched)
    return seen


def same(one, other):
    """Whether two sweeps gave the same, but for the time they took."""
    pd.testing.assert_frame_equal(one.frame.drop(columns="minutes"), other.frame.drop(columns="minutes"))
    pd.testing.assert_frame_equal(one.curves, other.curves)
    assert list(one.saes) == list(other.saes)
    for cell, sae in one.saes.items():
        weights = other.saes[cell].state_dict()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in sae.state_dict().items())
    return True


def files(folder):
    return sorted(path.suffix for path in folder.iterdir()) if folder.is_dir() else []


# --- cells


def test_grid_has_a_cell_for_each_combination():
    cells = grid(method=["TopK"], n_latents=[16, 32], sparsity=[2], seed=range(3))
    assert len(set(cells)) == 6 and Cell("TopK", 32, 2, 1) in cells


def test_a_cell_in_a_sweep_is_the_cell_alone(trained):
    cells = [FIRST, CELLS[1], FIRST, dataclasses.replace(FIRST, unit_norm=False)]
    frame, curves, saes = sweep(cells, batches, HELDOUT, tokens=1024)
    assert len(frame) == len(saes) == len(trained) == 3  # the repeated cell is trained once
    for cell, row in zip(saes, frame.itertuples(), strict=True):
        alone = train(cell.build(8), batches(1024), cell.config(1024))
        assert torch.equal(alone.sae.W_dec, saes[cell].W_dec)
        assert row.nmse == evaluate(alone.sae, HELDOUT).nmse and row.method == cell.method
        own = curves[(curves.method == cell.method) & (curves.unit_norm == cell.unit_norm)]
        assert own[["tokens", "loss", "nmse", "l0", "dead"]].to_dict("records") == alone.record["curve"]
        assert row.loss == own.loss[own.tokens > 0.9 * 1024].mean() and math.isfinite(row.loss)


def test_a_cell_may_have_its_own_tokens_and_batch_size_on_the_same_stream():
    cells = [FIRST, dataclasses.replace(FIRST, tokens=512), dataclasses.replace(FIRST, batch_size=128)]
    frame, curves, saes = sweep(cells, batches, HELDOUT, tokens=1024)
    assert frame.tokens.tolist() == [1024, 512, 1024] and frame.batch_size.tolist() == [64, 64, 128]
    assert curves.groupby(["budget", "batch_size"]).tokens.max().to_dict() == {(512, 64): 512} | {
        (1024, size): 1024 for size in (64, 128)
    }
    for cell, sizes in zip(cells, [(1024, 64), (512, 64), (1024, 128)], strict=True):
        alone = train(cell.build(8), batches(*sizes), cell.config(sizes[0])).sae
        assert torch.equal(alone.W_dec, saes[cell].W_dec)


def test_every_field_reaches_the_training():
    changed = Cell("TopK", 16, 2, lr=0.1, tokens=7, unit_norm=False, encoder_scale=0.5, remedy=Resample(), ema=0.9)
    config = dataclasses.replace(changed, decay=0.0, dead_after=0.5).config(10)
    found = (config.tokens, config.lr, config.unit_norm, config.encoder_scale, config.remedy, config.ema)
    assert found == (7, 0.1, False, 0.5, Resample(), 0.9) and (config.decay, config.dead_after) == (0.0, 0.5)
    untied = dataclasses.replace(FIRST, tied_init=False).build(8)
    assert not torch.equal(untied.W_enc, untied.W_dec) and torch.equal(FIRST.build(8).W_enc, FIRST.build(8).W_dec)
    assert not torch.equal(dataclasses.replace(FIRST, seed=1).build(8).W_dec, FIRST.build(8).W_dec)


def test_price_goes_to_the_penalty_and_k_does_not():
    assert Cell("ReLU", 16, 0.3).config(10).sparsity == 0.3
    assert Cell("BatchTopK", 16, 3).config(10).sparsity == 0
    assert Cell("BatchTopK", 16, 3).build(8).activation.k == 3


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match="no method 'TopKK'; choose one of"):
        Cell("TopKK", 16, 2).build(8)


def test_a_remedy_is_named_with_what_is_not_its_default():
    remedies = [Remedy(), AuxK(), AuxK(k=4, detach=False)]
    frame = sweep(grid(method=["TopK"], n_latents=[16], sparsity=[2], remedy=remedies), batches, HELDOUT, 128).frame
    assert frame.remedy.tolist() == ["none", "AuxK", "AuxK(k=4, detach=False)"]


# --- a sweep on disk


def test_finished_cells_are_not_trained_again(tmp_path, trained):
    in_memory = sweep(CELLS, batches, HELDOUT, 1024)
    stored = sweep(CELLS, batches, HELDOUT, 1024, tmp_path)
    assert len(trained) == 6 and files(tmp_path) == [".safetensors"] * 3
    again = sweep(CELLS, batches, HELDOUT, 1024, tmp_path)
    assert len(trained) == 6
    assert same(in_memory, stored) and same(stored, again) and again.frame.minutes.equals(stored.frame.minutes)
    wider = sweep([Cell("TopK", 32, 2), *CELLS[1:]], batches, HELDOUT, 1024, tmp_path)
    assert trained[6:] == [("TopK", 32)] and wider.frame.n_latents.tolist() == [32, 16, 24]


def test_a_cell_that_another_process_trains_comes_last_and_is_not_trained_twice(tmp_path, trained):
    begun = threading.Event()

    def slow(*amounts):
        begun.set()
        while len(trained) < 2:
            time.sleep(0.01)
        return batches(*amounts)

    slow.fingerprint, slow.batch_size = batches.fingerprint, batches.batch_size
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(sweep, CELLS[:1], slow, HELDOUT, 1024, tmp_path)
        assert begun.wait(30)
        found = sweep(CELLS, batches, HELDOUT, 1024, tmp_path)
    assert trained == [("ReLU", 16), ("BatchTopK", 24), ("TopK", 16)]
    assert same(found, sweep(CELLS, batches, HELDOUT, 1024)) and files(tmp_path) == [".safetensors"] * 3
    assert other.result().frame.minutes[0] == found.frame.minutes[0]


def pairs(tokens, batch_size=64):
    random = torch.Generator().manual_seed(0)
    return torch.randn(tokens, 2, 8, generator=random).split(batch_size)


pairs.fingerprint = "pairs of normal numbers"


def test_crosscoders_are_swept_like_autoencoders(tmp_path, trained):
    heldout = torch.randn(256, 2, 8, generator=torch.Generator().manual_seed(1))
    cells = [CrosscoderCell("BatchTopK", 16, 2, init_norm=0.5), CrosscoderCell("ReLU", 16, 0.05, size="joint")]
    cells += [dataclasses.replace(cells[1], squared=True), dataclasses.replace(cells[0], decoupled=True)]
    first = sweep(cells, pairs, heldout, 1024, tmp_path)
    assert len(trained) == 4 and same(first, sweep(cells, pairs, heldout, 1024, tmp_path)) and len(trained) == 4
    saes = list(first.saes.values())
    assert [sae.switches["init_norm"] for sae in saes] == [0.5, 1.0, 1.0, 0.5]
    assert [(sae.size, sae.squared) for sae in saes] == [
        ("sum", False),
        ("joint", False),
        ("joint", True),
        ("sum", False),
    ]
    assert first.frame["size"].tolist() == ["sum", "joint", "joint", "sum"]
    assert [type(sae).__name__ for sae in saes] == 3 * ["Crosscoder"] + ["DecoupledCrosscoder"]
    assert first.frame.nmse.tolist() == [evaluate(sae, heldout).nmse for sae in saes]
    with pytest.raises(ValueError, match="there is no method 'Jump'"):
        CrosscoderCell("Jump", 16, 2).build(8)


def test_a_crosscoder_with_two_kinds_of_latents_is_loaded_as_it_was(tmp_path, trained):
    heldout = torch.randn(256, 2, 8, generator=torch.Generator().manual_seed(1))
    cells = [DeltaCell("BatchTopK", 16, 3, delta=4, k_delta=1, weight=weight) for weight in (1.0, 2.0)]
    first = sweep(cells, pairs, heldout, 1024, tmp_path)
    again = sweep(cells, pairs, heldout, 1024, tmp_path)
    assert len(trained) == 2 and same(first, again)
    for here, there in zip(first.saes.values(), again.saes.values(), strict=True):
        assert torch.equal(here.encode(heldout), there.encode(heldout)) and there.activation_delta.threshold > 0


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError])
def test_an_interrupted_sweep_goes_on_and_ends_the_same(tmp_path, trained, monkeypatch, interruption):
    whole = sweep(CELLS, batches, HELDOUT, 1024)
    calls, steps = [], []

    def interrupted(tokens):
        calls.append(tokens)
        yield from batches(tokens)[: 10 if len(calls) == 2 else None]
        if len(calls) == 2:
            raise interruption

    interrupted.fingerprint, interrupted.batch_size = batches.fingerprint, batches.batch_size
    with pytest.raises(interruption) as caught:
        sweep(CELLS, interrupted, HELDOUT, 1024, tmp_path, n_jobs=1)
    assert files(tmp_path) == [".checkpoint", ".safetensors"]
    assert interruption is KeyboardInterrupt or caught.value.__notes__ == [f"This was in {CELLS[1]}."]
    step = Training.step
    monkeypatch.setattr(Training, "step", lambda *args: (steps.append(1), step(*args)))
    del trained[:]
    assert same(sweep(CELLS, batches, HELDOUT, 1024, tmp_path, n_jobs=1), whole)
    assert [method for method, _ in trained] == ["ReLU", "BatchTopK"] and len(steps) == 6 + 16
    assert files(tmp_path) == [".safetensors"] * 3


CHANGES = {field.name: value for field, value in zip(
    dataclasses.fields(Cell),
    ["BatchTopK", 17, 3, 1, 1e-3, 900, 32, False, False, 0.5, AuxK(k=3), 0.9, 0.0, 0.5],
    strict=True,
)}  # fmt: skip


def names(folder, cell=FIRST, batches=batches, tokens=1024):
    sweep([cell], batches, HELDOUT, tokens, folder)
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("field", CHANGES)
def test_each_field_makes_another_key(tmp_path, field):
    changed = dataclasses.replace(FIRST, **{field: CHANGES[field]})
    assert len(names(tmp_path) | names(tmp_path, changed)) == 2


def test_products_in_other_bits_make_another_key(tmp_path, monkeypatch):
    found = set()
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(products, "compute_dtype", lambda x, dtype=dtype: dtype)
        found |= names(tmp_path)
    assert len(found) == 2


def test_tokens_and_stream_make_another_key_and_the_way_of_saying_it_does_not(tmp_path):
    def other(*sizes):
        return batches(*sizes)

    other.fingerprint, other.batch_size = "other numbers", 64
    assert len(names(tmp_path)) == 1
    assert len(names(tmp_path, tokens=512)) == 2
    assert len(names(tmp_path, batches=other)) == 3
    spelled = Cell("TopK", np.int64(16), np.int64(2), seed=np.int64(0), tokens=np.int64(1024), batch_size=64)
    assert len(names(tmp_path, spelled, tokens=1)) == 3


def test_a_stream_that_cannot_be_told_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must know its stream again: pass `ActivationStream.batches`, or set"):
        sweep([FIRST], lambda tokens: batches(tokens), HELDOUT, 64, tmp_path)


def test_a_file_that_cannot_be_used_stops_the_sweep_before_it_trains(tmp_path, trained):
    sweep(CELLS[2:], batches, HELDOUT, 64, tmp_path)
    broken = next(tmp_path.iterdir())
    broken.write_bytes(broken.read_bytes()[:-1])
    with pytest.raises(ValueError, match=broken.name):
        sweep(CELLS, batches, HELDOUT, 64, tmp_path)
    assert len(trained) == 1 and broken.exists()


# --- workers


def subject_stream(folder, monkeypatch, **options):
    monkeypatch.setenv("SUITE_CACHE", str(folder / "cache"))
    tokens = torch.arange(1600)
    return ActivationStream(CountingSubject(), tokens, Harvest(context=8), 64, **{"cache": True, **options})


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def processes(one_thread):
    """Cells go to new processes by default, however small they are."""
    with joblib.parallel_config(backend="loky"):
        yield
    joblib.externals.loky.get_reusable_executor().shutdown()


def test_processes_give_what_one_gives_from_one_harvest(tmp_path, monkeypatch, processes):
    stream = subject_stream(tmp_path, monkeypatch)
    heldout = stream.take(200)
    cells = [Cell("TopK", 16, 2, seed=seed) for seed in range(3)]
    apart = sweep(cells, stream.batches, heldout, 1024, tmp_path / "cells", n_jobs=2)
    assert len(files(tmp_path / "cells")) == 3
    assert same(apart, sweep(cells, stream.batches, heldout, 1024, n_jobs=1))
    assert stream.subject.rows_read == 200  # once, here
    planted = InjectedPair(stream, seed=1)
    for pairs in (planted, ViewedStream(planted, "difference")):  # which plant again what was planted here
        x = torch.cat(list(pairs.batches(256)))
        kind = CrosscoderCell if pairs is planted else Cell
        cells = [kind("TopK", 8 * n, 2) for n in (1, 2)]
        assert same(*(sweep(cells, pairs.batches, x, 1024, n_jobs=n) for n in (2, 1)))


@pytest.fixture
def spread_out(monkeypatch):
    """How many cells were trained at a time, in threads; a second is enough to start them."""
    seen = []
    monkeypatch.setattr(sweeps, "START_SECONDS", 1)
    monkeypatch.setattr(sweeps.psutil, "virtual_memory", lambda: SimpleNamespace(available=16 * 2**30))
    monkeypatch.setattr(sweeps, "_side_by_side", lambda jobs, n: (seen.append(n), map(sweeps._Job.run, jobs))[1])
    with joblib.parallel_config(backend="threading"):
        yield seen


@pytest.mark.parametrize(("seconds", "n_cores", "n_cells", "expected"), [
    (0.9, 2, 3, [2]), (0.6, 2, 3, []), (0.6, 3, 3, [3]), (9, 1, 3, []), (9, 8, 3, [3]), (9, 8, 1, []),
])  # fmt: skip
def test_processes_are_started_where_that_saves_time(spread_out, monkeypatch, seconds, n_cores, n_cells, expected):
    """Cells of `seconds` each: on n cores 1/n of their sum is left."""
    monkeypatch.setattr(sweeps._Job, "seconds", lambda job: seconds)
    monkeypatch.setattr(joblib, "effective_n_jobs", lambda n: n_cores if n == -1 else n)
    sweep([Cell("TopK", 16, 2, seed=seed) for seed in range(n_cells)], batches, HELDOUT, 128)
    assert spread_out == expected


@pytest.mark.parametrize(("free_gb", "expected"), [(16, [8]), (2.9, [2]), (1.9, []), (0.1, [])])
def test_no_more_processes_are_started_than_free_memory_holds(spread_out, monkeypatch, free_gb, expected):
    monkeypatch.setattr(sweeps._Job, "seconds", lambda job: 100.0)
    monkeypatch.setattr(joblib, "effective_n_jobs", lambda n: 8 if n == -1 else n)
    monkeypatch.setattr(sweeps.psutil, "virtual_memory", lambda: SimpleNamespace(available=free_gb * 2**30))
    sweep([Cell("TopK", 16, 2, seed=seed) for seed in range(8)], batches, HELDOUT, 128)
    assert spread_out == expected


def test_the_first_steps_say_how_long_a_cell_takes(monkeypatch):
    """Steps of 5, 1 and 2 seconds on 64 of 640 tokens: at 1 second each it is 10."""
    job = sweeps._Job(FIRST, batches, HELDOUT, 640, None)
    took = iter([5.0, 1.0, 2.0])
    monkeypatch.setattr("timeit.timeit", lambda step, number: (step(), next(took))[1])
    assert job.seconds() == 10


def test_a_stream_that_only_this_process_has_is_swept_here(tmp_path, monkeypatch, spread_out):
    monkeypatch.setattr(sweeps._Job, "seconds", lambda job: 100.0)
    for cache, expected in ((False, []), (True, [2])):
        stream = subject_stream(tmp_path, monkeypatch, cache=cache)
        sweep(CELLS[:2], stream.batches, stream.take(64), 128)
        assert spread_out == expected


def test_workers_that_are_asked_for_need_activations_on_disk(tmp_path, monkeypatch):
    stream = subject_stream(tmp_path, monkeypatch, cache=False)
    with pytest.raises(ValueError, match="make the ActivationStream with cache=True"):
        sweep(CELLS[:2], stream.batches, stream.take(64), 128, n_jobs=2)


def test_the_longest_cells_are_trained_first_and_reported_where_they_stand(monkeypatch, trained, one_thread):
    cells = [Cell("TopK", 16, 2), Cell("TopK", 24, 2), Cell("TopK", 16, 2, tokens=2048), Cell("TopK", 8, 2)]
    with joblib.parallel_config(backend="threading"):
        frame = sweep(cells, batches, HELDOUT, 1024, n_jobs=2).frame
    assert frame.n_latents.tolist() == [16, 24, 16, 8] and {trained[-1][1]} == {8}


def test_workers_share_the_threads(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    with joblib.parallel_config(backend="threading"):
        sweep(CELLS, batches, HELDOUT, 128, n_jobs=2)
        sweep(CELLS[:2], batches, HELDOUT, 128, n_jobs=8)
    assert seen == [3, 3, 3, 3, 3]


def test_a_failing_cell_is_named_and_what_other_workers_finished_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # these workers share it with all tests

    def short(tokens):
        yield from batches(min(tokens, 1024))
        ends = time.monotonic() + 30
        while tokens > 1024 and files(tmp_path).count(".safetensors") < 2 and time.monotonic() < ends:
            time.sleep(0.01)  # the longest cell starts first and is to fail last

    short.fingerprint = "short"
    cells = [*CELLS[:2], dataclasses.replace(FIRST, tokens=4096)]
    with joblib.parallel_config(backend="threading"), pytest.raises(ValueError, match="ended after") as caught:
        sweep(cells, short, HELDOUT, 1024, tmp_path, n_jobs=2)
    assert files(tmp_path).count(".safetensors") == 2
    assert any("tokens=4096" in note for note in caught.value.__notes__)


def test_one_job_stays_in_this_process_and_shows_the_bar(monkeypatch, capsys):
    monkeypatch.setattr(joblib, "Parallel", functools.partial(pytest.fail, "processes were asked for"))
    sweep(CELLS, batches, HELDOUT, 128)  # much too short for others
    sweep(CELLS[:1], batches, HELDOUT, 128, n_jobs=2)
    sweep(CELLS, batches, HELDOUT, 128, n_jobs=1)
    assert "3 of 3 cells: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_the_bar_counts_cells_and_tokens_without_those_of_earlier_runs_in_its_speed(
    tmp_path, monkeypatch, capsys, n_jobs
):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    bars, close = [], sweeps.tqdm.close
    monkeypatch.setattr(
        sweeps.tqdm,
        "close",
        lambda bar: (bars.append((bar.initial, bar.n, bar.desc) if not bar.disable else None), close(bar)),
    )
    with joblib.parallel_config(backend="threading"):
        for cells in (CELLS[:1], [*CELLS, dataclasses.replace(FIRST, tokens=640)]):
            sweep(cells, batches, HELDOUT, 1024, tmp_path, n_jobs=n_jobs)
    assert (0, 1024, "1 of 1 cells: ") in bars and (1024, 3 * 1024 + 640, "4 of 4 cells: ") in bars


# --- processes that are killed, disks that are full: they cost at most the cells under way


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """In this process, with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Killing(tmp_path_factory.mktemp("undisturbed")).sweep(n_jobs=1)
    torch.set_num_threads(before)


def test_a_dask_cluster_gives_what_one_process_gives(tmp_path, undisturbed):
    two = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None, "local_directory": tmp_path / "dask"}
    with LocalCluster(**two) as cluster, Client(cluster), joblib.parallel_config(backend="dask"):
        found = Killing(tmp_path).sweep(n_jobs=-1)
    assert same(found, undisturbed) and len(set(noted(tmp_path, "step"))) == 2


@pytest.mark.usefixtures("processes")
def test_a_process_that_is_killed_is_replaced_and_its_cell_goes_on(tmp_path, undisturbed):
    found = Killing(tmp_path, victim=1024, times=1).sweep()
    assert same(found, undisturbed) and len(noted(tmp_path, "killed")) == 1
    assert STEPS - 1 <= len(noted(tmp_path, "step")) <= STEPS  # all but one of the other process, killed unnoted


@pytest.mark.usefixtures("processes")
def test_a_cell_whose_process_is_killed_again_is_named_and_the_finished_ones_are_kept(tmp_path, undisturbed):
    with pytest.raises(
        RuntimeError, match=r"the process that trained Cell\(.*tokens=1024.* was killed twice, .*n_jobs"
    ):
        Killing(tmp_path, victim=1024, times=2).sweep()
    assert len(noted(tmp_path, "killed")) == 2 and ".safetensors" in files(tmp_path / "cells")
    assert len(noted(tmp_path, "step")) <= STEPS - 1024 // 64 + 5  # the second time it went on where it was killed
    assert same(Killing(tmp_path).sweep(), undisturbed)


def test_what_trained_for_a_sweep_that_was_killed_ends_too_and_the_next_one_goes_on(tmp_path, undisturbed):
    path = f"{ROOT}:{Path(killed.__file__).parent}"
    environment = {"PATH": "", "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    parent = subprocess.Popen([sys.executable, "-m", "killed", str(tmp_path)], env=environment, cwd=ROOT)
    while len(noted(tmp_path, "step")) < 6 or len(set(noted(tmp_path, "step"))) < 2:
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    trainers = [psutil.Process(pid) for pid in set(noted(tmp_path, "step")) if psutil.pid_exists(pid)]
    gone, alive = psutil.wait_procs(trainers, timeout=3)
    assert not alive
    assert ".checkpoint" in files(tmp_path / "cells")
    with joblib.parallel_config(backend="threading"):
        assert same(Killing(tmp_path).sweep(n_jobs=1), undisturbed)


@pytest.fixture
def small_disk():
    """No file of more than 4 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) is signal.SIG_IGN  # as Python does: an error instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_sentence_and_leaves_what_was_finished(tmp_path, undisturbed, small_disk):
    small, large = Cell("TopK", 8, 2), Cell("TopK", 512, 2)
    with pytest.raises(OSError, match=r"could not write .*TopK-512-.*; nothing was changed"):
        sweep([small, large], batches, HELDOUT, 256, tmp_path, n_jobs=1)
    assert [path.name[:6] for path in tmp_path.iterdir()] == ["TopK-8"]


# --- comparing


def frontier(method, seed, factor):
    return pd.DataFrame({"method": method, "seed": seed, "l0": [4.0, 64.0], "nmse": [factor / 4, factor / 64]})


def test_ratio_at_matched_l0_by_hand():
    frame = pd.concat([frontier(m, s, f) for m, s, f in [("A", 0, 3), ("B", 0, 2), ("A", 1, 5), ("B", 1, 1)]])
    ratios = matched_ratios(frame, "A", "B", at=[8, 16])
    assert ratios.to_dict() == {0: pytest.approx(1.5), 1: pytest.approx(5.0)}


def test_no_l0_in_common_is_said_and_levels_outside_do_not_count():
    shifted = frontier("B", 0, 2).assign(l0=[32.0, 640.0])
    frame = pd.concat([frontier("A", 0, 2), shifted])
    with pytest.warns(UserWarning, match="L0 32.0 to 64.0 only"):
        assert matched_ratios(frame, "A", "B", at=[8, 16]).isna().all()
    assert matched_ratios(frame, "A", "B", at=[8, 32])[0] == pytest.approx((2 / 32) / (2 / 4))
