"""Run the suite's notebooks top to bottom, each in a fresh process, with a limit on its time.

They run side by side, in reading order, as many as there are cores and memory; each has its share of the cores, one on
most machines. A second thread takes little off a notebook's time, a second notebook half. What two of them need, a
harvest or an autoencoder, one makes (`storage.alone`), so the numbers are those of a run in turn with as many threads.

papermill sets the parameters and runs the cells, in a kernel of this very interpreter whatever else Jupyter would find
by name. Around it: parameters that a notebook does not know, or of another type, are refused before anything starts;
a notebook that outlives its time, or is interrupted, ends with all that it started; and the executed copy is written
in one step whatever happens, with the hashes of the code that ran.
"""

import ast
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import joblib
import nbformat
import psutil
import torch
from nbformat import NotebookNode
from tqdm import tqdm

from helpers.base.storage import ROOT, results_dir, write_atomic
from helpers.notebook.run import SCALES, SEEDS, SUBJECTS
from helpers.suite.store import KERNEL, hashes, own_cells, unfinished_cell

NOTEBOOKS = ROOT / "notebooks"
LIMIT_MINUTES = {"smoke": 30, "laptop": 120, "paper": 72 * 60}  # for one notebook; many times its budget
PARAMETERS = {"scale": "laptop", "subject": "embedded", "seed": 0}  # in every notebook, with these defaults
CHOICES = {"scale": SCALES, "subject": SUBJECTS, "seed": SEEDS}
INTERRUPTED = "KeyboardInterrupt: interrupted"
MEMORY_GB = {"smoke": 2, "laptop": 4}  # that the largest notebook needs
THREADS = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}


@dataclass(frozen=True)
class Outcome:
    """What became of one notebook. `error` is empty if every cell ran; `cell` is where it stopped, counted from 1."""

    path: Path
    minutes: float
    error: str = ""
    cell: int = 0
    source: str = ""  # the first line of that cell

    def __str__(self) -> str:
        where = f", cell {self.cell} `{self.source}`" if self.cell else ""
        return f"✘ {name_of(self.path)}{where}: {self.error}" if self.error else f"✔ {name_of(self.path)}"


def find(only: str = "", solutions: bool = False) -> list[Path]:
    """The notebooks in reading order, then their solutions if asked for.

    only: numbers to choose, as in "01 02". Raises ValueError if there is no such notebook.
    """
    paths = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
    paths += sorted(NOTEBOOKS.glob("solutions/[0-9]*.ipynb")) if solutions else []
    numbers = {number_of(path) for path in paths}
    chosen = {number.zfill(2) for number in only.replace(",", " ").split()} or numbers
    if unknown := sorted(chosen - numbers):
        there = ", ".join(sorted(numbers)) or "none"
        raise ValueError(f"there is no notebook {', '.join(unknown)}; choose from {there}.")
    return [path for path in paths if number_of(path) in chosen]


def number_of(path: Path) -> str:
    """The two digits that a notebook's name starts with; its results file is named by them."""
    return path.name[:2]


def name_of(path: Path) -> str:
    """The notebook's name for people and for its executed copy: `02_relu_against_topk`, `solutions/02_...`."""
    return f"solutions/{path.stem}" if path.parent.name == "solutions" else path.stem


def folder_of(parameters: dict) -> str:
    """Folder name of a run, in out/ and in the results: `embedded-laptop`."""
    return f"{parameters['subject']}-{parameters['scale']}"


def executed_copy(path: Path, parameters: dict, out: Path) -> Path:
    """Where the executed copy of a notebook lies."""
    return out / folder_of(parameters) / f"{name_of(path)}.ipynb"


def run(paths: list[Path], parameters: dict, out: Path, limit_minutes: float | None = None) -> list[Outcome]:
    """Run notebooks side by side; executed copies go to out/<subject>-<scale>/, outcomes come in the order of `paths`.

    Raises ValueError, before anything is run, for a parameter that is unknown or has a wrong value. An interruption
    (Ctrl-C, SIGTERM or SIGHUP) leaves what was finished, and copies of what was under way, and ends the list early.
    """
    for path in paths:
        refuse_wrong_parameters(path, parameters)
    limit_minutes = LIMIT_MINUTES[parameters["scale"]] if limit_minutes is None else limit_minutes
    if not 0 < limit_minutes < math.inf:
        raise ValueError(f"the limit of a notebook is {limit_minutes} minutes; give a positive number of them.")
    n_lanes, stop = max(1, min(lanes(parameters["scale"]), len(paths))), threading.Event()
    environment = share_of_cores(n_lanes)
    with _signals_interrupt(), tqdm(total=len(paths), unit="notebook", ncols=80) as bar:

        def in_lane(path: Path) -> Outcome | None:
            if stop.is_set():
                return None
            bar.write(f"▶ {name_of(path)}")
            target = executed_copy(path, parameters, out)
            return execute(path, parameters, target, 60 * limit_minutes, environment, stop)

        with ThreadPoolExecutor(n_lanes) as pool:
            futures = [pool.submit(in_lane, path) for path in paths]
            try:
                for future in as_completed(futures):
                    outcome = future.result()
                    bar.write(f"{outcome} · {outcome.minutes:.1f} min{_spent_on(outcome, parameters)}")
                    bar.update()
            except KeyboardInterrupt:
                pass
            finally:
                stop.set()
    return [outcome for future in futures if (outcome := future.result())]


def _spent_on(outcome: Outcome, parameters: dict) -> str:
    """Where a notebook's minutes went, as its results say: " (set-up 0.2, training 1.1, ...)"."""
    file = results_dir() / folder_of(parameters) / f"{number_of(outcome.path)}.json"
    if outcome.error or outcome.path.parent.name == "solutions" or not file.exists():
        return ""
    parts = json.loads(file.read_text(encoding="utf-8")).get("minutes_spent_on", {})
    return f" ({', '.join(f'{kind} {minutes:.1f}' for kind, minutes in parts.items() if minutes >= 0.05)})"


def lanes(scale: str) -> int:
    """How many notebooks to run at a time: one for each core, or for as many threads as the user has set, and as many
    as memory holds; one where there is an accelerator, and at paper scale, which fills a machine."""
    if scale not in MEMORY_GB or torch.cuda.is_available():
        return 1
    threads = torch.get_num_threads() if THREADS & os.environ.keys() else 1
    fitting = int(psutil.virtual_memory().available / 2**30 / MEMORY_GB[scale])
    return max(1, min(joblib.cpu_count() // threads, fitting))


def share_of_cores(n_lanes: int) -> dict[str, str]:
    """The environment of a notebook beside others, as many threads and processes as are its own; alone it has all."""
    share = str(max(1, joblib.cpu_count() // n_lanes))
    return (
        {}
        if n_lanes == 1
        else {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", share), "LOKY_MAX_CPU_COUNT": share}
    )


def summary(outcomes: list[Outcome], paths: list[Path], minutes: float) -> str:
    """How many ran in how many minutes, and a line for each that did not: notebook, cell, error."""
    failures = [outcome for outcome in outcomes if outcome.error]
    lines = [f"{len(outcomes) - len(failures)} of {len(paths)} notebooks ran to the end, in {minutes:.1f} minutes."]
    lines += map(str, failures)
    if failures:
        lines += ["Below, the claims of such a notebook are those it reached, or those of an earlier run."]
    return "\n".join(lines)


def refuse_wrong_parameters(path: Path, parameters: dict) -> None:
    """Raise ValueError unless the notebook has one parameters cell with the suite's names, and each of `parameters` is
    one of its names, of its default's type, and one of the values that exist."""
    defaults = defaults_of(path)
    if missing := PARAMETERS.keys() - defaults.keys():
        raise ValueError(f"the parameters cell of {path.name} lacks {', '.join(sorted(missing))}; add it.")
    if unknown := parameters.keys() - defaults.keys():
        known = ", ".join(sorted(defaults))
        raise ValueError(f"{path.name} has no parameter {', '.join(sorted(unknown))}; its parameters are {known}.")
    for name, value in parameters.items():
        wanted = type(defaults[name])
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise ValueError(
                f"{name} is {value!r}; {path.name} expects a {wanted.__name__}, such as {defaults[name]!r}."
            )
        if value not in CHOICES.get(name, [value]):
            known = f"one from 0 to {SEEDS[-1]}" if name == "seed" else " or ".join(CHOICES[name])
            raise ValueError(f"{name} {value!r} is unknown; choose {known}.")


def defaults_of(path: Path) -> dict:
    """Names and default values of a notebook's parameters. Raises ValueError unless one cell is tagged so, and holds
    nothing but `name = literal`."""
    tagged = parameter_cells(nbformat.read(path, as_version=4))
    if len(tagged) != 1:
        raise ValueError(
            f"{path.name} has {len(tagged)} cells tagged `parameters`, not one; tag its first code cell, the one with "
            f"{', '.join(PARAMETERS)}."
        )
    try:
        statements = ast.parse(tagged[0].source).body
        return {each.targets[0].id: ast.literal_eval(each.value) for each in statements}
    except (SyntaxError, AttributeError, ValueError) as error:
        raise ValueError(f"the parameters cell of {path.name} should hold only `name = literal` ({error}).") from error


def parameter_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The cells tagged `parameters`; there should be one."""
    return [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]


def execute(
    path: Path,
    parameters: dict,
    target: Path,
    limit_s: float,
    environment: dict[str, str] | None = None,
    stop: threading.Event | None = None,
) -> Outcome:
    """Run the notebook `path` with `parameters` and write the executed copy to `target`, also if a cell fails.

    limit_s: seconds after which it is ended; stop: ends it when set. environment: variables beside this process's own.
    Raises ValueError for parameters that the notebook does not have.
    """
    refuse_wrong_parameters(path, parameters)
    begun = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            copy = Path(folder, "copy.ipynb")
            error = _papermill(path, parameters, copy, limit_s, environment or {}, stop or threading.Event())
            minutes = (time.monotonic() - begun) / 60
            return _read_outcome(path, parameters, copy, target, minutes, error)
    except OSError as error:  # a full disk, a folder that cannot be written to
        return Outcome(path, (time.monotonic() - begun) / 60, f"OSError: {error.strerror}")


def _papermill(
    path: Path, parameters: dict, copy: Path, limit_s: float, environment: dict[str, str], stop: threading.Event
) -> str:
    """Run it in a process of its own; what went wrong around the cells, or ""."""
    kernel = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], **KERNEL["kernelspec"]}
    write_atomic(copy.parent / "kernels" / "suite" / "kernel.json", json.dumps(kernel))
    files = [str(file).replace("{", "{{").replace("}", "}}") for file in (path, copy)]  # papermill formats them
    how = {"kernel_name": "suite", "cwd": str(ROOT), "progress_bar": False}
    arguments = {"input_path": files[0], "output_path": files[1], "parameters": parameters, **how}
    command = [sys.executable, "-m", "helpers.suite.worker", json.dumps(arguments)]
    own = {f"JUPYTER_{name}": str(copy.parent) for name in ("PATH", "CONFIG_DIR", "RUNTIME_DIR")}
    own |= {"IPYTHONDIR": str(copy.parent), "TQDM_DISABLE": "1"}  # bars say nothing afterwards
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | environment | own,
        **pipes,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    try:
        said = _errors_of(process, limit_s, stop).strip()
        return said.splitlines()[-1] if process.returncode and said else ""
    except subprocess.TimeoutExpired:
        return f"TimeoutError: stopped after {limit_s / 60:.3g} minutes, its limit; raise it with --limit"
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        _end(process)


def _errors_of(process: subprocess.Popen, limit_s: float, stop: threading.Event) -> str:
    """What it wrote to stderr until its end. Raises TimeoutExpired after `limit_s`, KeyboardInterrupt once `stop` is
    set: a signal reaches the main thread alone."""
    end = time.monotonic() + limit_s
    while True:
        try:
            return process.communicate(timeout=min(0.2, max(0, end - time.monotonic())))[1]
        except subprocess.TimeoutExpired:
            if stop.is_set():
                raise KeyboardInterrupt from None
            if time.monotonic() >= end:
                raise


def _end(process: subprocess.Popen) -> None:
    """Kill a process and all that it started, its kernel and the kernel's workers."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.communicate()  # waits, and closes its pipe


def _read_outcome(path: Path, parameters: dict, copy: Path, target: Path, minutes: float, error: str) -> Outcome:
    """What the copy tells of the run; it is stored at `target` with the hashes of its code."""
    if not copy.exists():
        return Outcome(path, minutes, error or "the kernel did not start")
    run = nbformat.read(copy, as_version=4)
    stopped = _last_started(run) if "DeadKernelError" in error else unfinished_cell(run)
    facts = parameters | ({"stopped_in": stopped} if stopped else {})
    run.metadata["suite"] = hashes(run) | facts  # of what ran, not of the file by now
    write_atomic(target, nbformat.writes(run) + "\n")
    if not stopped:
        return Outcome(path, minutes)
    cell = own_cells(run.cells)[stopped - 1]
    raised = [f"{output.ename}: {output.evalue}" for output in cell.outputs if output.output_type == "error"]
    if "DeadKernelError" in error:
        error = "DeadKernelError: the kernel died; too little memory is the usual reason"
    elif not error.startswith(("TimeoutError", "KeyboardInterrupt")):
        error = (raised or ["SystemExit: the notebook ended itself before its last cell"])[0]
    return Outcome(path, minutes, error, stopped, cell.source.strip().partition("\n")[0])


def _last_started(run: NotebookNode) -> int:
    """Number of the cell in which a kernel died, which papermill calls completed."""
    started = [bool(cell.metadata.get("papermill", {}).get("start_time")) for cell in own_cells(run.cells)]
    return max(number for number, each in enumerate(started, start=1) if each)


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM, as a CI's cancel or a queue sends it, and SIGHUP of a closed terminal end a run as Ctrl-C does.

    A signal that is ignored, as `nohup` does with SIGHUP, stays so.
    """
    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # no SIGHUP on Windows
    before = {number: signal.getsignal(number) for number in signals}
    heard = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in heard:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in heard.items():
            signal.signal(number, handler)
