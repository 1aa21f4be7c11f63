"""Is this laptop ready? `python -m helpers.suite.doctor` says so within ten seconds, and how to mend what is not.

A line for each check: ✔ fine, ✘ to be mended (the exit status is then 1), · not needed but good to know. Nothing but
the standard library is imported before a check asks for it: a laptop on which nothing is installed gets its list too.
"""

import functools
import importlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = [(3, 11), (3, 12), (3, 13)]  # that the suite was tried with
MEMORY_GB, DISK_GB = 3, 4  # of a half-day's notebooks
PATIENCE_S = 10  # for a process that the doctor starts
INSTALL = "install the pins: `bash install.sh` or `install.ps1` in the workshop's bundle, `make setup` elsewhere"
PROBE = (  # in a process of its own: a broken torch may end the one that imports it
    "import json, torch; from helpers.base.storage import cache_dir; "
    "print(json.dumps([torch.__version__, torch.get_num_threads(), str(cache_dir())]))"
)
KERNEL = (
    "from jupyter_client.manager import start_new_kernel; manager, client = start_new_kernel(); "
    "reply = client.execute('1 + 1', reply=True, timeout=9); manager.shutdown_kernel(now=True); "
    "assert reply['content']['status'] == 'ok'"
)

_PROBING = threading.Lock()


class Finding(NamedTuple):
    """What a check saw, and what to do about it; without a remedy all is well."""

    seen: str
    remedy: str = ""
    needed: bool = True

    def __str__(self) -> str:
        mark = "✔" if not self.remedy else "✘" if self.needed else "·"
        return f"{mark} {self.seen}" + (f"\n    → {self.remedy}" if self.remedy else "")


def main() -> int:
    """Print a line for each check; the return value is the exit status."""
    sys.stdout.reconfigure(errors="replace")  # a terminal without ✔
    with ThreadPoolExecutor(len(CHECKS)) as pool:  # most of them wait for another process
        findings = list(pool.map(examine, CHECKS))
    print(*findings, sep="\n")
    n_bad = sum(bool(finding.remedy) and finding.needed for finding in findings)
    print(f"\n{n_bad} of {len(findings)} to be mended." if n_bad else "\nReady.")
    return int(n_bad > 0)


def examine(check: Callable[[], Finding]) -> Finding:
    """What `check` finds; one that breaks has found something too."""
    try:
        return check()
    except subprocess.TimeoutExpired:
        return Finding(f"{check.__name__}: no answer in {PATIENCE_S} s", "ask again: the second time is faster")
    except Exception as error:  # whatever is broken on a laptop, the other checks go on
        return Finding(f"{check.__name__}: {type(error).__name__}: {error}", INSTALL)


def python() -> Finding:
    """The Python that runs this."""
    seen = f"Python {sys.version.split()[0]}, in {sys.prefix}"
    known = ", ".join(f"{major}.{minor}" for major, minor in PYTHONS)
    return Finding(seen, "" if sys.version_info[:2] in PYTHONS else f"use one of Python {known}, then install again")


def memory() -> Finding:
    """What programs can still have, in GB of 2^30 bytes."""
    free = importlib.import_module("psutil").virtual_memory().available / 2**30
    enough = free >= MEMORY_GB
    remedy = f"close other programs until {MEMORY_GB} GB are free, or run the notebooks with scale = 'smoke'"
    return Finding(f"{free:.1f} GB of memory free", "" if enough else remedy)


def disk() -> Finding:
    """What is left where the cache goes."""
    folder = cache_folder()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free / 2**30
    remedy = f"free {DISK_GB} GB, or let the variable SUITE_CACHE name a folder on another disk"
    return Finding(f"{free:.1f} GB of disk free at {folder}", "" if free >= DISK_GB else remedy)


def cache() -> Finding:
    """Whether the folder of tokens and activations can be written to."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Finding(f"{folder} can be written to")
    except OSError as error:
        return Finding(f"{folder}: {error.strerror}", "let the variable SUITE_CACHE name a folder that is yours")


def pins() -> Finding:
    """Whether every package has the version that requirements.txt says."""
    wrong = wrong_pins((ROOT / "requirements.txt").read_text(encoding="utf-8"))
    seen = ", ".join(f"{name} {found} instead of {pin}" for name, (found, pin) in wrong.items())
    if not wrong:
        return Finding("every package has its pinned version")
    return Finding(f"{len(wrong)} packages differ: {seen if len(seen) < 200 else seen[:200] + ' …'}", INSTALL)


def wrong_pins(requirements: str) -> dict[str, tuple[str, str]]:
    """name -> (installed version or "absent", pin), for each line `name==pin` that holds here and is not so."""
    marker = importlib.import_module("packaging.markers").Marker
    lines = re.findall(r"^([\w.-]+)==([\w.]+)(?:; (.+))?$", requirements, re.MULTILINE)
    wanted = {name: pin for name, pin, condition in lines if not condition or marker(condition).evaluate()}
    return {name: (found, pin) for name, pin in wanted.items() if (found := _version(name)) != pin}


def _version(name: str) -> str:
    try:
        return version(name).partition("+")[0]  # a CPU build of torch is 2.13.0+cpu
    except PackageNotFoundError:
        return "absent"


def torch() -> Finding:
    """Whether it can be imported, and how many threads it takes."""
    found, threads, _ = probed()
    return Finding(f"torch {found}, {threads} thread{'s' if threads > 1 else ''}")


def models() -> Finding:
    """Whether the language models are there and whole: a cut file does not agree with its own header."""
    open_file = importlib.import_module("safetensors").safe_open
    files, broken = sorted((ROOT / "data" / "models").glob("*/config.json")), []
    for folder in (config.parent for config in files):
        try:
            (file,) = folder.glob("*.safetensors")  # a model's weights, or a fine-tune's low-rank difference
            with open_file(file, "numpy") as weights:
                weights.keys()
        except Exception:  # safetensors has errors of its own, and is not imported above
            broken.append(folder.name)
    if broken or not files:
        return Finding(f"models missing or cut short: {', '.join(broken) or 'all'}", "unpack or clone the suite again")
    return Finding(f"{len(files)} language models, whole")


def jupyter() -> Finding:
    """Whether a kernel starts and answers."""
    _python(KERNEL)
    return Finding("Jupyter starts a kernel")


def browser() -> Finding:
    """Whether figures can be stored as PNG; notebooks show them without."""
    found = importlib.import_module("choreographer.browsers.chromium").Chromium.find_browser(skip_local=False)
    remedy = "only to store figures as PNG, install Chrome or Chromium; no notebook needs it"
    return Finding("a browser draws PNGs" if found else "no Chrome for PNGs", "" if found else remedy, needed=False)


def cache_folder() -> Path:
    """Where the suite keeps tokens and activations."""
    return Path(probed()[2])


def probed() -> tuple[str, int, str]:
    """torch's version, its threads, the suite's cache folder; asked for once."""
    with _PROBING:
        return _probed()


@functools.cache
def _probed() -> tuple[str, int, str]:
    return tuple(json.loads(_python(PROBE)))


def _python(code: str) -> str:
    """What `code` prints in a new Python. Raises RuntimeError with its last line of error."""
    told = {"cwd": ROOT, "stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": PATIENCE_S}
    done = subprocess.run([sys.executable, "-c", code], **told)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1])
    return done.stdout


CHECKS = (python, pins, torch, models, jupyter, memory, cache, disk, browser)

if __name__ == "__main__":
    sys.exit(main())
