"""The workshop's bundle on a laptop without a network: built, unpacked, installed into an empty home, and used.

    python tests/benchmarks/offline_bundle.py [NUMBERS]

Prints the bundle's size, and the minutes of building, of installing, and of running notebooks (00 by default) at smoke
scale. As root on Linux the network is off: a network namespace of its own, with the loopback that kernels need.
Elsewhere pip has no index, and nothing else keeps a notebook from the network.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from helpers.suite.bundle import build


def main(numbers: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with timed("build"):
            path = build(Path(folder))
        print(f"{path.name}: {path.stat().st_size / 1e6:.0f} MB")
        with timed("unpack"):
            shutil.unpack_archive(path, folder)
        suite, home = Path(folder, path.stem), Path(folder, "home")
        home.mkdir()
        path.unlink()
        with timed("install"):
            offline(["bash", "install.sh"], suite, home)
        with timed(f"run {numbers}"):
            run = [".venv/bin/python", "-m", "helpers.suite", "run", "--scale", "smoke", "--only", numbers]
            offline(run, suite, home)
        disk = subprocess.check_output(["du", "-sm", suite], text=True).split()[0]
        print(f"{disk} MB on disk")


@contextmanager
def timed(what: str):
    begun = time.monotonic()
    yield
    print(f"{what}: {(time.monotonic() - begun) / 60:.1f} minutes", flush=True)


def offline(command: list[str], suite: Path, home: Path) -> None:
    """Run `command` in the unpacked bundle with an empty home, nothing of this environment, and no network."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "PIP_CONFIG_FILE": os.devnull,
        "PYTHON": base_python(),
    }
    if sys.platform == "linux" and os.geteuid() == 0:
        command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
    subprocess.run(command, cwd=suite, env=environment, check=True)


def base_python() -> str:
    """The Python that this environment was made of, without the packages that are installed in it."""
    return getattr(sys, "_base_executable", sys.executable)


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "00")
