"""The papers' subjects at full size with random weights: memory and speed of a harvest on one core.

    python tests/benchmarks/full_size.py

Loads each as `subject="hub"` does, in a process of its own, and writes data/results/full_size.json for the README, all
of it. Weights are random, as no network is asked; neither memory nor speed depends on what they are. They are stored in
float32, the largest a hub's may be: read and converted they are both in memory for a moment, if there is room. It takes
11 GB of disk, and a processor with products in 16 bits is measured with them and without.
"""

import json
import os
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
from helpers.notebook.run import commit, hardware, peak_memory_gb
from helpers.subjects.subject import CONTEXTS, load_subject, subject_for
from helpers.text.documents import load_tokenizer

CASES = {  # family: configuration, dtype, context of the notebooks at laptop scale, tokens
    "gpt2": (GPT2Config, torch.float32, CONTEXTS["hub"]["laptop"], 8192),
    "gemma2-base": (Gemma2Config, torch.bfloat16, 128, 512),
}
PRODUCTS = {True: "16 bits", False: "32 bits"}
WITHOUT = {"ONEDNN_MAX_CPU_ISA": "AVX2"}  # no products in 16 bits
NOTE = "Both speeds are of that processor: for the last column it was kept from using its products in 16 bits."


def main() -> None:
    about = {"hardware": hardware(), "torch": torch.__version__, "commit": commit()}
    about |= {"note": NOTE} if has_fast_bf16() else {}
    found = json.dumps(about | {"subjects": {subject_for("hub", family): row(family) for family in CASES}}, indent=1)
    write_atomic(RESULTS / "full_size.json", f"{found}\n")


def row(family: str) -> dict:
    """What is found with all that the processor has, and its speed without as well."""
    with tempfile.TemporaryDirectory() as folder:
        in_process("write", family, folder)
        found, without = (in_process("measure", family, folder, more) for more in ({}, WITHOUT))
    return found | {"tokens_a_second": without["tokens_a_second"] | found["tokens_a_second"]}


def in_process(step: str, family: str, folder: str, environment: dict[str, str] | None = None) -> dict:
    command, environment = [sys.executable, __file__, step, family, folder], os.environ | (environment or {})
    return json.loads(subprocess.check_output(command, text=True, env=environment).splitlines()[-1])


def write(family: str, folder: Path) -> dict:
    AutoModelForCausalLM.from_config(CASES[family][0](), dtype=torch.float32).save_pretrained(folder)
    load_tokenizer(MODELS / "docs-gpt2").save_pretrained(folder)
    return {}


def measure(family: str, folder: Path) -> dict:
    _, dtype, context, n_tokens = CASES[family]
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
    return size | {"context": context, "tokens": rows.numel()} | cost


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(globals()[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))))
    else:
        main()
