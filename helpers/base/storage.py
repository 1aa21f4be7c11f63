"""Where things live, and how they are written: aside first, then renamed, so that nothing is ever half a file."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"
MODELS = DATA / "models"
RESULTS = DATA / "results"  # the committed reference results
OUT = ROOT / "out"  # what a run on this machine leaves behind, outside git


def cache_dir() -> Path:
    """Folder for tokenised text and activations: $SUITE_CACHE, or one in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "topk-to-crosscoders"
    return Path(os.environ.get("SUITE_CACHE", default))


def results_dir() -> Path:
    """Folder for the results of this run: $SUITE_RESULTS, or out/results."""
    return Path(os.environ.get("SUITE_RESULTS", OUT / "results"))


def write_atomic(path: Path, data: bytes | str) -> Path:
    """Write `data` to `path` in one step: a reader sees the old file or the whole new one."""
    with written_aside(path) as aside:
        aside.write_bytes(data.encode() if isinstance(data, str) else data)
    return Path(path)


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it into place on success, remove it on any failure.

    Raises OSError with the target's name when the disk is full or not writable.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        aside.chmod(0o666 & ~_umask())  # mkstemp is private; a data file is not
        aside.replace(path)
    except OSError as error:
        raise OSError(
            error.errno, f"could not write {path} ({error.strerror}); nothing was changed, free space and run again"
        ) from error
    finally:
        aside.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
