"""The README's commands in a fresh clone with an empty home folder: minutes, disk and memory, for the README's table.

    python tests/benchmarks/fresh_clone.py setup test notebooks

Clones the committed state, runs `make` with each target in turn, and writes data/results/commands.json.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main(targets: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        clone, home = Path(folder, "clone"), Path(folder, "home")
        home.mkdir()
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SUITE_", "PYTHON"))}
        measured = [measure(target, clone, home, environment | {"HOME": str(home)}) for target in targets]
    path = ROOT / "data" / "results" / "commands.json"
    path.write_text(json.dumps({"hardware": f"{os.cpu_count()} cores", "commands": measured}, indent=1) + "\n")


def measure(target: str, clone: Path, home: Path, environment: dict) -> dict:
    """Minutes of `make <target>`, GB on disk after it, and the largest process so far in GB."""
    begun = time.monotonic()
    subprocess.run(["make", target], cwd=clone, env=environment, check=True)
    minutes = (time.monotonic() - begun) / 60
    disk = int(subprocess.check_output(["du", "-sk", clone.parent]).split()[0]) / 2**20
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return {"command": f"make {target}", "minutes": minutes, "disk_gb": disk, "memory_gb": memory}


if __name__ == "__main__":
    main(sys.argv[1:])
