"""Run one notebook top to bottom in a fresh kernel, with a limit on its time, and say what became of it.

papermill sets the parameters and runs the cells. Around it: parameters that the notebook does not know are refused
before anything starts (papermill only warns), a kernel that outlives its time is killed, and the executed copy is
written in one step whatever happens, with the hash of the source that ran.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nbformat
import papermill
from nbformat import NotebookNode
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from helpers.base.storage import ROOT, write_atomic
from helpers.suite.lint import PARAMETERS, parameter_cells
from helpers.suite.store import own_cells, source_hash, unfinished_cell

Progress = Callable[[int, int], None]  # called before each cell: its number from 1, how many there are


@dataclass(frozen=True)
class Outcome:
    """What became of one notebook. `error` is empty if every cell ran; `cell` is where it stopped, counted from 1."""

    path: Path
    minutes: float
    error: str = ""
    cell: int = 0
    source: str = ""  # the first line of that cell


def refuse_unknown_parameters(path: Path, parameters: dict) -> None:
    """Raise ValueError unless the notebook has one parameters cell with the suite's names and all of `parameters`."""
    tagged = parameter_cells(nbformat.read(path, as_version=4))
    if len(tagged) != 1:
        raise ValueError(
            f"{path.name} has {len(tagged)} cells tagged `parameters`, not one; tag its first code cell, the one with "
            f"{', '.join(PARAMETERS)}."
        )
    known = papermill.inspect_notebook(str(path)).keys()
    if missing := PARAMETERS.keys() - known:
        raise ValueError(f"the parameters cell of {path.name} lacks {', '.join(sorted(missing))}; add it.")
    if unknown := parameters.keys() - known:
        raise ValueError(
            f"{path.name} has no parameter {', '.join(sorted(unknown))}; its parameters are {', '.join(sorted(known))}."
        )


def execute(path: Path, parameters: dict, target: Path, limit_s: float, progress: Progress | None = None) -> Outcome:
    """Run the notebook `path` with `parameters` and write the executed copy to `target`, also if a cell fails.

    limit_s: seconds after which the kernel is killed. Raises ValueError for parameters the notebook does not have.
    """
    refuse_unknown_parameters(path, parameters)
    watch = Watch(limit_s, progress)
    error = ""
    finished = False
    try:
        papermill.execute_notebook(
            str(path), None, parameters, "watched", kernel_name="python3", progress_bar=False, cwd=ROOT, watch=watch
        )
        finished = True
    except Exception as problem:
        error = watch.explain(problem)
    finally:
        watch.stop()
        _write_copy(watch, parameters | ({} if finished else {"stopped_in": watch.number}), target)
    return watch.outcome(path, error)


def _write_copy(watch: "Watch", facts: dict, target: Path) -> None:
    if watch.client is not None:
        run = watch.client.nb
        run.metadata["suite"] = {"source_hash": source_hash(run), **facts}  # of what ran, not of the file by now
        write_atomic(target, nbformat.writes(run) + "\n")


class Watch:
    """Follows the run of one notebook: which cell it is in, since when, and whether its time is over."""

    def __init__(self, limit_s: float, progress: Progress | None):
        self.limit_s, self.progress = limit_s, progress
        self.begun = time.monotonic()
        self.client: PapermillNotebookClient | None = None
        self.number, self.source = 0, ""  # of the cell that runs
        self.expired = False
        self.timer = threading.Timer(limit_s, self._kill)
        self.timer.daemon = True

    def kernel_ready(self, notebook: NotebookNode) -> None:
        self.timer.start()

    def cell_starts(self, cell: NotebookNode, cell_index: int) -> None:
        cells = self.client.nb.cells
        self.source = cell.source.strip().partition("\n")[0]
        self.number = len(own_cells(cells[: cell_index + 1]))  # as a reader counts them: without the injected one
        if self.progress:
            self.progress(self.number, len(own_cells(cells)))

    def stop(self) -> None:
        self.timer.cancel()

    def explain(self, problem: Exception) -> str:
        """The error in one line, by name and message."""
        if self.expired:
            return f"TimeoutError: stopped after {self.limit_s / 60:.3g} minutes, its limit; raise it with --limit"
        if isinstance(problem, PapermillExecutionError):
            return f"{problem.ename}: {problem.evalue}"
        if type(problem).__name__ == "DeadKernelError":
            return "DeadKernelError: the kernel died; too little memory is the usual reason"
        return f"{type(problem).__name__}: {problem}"

    def outcome(self, path: Path, error: str) -> Outcome:
        minutes = (time.monotonic() - self.begun) / 60
        if not error and unfinished_cell(self.client.nb):
            error = "SystemExit: the notebook ended itself before its last cell"
        return Outcome(path, minutes, error, self.number, self.source) if error else Outcome(path, minutes)

    def _kill(self) -> None:
        self.expired = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.client.km.provisioner.pgid, signal.SIGKILL)  # the kernel and what it started


class WatchedEngine(NBClientEngine):
    """papermill's own engine, with a Watch that is told when the kernel is ready and when a cell starts."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, watch: Watch, start_timeout: int = 60, **_) -> None:
        watch.client = PapermillNotebookClient(
            nb_man,
            kernel_name=kernel_name,
            startup_timeout=start_timeout,
            extra_arguments=["--log-level=CRITICAL"],  # what goes wrong in a cell comes back as a message
            on_notebook_start=watch.kernel_ready,
            on_cell_start=watch.cell_starts,
        )
        watch.client.execute()


papermill_engines.register("watched", WatchedEngine)
