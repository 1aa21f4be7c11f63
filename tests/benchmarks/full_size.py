"""The papers' subjects at full size with random weights: memory and speed of a harvest on one core.

    python tests/benchmarks/full_size.py gpt2 gemma

Loads each as `subject="hub"` does, in a process of its own, and writes data/results/full_size.json for the README.
Weights are random, as no network is asked; neither memory nor speed depends on what they are. They are stored in
float32, as both models on the hub are: where another dtype is computed in, what was read stays in memory beside it as
long as there is room, and is told apart as `of_files_gb`.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config

from helpers.activations.stream import Harvest, harvest_rows
from helpers.base.storage import MODELS, RESULTS, write_atomic
from helpers.notebook.run import hardware, peak_memory_gb
from helpers.subjects.subject import load_subject, subject_for
from helpers.text.documents import load_tokenizer

CASES = {  # configuration, dtype, context of the notebooks at laptop scale, tokens
    "gpt2": (GPT2Config, torch.float32, 128, 8192),
    "gemma": (Gemma2Config, torch.bfloat16, 128, 512),
}
FAMILIES = {"gpt2": "gpt2", "gemma": "gemma2-base"}
FILE = RESULTS / "full_size.json"


def main(names: list[str]) -> None:
    known = json.loads(FILE.read_text(encoding="utf-8"))["subjects"] if FILE.is_file() else {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            for step in ("write", "measure"):
                found = subprocess.check_output([sys.executable, __file__, step, name, folder], text=True)
        known[subject_for("hub", FAMILIES[name])] = json.loads(found.splitlines()[-1])
    write_atomic(FILE, json.dumps({"hardware": hardware(), "subjects": known}, indent=1) + "\n")


def write(name: str, folder: Path) -> None:
    AutoModelForCausalLM.from_config(CASES[name][0](), dtype=torch.float32).save_pretrained(folder)
    load_tokenizer(MODELS / "docs-gpt2").save_pretrained(folder)


def measure(name: str, folder: Path) -> None:
    _, dtype, context, n_tokens = CASES[name]
    torch.set_num_threads(1)
    begun = time.perf_counter()
    subject = load_subject(folder, dtype=dtype)
    loaded, of_files = time.perf_counter(), memory_of_files_gb()
    rows = torch.randint(4096, (n_tokens // context, context), generator=torch.Generator().manual_seed(0))
    harvest = Harvest(context, normalisation="none")
    harvest_rows(subject, rows[:1], harvest)
    warm = time.process_time()  # others may use the core as well
    for some in rows.split(harvest.rows):
        harvest_rows(subject, some, harvest)
    speed = rows.numel() / (time.process_time() - warm)
    size = {"layer": subject.layer, "d_model": subject.d_model, "dtype": str(dtype).removeprefix("torch.")}
    cost = {
        "load_s": round(loaded - begun, 1),
        "memory_gb": round(peak_memory_gb(), 2),
        "of_files_gb": round(of_files, 2),
        "tokens_a_second": round(speed),
    }
    print(json.dumps(size | {"context": context, "tokens": rows.numel()} | cost))


def memory_of_files_gb() -> float:
    """Resident memory of this process that mirrors files, in GB (2^30 bytes)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"RssFile:\s*(\d+)", status)[1]) / 2**20  # KiB


if __name__ == "__main__":
    if sys.argv[1] in ("write", "measure"):
        globals()[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
    else:
        main(sys.argv[1:])
