"""Where things live, and how they are written: aside first, then renamed, so that nothing is ever half a file.

A training's state is one safetensors file with named tensors and JSON metadata, never a pickle.
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import psutil
import safetensors.torch
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"
MODELS = DATA / "models"
RESULTS = DATA / "results"  # the committed reference results
OUT = ROOT / "out"  # what a run on this machine leaves behind, outside git
_open: set[Path] = set()  # files that this process is writing aside


def cache_dir() -> Path:
    """Folder for tokenised text and activations: $SUITE_CACHE, or one in the user's cache folder."""
    return _named_by("SUITE_CACHE") or (_named_by("XDG_CACHE_HOME") or Path.home() / ".cache") / "topk-to-crosscoders"


def results_dir() -> Path:
    """Folder for the results of this run: $SUITE_RESULTS, or out/results."""
    return _named_by("SUITE_RESULTS") or OUT / "results"


def _named_by(variable: str) -> Path | None:
    """The folder that an environment variable names, None where it is unset or empty.

    `~` and `$NAME` are expanded, as not every shell does. A relative one is below the repository, not below the folder
    of whoever asks: runner, notebooks and Jupyter would then have three.
    """
    value = os.environ.get(variable)
    return ROOT / Path(os.path.expandvars(value)).expanduser() if value else None


def write_atomic(path: Path, data: bytes | str) -> Path:
    """Write `data` to `path` in one step: a reader sees the old file or the whole new one."""
    with written_aside(path) as aside:
        aside.write_bytes(data.encode() if isinstance(data, str) else data)
    return Path(path)


@contextlib.contextmanager
def written_aside(path: Path, goes_on: bool = False) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it into place on success, remove it on any failure.

    With `goes_on` the file may begin with what an interrupted attempt wrote (`largest_leftover`), and an interruption
    leaves it for the next. Raises OSError with the target's name when the disk is full or not writable.
    """
    path = Path(path)
    prefix = f".{path.name}.{socket.gethostname()}.{os.getpid()}."
    with _failures_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=path.suffix, dir=path.parent)
    os.close(handle)
    aside = Path(name)
    _open.add(aside)
    if goes_on and (begun := largest_leftover(path)):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            begun.replace(aside)
    _sweep_leftovers(path)
    kept = False
    try:
        with _failures_named(path):
            yield aside
            aside.chmod(0o666 & ~_umask())  # mkstemp is private; a data file is not
            aside.replace(path)
    except (KeyboardInterrupt, SystemExit):
        kept = goes_on
        raise
    finally:
        _open.discard(aside)
        if not kept:
            aside.unlink(missing_ok=True)


@contextlib.contextmanager
def _failures_named(path: Path) -> Iterator[None]:
    """Errors of the disk with the file's name and what to do."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:  # safetensors has an error of its own for a full disk
        reason = getattr(error, "strerror", None) or error
        number = getattr(error, "errno", None) or errno.EIO
        remedy = "free space" if "space" in str(reason) else "choose a folder that can be written to"
        raise OSError(
            number, f"could not write {path} ({reason}); nothing was changed, {remedy} and run again"
        ) from error


@contextlib.contextmanager
def alone(path: Path, wait: bool = True) -> Iterator[bool]:
    """While it lasts, no other process of this machine makes `path`; what it made until then may be there now.

    Another waits, or with wait=False goes on at once; it is told whether it is alone. The lock ends with its process,
    however that ends. Raises OSError where nothing can be written.
    """
    name = cache_dir() / "locks" / hashlib.sha256(str(Path(path).absolute()).encode()).hexdigest()[:24]
    lock = filelock.FileLock(name)
    with _failures_named(name):
        name.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(filelock.Timeout):
            lock.acquire(blocking=wait)
    try:
        yield lock.is_locked
    finally:
        lock.release()


def largest_leftover(path: Path) -> Path | None:
    """The most that an interrupted attempt on this machine has written of `path`, or None."""
    return max(_leftovers(Path(path)), key=lambda left: left.stat().st_size, default=None)


def _leftovers(path: Path, name: str | None = None) -> list[Path]:
    """What attempts on this machine that are over left of `path`, or of every file beside it with the name "*"."""
    prefix = f".{name or glob.escape(path.name)}.{glob.escape(socket.gethostname())}."
    found = [(left, left.name.split(f".{socket.gethostname()}.")[-1]) for left in path.parent.glob(f"{prefix}*")]
    return [left for left, rest in found if left not in _open and not _runs(rest.partition(".")[0])]


def _runs(owner: str) -> bool:
    """Whether a process of this number may still write. This one knows what it writes itself."""
    return not owner.isdigit() or (int(owner) != os.getpid() and psutil.pid_exists(int(owner)))


def _sweep_leftovers(path: Path) -> None:
    """Remove what is left of earlier attempts to write `path`, and whatever else has lain beside it for a week."""
    own = _leftovers(path)
    for left in _leftovers(path, "*"):
        with contextlib.suppress(FileNotFoundError):  # it was renamed, or another process was faster
            if left in own or time.time() - left.stat().st_mtime > 7 * 86_400:
                left.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_state(path: Path, tensors: dict[str, Tensor], **metadata: Any) -> None:
    """Write tensors and JSON-able metadata to `path` in one step."""
    with written_aside(Path(path)) as aside:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(contiguous, aside, {k: json.dumps(v) for k, v in metadata.items()})


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata) of a file written by `save_state`. Raises ValueError naming a file that cannot be read."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return tensors, {k: json.loads(v) for k, v in (file.metadata() or {}).items()}
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole checkpoint ({error}); delete it and run again") from error


def training_tensors(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """A training's tensors: weights as `model.<name>`, states as `optimizer<i>.<parameter index>.<entry>`."""
    tensors = _weights(model)
    for i, optimizer in enumerate(optimizers):
        tensors |= optimizer_tensors(optimizer, f"optimizer{i}")
    return tensors


def restore_training(tensors: dict[str, Tensor], model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Put back what `training_tensors` took. Raises ValueError, and changes nothing, if `model` is another model."""
    weights = _weights(model)
    saved = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("model.")}
    if saved != {name: weight.shape for name, weight in weights.items()}:
        raise ValueError("the checkpoint is of another model; build the same one, or move the checkpoint away")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[name])
    for i, optimizer in enumerate(optimizers):
        load_optimizer(optimizer, tensors, f"optimizer{i}")


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """Every tensor of an optimiser's state, named `prefix.<parameter index>.<entry>`."""
    state = optimizer.state_dict()["state"]
    return {f"{prefix}.{i}.{k}": torch.as_tensor(v) for i, entries in state.items() for k, v in entries.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str) -> None:
    """Put back a copy of what `optimizer_tensors` took; learning rates and other settings stay those of `optimizer`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{prefix}."):
            _, index, entry = name.rsplit(".", 2)
            state.setdefault(int(index), {})[entry] = tensor.clone()  # it is updated in place
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": parameter for name, parameter in model.named_parameters()}  # a tied one comes once
