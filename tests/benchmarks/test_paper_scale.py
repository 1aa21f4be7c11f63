"""The plan of a run at the papers' scale against steps at four sizes, by one process and by two that torchrun starts.

Filed in data/results/paper_scale.json for the page on what a run needs, not asserted: the processes share this
machine's cores, and whatever else runs on it.
"""

import json
import os
import subprocess
import sys

import torch

from helpers.base.storage import RESULTS, ROOT, write_atomic
from helpers.dictionaries.paper_scale import against_measured
from helpers.dictionaries.sharded import processes
from helpers.notebook.run import provenance

SIZES = [(64, 2048, 16, 2048), (256, 4096, 32, 2048), (256, 16_384, 32, 2048), (768, 24_576, 32, 1024)]


def test_the_plan_against_steps(capsys):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = {}
    for n in (1, 2):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", __file__]
        done = subprocess.run(torchrun, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found[n] = json.loads(done.stdout.splitlines()[-1])
        with capsys.disabled():
            print(f"\n{done.stdout}")
    write_atomic(RESULTS / "paper_scale.json", json.dumps({**provenance(), "processes": found}, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with processes() as group:
        table = against_measured(SIZES, group if group.size() > 1 else None)
        if group.rank() == 0:
            print(f"{group.size()} processes, seconds a step\n{table.round(4).to_string(index=False)}")
            print(json.dumps(table.round(4).to_dict("records")))
