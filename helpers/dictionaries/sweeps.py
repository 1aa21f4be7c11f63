"""Many autoencoders on one stream of activations, and how to compare them fairly.

A cell is one autoencoder. With a folder, a sweep keeps what it has finished and goes on where it was interrupted. Cells
are trained side by side, by default in as many processes of this machine as it has cores, or where joblib has workers:

    with distributed.Client(address), joblib.parallel_config(backend="dask"):  # all see the folder and SUITE_CACHE
        sweep(cells, stream.batches, heldout, tokens, folder, n_jobs=-1)

A second thread makes one small training little faster, and many times slower beside another busy process; a second cell
does not wait for the first.

Two methods are compared at matched L0: each method's NMSE is interpolated along its own frontier, and the ratio of two
NMSEs is averaged (geometrically) over the L0 values that both have reached. One number per seed; seeds give intervals.
"""

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
import threading
import time
import timeit
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import joblib
import pandas as pd
import psutil
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError
from torch import Tensor, nn
from tqdm import tqdm

from helpers.base import products
from helpers.base.checks import spread
from helpers.base.clock import spent_on
from helpers.base.storage import alone
from helpers.dictionaries.autoencoders import BatchTopK, Gated, JumpReLU, MultiTopK, ReLU, SparseAutoencoder, TopK
from helpers.dictionaries.crosscoders import Crosscoder, DecoupledCrosscoder
from helpers.dictionaries.dead_latents import AuxK, Remedy
from helpers.dictionaries.quality import at_matched_l0
from helpers.dictionaries.sweep_store import Finished, StoredCell, measure
from helpers.dictionaries.training import TrainConfig, Training, train

ACTIVATIONS: dict[str, Callable[[int, float], nn.Module]] = {  # of n_latents and sparsity
    "ReLU": lambda n, sparsity: ReLU(),
    "Gated": lambda n, sparsity: Gated(n),
    "JumpReLU": lambda n, sparsity: JumpReLU(n),
    "TopK": lambda n, k: TopK(int(k)),
    "MultiTopK": lambda n, k: MultiTopK(int(k)),
    "BatchTopK": lambda n, k: BatchTopK(int(k)),
}
START_SECONDS = 4  # that new processes need to import torch
PROCESS_GB = 1  # of memory that one of them may take, torch with it
Count = Callable[[int], object]  # is told how many tokens were read since the last time
Batches = Callable[..., Iterable[Tensor]]  # batches(tokens), or batches(tokens, batch_size): the same each time


@dataclasses.dataclass(frozen=True)
class Cell:
    """One autoencoder of a sweep. `sparsity` is k for the TopK family, the price of a latent for the others."""

    method: str
    n_latents: int
    sparsity: float
    seed: int = 0
    lr: float = 3e-3
    tokens: int | None = None  # the sweep's by default
    batch_size: int | None = None  # the stream's by default
    unit_norm: bool = True
    tied_init: bool = True
    encoder_scale: float = 1.0
    remedy: Remedy = AuxK()
    ema: float = 0.0
    decay: float = 0.2
    dead_after: float = 0.05

    def build(self, d_model: int) -> SparseAutoencoder:
        """Raises ValueError for a method that does not exist."""
        return SparseAutoencoder(d_model, int(self.n_latents), self.activation(), int(self.seed), self.tied_init)

    def activation(self) -> nn.Module:
        if self.method not in ACTIVATIONS:
            raise ValueError(f"there is no method {self.method!r}; choose one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[self.method](self.n_latents, self.sparsity)

    def switches(self) -> dict:
        """What else its weights depend on, in JSON's types."""
        return {}

    def config(self, tokens: int) -> TrainConfig:
        """How it is trained, for `tokens` if the cell has no number of its own."""
        price = 0.0 if self.method.endswith("TopK") else float(self.sparsity)
        names = ("unit_norm", "encoder_scale", "remedy", "ema", "decay", "dead_after")
        same = {name: getattr(self, name) for name in names}
        return TrainConfig(int(self.tokens or tokens), lr=float(self.lr), sparsity=price, **same)


@dataclasses.dataclass(frozen=True)
class CrosscoderCell(Cell):
    """One crosscoder of a sweep; batches are (batch, 2, d_model) or (batch, 2 d_model), heldout (n, 2, d_model)."""

    init_norm: float = 1.0
    size: str = "sum"
    squared: bool = False
    decoupled: bool = False
    bridge: float = 0.0

    def build(self, d_model: int) -> Crosscoder:
        return self.of_kind(DecoupledCrosscoder if self.decoupled else Crosscoder, d_model, self.activation())

    def of_kind(self, kind: type[Crosscoder], d_model: int, activation: nn.Module) -> Crosscoder:
        """A crosscoder of a kind, with the settings of this cell."""
        switches = {name: value for name, value in self.switches().items() if name != "decoupled"}  # that is a kind
        return kind(d_model, int(self.n_latents), activation, int(self.seed), **switches)

    def switches(self) -> dict:
        usual = {name: getattr(self, name) for name in ("init_norm", "size", "squared", "decoupled")}
        return usual | ({"bridge": float(self.bridge)} if self.bridge else {})  # without one, files keep their names


class Sweep(NamedTuple):
    """What `sweep` returns."""

    frame: pd.DataFrame  # a row for each cell: its fields, nmse, l0, l0_sd, dead, minutes, loss over the last tenth
    curves: pd.DataFrame  # about 50 rows for each: its fields, `budget` its tokens; tokens read, loss, nmse, l0, dead
    saes: dict[Cell, SparseAutoencoder]


def grid(**choices: Iterable) -> list[Cell]:
    """A cell for each combination: grid(method=["TopK"], n_latents=[512], sparsity=[16, 32], seed=range(3))."""
    return [Cell(**dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values())]


@spent_on("training")
def sweep(
    cells: Sequence[Cell],
    batches: Batches,
    heldout: Tensor,
    tokens: int,
    directory: Path | None = None,
    n_jobs: int | None = None,
) -> Sweep:
    """Train every cell for `tokens` as if it were alone; measure it on `heldout` (n, d_model).

    `batches` is `ActivationStream.batches`, or any callable like it. With a `directory`, cells that are finished there
    are loaded, one that was interrupted goes on, and `batches` must tell what it depends on: it, or the object whose
    method it is, has a string `fingerprint`. `n_jobs` cells are trained at a time, by joblib, in processes that read
    a stream with cache=True. By default they are as many as joblib counts cores (LOKY_MAX_CPU_COUNT lowers it) and free
    memory holds; one, in this process, for a stream without a cache, on an accelerator, and where starting processes
    would take longer.

    Raises ValueError for no cells, for a file in `directory` that is broken or another's, and for `heldout` that is not
    finite or has no variance, before anything is trained.
    """
    if not cells:
        raise ValueError("there is no cell to train: pass one or more")
    spread(heldout, "held-out activations")
    todo = [
        _Job(cell, batches, heldout, tokens, stored_cell(cell, batches, heldout, tokens, directory)) for cell in cells
    ]
    todo = list({job.cell: job for job in todo}.values())
    done = {job.cell: found for job in todo if (found := job.load())}
    left = [job for job in todo if job.cell not in done]
    at_once = _worth_starting(left) if n_jobs is None else joblib.effective_n_jobs(n_jobs)
    with tqdm(total=sum(job.n_tokens for job in todo), unit=" tokens", unit_scale=True) as bar:
        bar.initial = bar.n = bar.total - sum(job.n_tokens for job in left)  # which is no speed of this run
        bar.set_description(f"{len(done)} of {len(todo)} cells")
        for cell, finished in _side_by_side(left, at_once) if min(at_once, len(left)) > 1 else _in_turn(left, bar):
            done[cell] = finished
            bar.update(sum(job.n_tokens for job in todo if job.cell in done) - bar.n)
            bar.set_description(f"{len(done)} of {len(todo)} cells")
    return _collected({job.cell: done[job.cell] for job in todo}, batches, tokens)


@dataclasses.dataclass(frozen=True)
class _Job:
    """All that a worker needs to train one cell."""

    cell: Cell
    batches: Batches
    heldout: Tensor
    tokens: int
    stored: StoredCell | None

    def load(self) -> Finished | None:
        sae = self.cell.build(self.heldout.shape[-1]).to(self.heldout.device)
        return self.stored and self.stored.load(sae, self.heldout)

    @property
    def n_tokens(self) -> int:
        return self.cell.tokens or self.tokens

    def size(self) -> int:
        """What its time grows with."""
        return self.cell.n_latents * self.n_tokens

    def read(self, count: Count = lambda n: None) -> Iterator[Tensor]:
        size = [] if self.cell.batch_size is None else [self.cell.batch_size]
        return _counted(self.batches(self.n_tokens, *size), count)

    def seconds(self) -> float:
        """About how long its training takes here, by the fastest of its first steps."""
        batches = [x.flatten(1) for x in itertools.islice(self.read(), 3)]
        training = Training(self.cell.build(self.heldout.shape[-1]), self.cell.config(self.tokens), batches[0])
        steps = [timeit.timeit(functools.partial(training.step, x), number=1) for x in batches]
        return min(steps) * training.config.tokens / len(batches[0])

    def elsewhere(self) -> "_Job":
        """The same for other processes. Raises ValueError for a stream that is not on disk."""
        owner = _owner(self.batches)
        return dataclasses.replace(self, batches=owner.reader().batches) if hasattr(owner, "reader") else self

    def run(self, count: Count = lambda n: None, wait: bool = True) -> tuple[Cell, Finished] | None:
        """Train it, unless another process has by now; None where another is at it and this one is not to `wait`."""
        with alone(self.stored.path, wait) if self.stored else contextlib.nullcontext(True) as ours:
            return (self.cell, self.load() or self._trained(count)) if ours else None

    def _trained(self, count: Count) -> Finished:
        cell = self.cell
        try:
            sae, config = cell.build(self.heldout.shape[-1]), cell.config(self.tokens)
            sae, record = train(sae, self.read(count), config, checkpoint=self.stored and self.stored.checkpoint)
        except Exception as error:
            error.add_note(f"This was in {cell}.")
            raise
        finished = Finished(sae, record, measure(sae, self.heldout))
        _give_memory_back()
        if self.stored:
            self.stored.save(finished, self.heldout)
        return finished


def _give_memory_back() -> None:
    """glibc keeps what varying code sizes have freed: gigabytes over a sweep. Other allocators have no such call."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _counted(batches: Iterable[Tensor], count: Count) -> Iterator[Tensor]:
    for x in batches:
        count(len(x))
        yield x


def _worth_starting(jobs: list[_Job]) -> int:
    """As many processes as cores and memory allow where that saves more time than starting them takes, else one."""
    fitting = int(psutil.virtual_memory().available / 2**30 / PROCESS_GB)
    n = min(joblib.effective_n_jobs(-1), len(jobs), fitting)
    if n < 2 or jobs[0].heldout.device.type != "cpu":
        return 1
    try:
        longest = max(jobs, key=_Job.size).elsewhere()
    except ValueError:
        return 1
    in_turn = longest.seconds() * sum(job.size() for job in jobs) / longest.size()
    return n if in_turn * (1 - 1 / n) > START_SECONDS else 1


def _in_turn(jobs: list[_Job], bar: tqdm) -> Iterator[tuple[Cell, Finished]]:
    """Those that another process is at come last."""
    elsewhere = []
    for job in jobs:
        if found := job.run(bar.update, wait=False):
            yield found
        else:
            elsewhere.append(job)
    yield from map(_Job.run, elsewhere)


def _side_by_side(jobs: list[_Job], n_jobs: int) -> Iterator[tuple[Cell, Finished]]:
    """As they are finished, the longest first. Each process gets its share of this one's threads.

    When a process is killed, joblib ends all of them and does not say whose it was. So each cell that was under way is
    tried again by itself; raises RuntimeError for one whose process is killed again.
    """
    threads = max(1, torch.get_num_threads() // min(n_jobs, len(jobs)))
    waiting = {job.cell: job.elsewhere() for job in sorted(jobs, key=_Job.size, reverse=True)}
    suspects = []
    while waiting:
        begun = []  # joblib takes a cell only when a process is free
        tasks = (
            begun.append(cell) or joblib.delayed(_work)(waiting[cell], threads) for cell in suspects[:1] or [*waiting]
        )
        parallel = joblib.Parallel(n_jobs, batch_size=1, pre_dispatch=n_jobs, return_as="generator_unordered")
        try:
            for cell, finished in parallel(tasks):
                del waiting[cell]
                yield cell, finished
            suspects = suspects[1:]
        except TerminatedWorkerError as error:
            if suspects:
                raise RuntimeError(
                    f"the process that trained {suspects[0]} was killed twice, usually for want of memory: train fewer "
                    "cells at a time (n_jobs), or a smaller one; what a sweep with a directory has finished is kept"
                ) from error
            suspects = [cell for cell in begun if cell in waiting]


def _work(job: _Job, threads: int) -> tuple[Cell, Finished]:
    _end_with_parent()
    torch.set_num_threads(threads)
    return job.run()


@functools.cache
def _end_with_parent() -> None:
    """A process that was started to train cells does not go on when the one that started it is killed."""
    if multiprocessing.parent_process():  # None where backends use threads
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _owner(batches: Batches) -> object:
    """The stream whose method it is, or the callable itself."""
    return getattr(batches, "__self__", batches)


def _batch_size(cell: Cell, batches: Batches) -> int | None:
    return getattr(_owner(batches), "batch_size", None) if cell.batch_size is None else int(cell.batch_size)


def stored_cell(
    cell: Cell, batches: Batches, heldout: Tensor, tokens: int, directory: Path | None
) -> StoredCell | None:
    if directory is None:
        return None
    stream = getattr(_owner(batches), "fingerprint", None)
    if not isinstance(stream, str):
        raise ValueError(
            "a sweep with a directory must know its stream again: pass `ActivationStream.batches`, or set "
            "`batches.fingerprint` to a string that names all that the batches depend on"
        )
    own = {"method": cell.method, "n_latents": int(cell.n_latents), "sparsity": float(cell.sparsity)}
    start = {"seed": int(cell.seed), "tied_init": cell.tied_init} | cell.switches()
    read = {"stream": stream, "batch_size": _batch_size(cell, batches), "config": cell.config(tokens).described()}
    read |= {"products": str(products.compute_dtype(heldout))}  # in 16 bits where the processor has them
    return StoredCell(Path(directory), f"{cell.method}-{cell.n_latents}", own | start | read)


def _collected(done: dict[Cell, Finished], batches: Batches, tokens: int) -> Sweep:
    rows, curves = [], []
    for cell, (_, record, quality) in done.items():
        fields = {field.name: getattr(cell, field.name) for field in dataclasses.fields(cell)}
        fields |= {"tokens": cell.tokens or tokens, "batch_size": _batch_size(cell, batches)}
        fields["remedy"] = _described(cell.remedy)
        late = [row["loss"] for row in record["curve"] if row["tokens"] > 0.9 * fields["tokens"]]
        rows.append(fields | quality | {"loss": sum(late) / len(late), "minutes": record["minutes"]})
        curves += [fields | {"budget": fields["tokens"]} | row for row in record["curve"]]
    return Sweep(pd.DataFrame(rows), pd.DataFrame(curves), {cell: finished.sae for cell, finished in done.items()})


def _described(remedy: Remedy) -> str:
    """Its name, and what is not the default: "AuxK", "AuxK(k=16)", "none"."""
    fields = ((f.name, getattr(remedy, f.name), f.default) for f in dataclasses.fields(remedy))
    changed = ", ".join(f"{name}={value}" for name, value, default in fields if value != default)
    name = "none" if type(remedy) is Remedy else type(remedy).__name__
    return f"{name}({changed})" if changed else name


def matched_ratios(
    frame: pd.DataFrame, numerator: str, denominator: str, at: Sequence[float], by: Sequence[str] = ("seed",)
) -> pd.Series:
    """NMSE of one method over another's at matched L0: a geometric mean over `at`, one value for each value of `by`.

    Only the L0 values that both methods reached count; a group without one is nan, and a warning says what was reached.
    """
    return frame.groupby(list(by)).apply(_geometric_ratio, numerator, denominator, at, include_groups=False)


def _geometric_ratio(frame: pd.DataFrame, numerator: str, denominator: str, at: Sequence[float]) -> float:
    a, b = (frame[frame.method == method] for method in (numerator, denominator))
    low, high = max(a.l0.min(), b.l0.min()), min(a.l0.max(), b.l0.max())
    inside = [value for value in at if low <= value <= high]
    if not inside:
        warnings.warn(
            f"{numerator} and {denominator} share L0 {low:.1f} to {high:.1f} only, which holds none of {list(at)}; "
            "widen the sweep of either",
            stacklevel=2,
        )
        return math.nan
    logs = [math.log(at_matched_l0(a.l0, a.nmse, v) / at_matched_l0(b.l0, b.nmse, v)) for v in inside]
    return math.exp(sum(logs) / len(logs))
