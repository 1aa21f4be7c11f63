"""The papers' subjects at full size with random weights: memory and speed of a harvest on one core.

    python tests/benchmarks/full_size.py gpt2 gemma

Loads each as `subject="hub"` does, in a process of its own, and writes data/results/full_size.json for the README.
Weights are random, as no network is asked; neither memory nor speed depends on what they are. They are stored in
float32, the largest a hub's may be: read and converted they are both in memory for a moment, if there is room. Speeds
with and without products in 16 bits are kept side by side, whichever this machine can add.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config

from helpers.activations.stream import Harvest, harvest_rows
from helpers.base.products import has_fast_bf16
from helpers.base.storage import MODELS, RESULTS, write_atomic
from helpers.notebook.run import hardware, peak_memory_gb
from helpers.subjects.subject import load_subject, subject_for
from helpers.text.documents import load_tokenizer

CASES = {  # configuration, dtype, context of the notebooks at laptop scale, tokens
    "gpt2": (GPT2Config, torch.float32, 128, 8192),
    "gemma": (Gemma2Config, torch.bfloat16, 128, 512),
}
FAMILIES = {"gpt2": "gpt2", "gemma": "gemma2-base"}
PRODUCTS = {True: "16 bits", False: "32 bits"}
FILE = RESULTS / "full_size.json"


def main(names: list[str]) -> None:
    before = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    known = before.get("subjects", {})
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            for step in ("write", "measure"):
                found = subprocess.check_output([sys.executable, __file__, step, name, folder], text=True)
        subject, row = subject_for("hub", FAMILIES[name]), json.loads(found.splitlines()[-1])
        row["tokens_a_second"] = known.get(subject, {}).get("tokens_a_second", {}) | row["tokens_a_second"]
        known[subject] = row
    write_atomic(FILE, json.dumps(before | {"hardware": hardware(), "subjects": known}, indent=1) + "\n")


def write(name: str, folder: Path) -> None:
    AutoModelForCausalLM.from_config(CASES[name][0](), dtype=torch.float32).save_pretrained(folder)
    load_tokenizer(MODELS / "docs-gpt2").save_pretrained(folder)


def measure(name: str, folder: Path) -> None:
    _, dtype, context, n_tokens = CASES[name]
    torch.set_num_threads(1)
    begun = time.perf_counter()
    subject = load_subject(folder, dtype=dtype)
    loaded = time.perf_counter()
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
        "tokens_a_second": {PRODUCTS[has_fast_bf16()]: round(speed)},
    }
    print(json.dumps(size | {"context": context, "tokens": rows.numel()} | cost))


if __name__ == "__main__":
    if sys.argv[1] in ("write", "measure"):
        globals()[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
    else:
        main(sys.argv[1:])
