"""Time and memory of a training step: each method, in the suite, in other libraries, and the encoder's product alone.

    python tests/benchmarks/side_by_side.py            # in an environment with the peers: `make bench`
    PEERS=bf16 python tests/benchmarks/side_by_side.py # the peers under autocast in bf16

Each competitor lives in a process of its own. All read the same batch, in turns: each round asks every competitor for
one step, so that a slow moment of the machine meets them all. A cell of the table holds the least of its times in ms,
how many products of the encoder that is (in the suite's type of products, or in fp32), and the MB that the process grew
by, where Linux tells.
"""

import contextlib
import csv
import multiprocessing
import os
import re
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from competitors import METHODS, OURS, Step  # noqa: E402

# of a shape: d_model, n_latents, L0, batch
ROUNDS = {(256, 8_192, 32, 4_096): 3, (256, 2_048, 32, 1_024): 8, (256, 512, 32, 1_024): 8}
PAUSE = 0.1  # seconds, after which the threads of the one before no longer wait busily
COLUMNS = ("product", "suite", "product_fp32", "suite_fp32", "sparsify", "dictionary_learning", "saelens")
STATUS = Path("/proc/self/status")
BF16_PEERS = os.environ.get("PEERS") == "bf16"


def activations(d_model: int, n: int) -> torch.Tensor:
    """Unit vectors, sums of few of 4 d fixed directions: (n, d_model)."""
    random = torch.Generator().manual_seed(1000)
    directions = torch.randn(4 * d_model, d_model, generator=random)
    on = torch.rand(n, 4 * d_model, generator=random) < 0.02
    noise = 0.3 * torch.randn(n, d_model, generator=random)
    return torch.nn.functional.normalize(on.float() @ directions + noise, dim=-1)


def compete(make: Step, method: str, shape: tuple[int, int, int, int], pipe: Connection) -> None:
    """In a process of its own: for each message a step to warm up and another, whose seconds are sent back with the MB
    that were added by then."""
    d_model, n, l0, batch = shape
    x = activations(d_model, batch)
    x = x.repeat(1, 2) if method == "L1 crosscoder" else x
    before = megabytes("VmRSS")
    step = make(method, d_model, n, l0, x)
    peer = BF16_PEERS and make not in OURS
    with torch.autocast("cpu", torch.bfloat16) if peer else contextlib.nullcontext():
        while pipe.recv():
            step(x)
            started = time.perf_counter()
            step(x)
            pipe.send((time.perf_counter() - started, megabytes("VmHWM") - before))


def megabytes(what: str) -> float:
    return int(re.search(what + r":\s*(\d+)", STATUS.read_text())[1]) / 1024 if STATUS.exists() else float("nan")


def measure(method: str, shape: tuple[int, int, int, int]) -> dict[str, tuple[float, float]]:
    """Least seconds of a step, and MB, of each competitor."""
    context, pipes, answers = multiprocessing.get_context("forkserver"), {}, {}
    context.set_forkserver_preload(["competitors", "sae_lens.saes", "sparsify", "dictionary_learning.trainers"])
    for make in METHODS[method]:
        pipes[make.__name__], theirs = context.Pipe()
        context.Process(target=compete, args=(make, method, shape, theirs), daemon=True).start()
    for _ in range(ROUNDS[shape]):
        for name, pipe in pipes.items():
            time.sleep(PAUSE)
            pipe.send(True)
            answers.setdefault(name, []).append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)
    return {name: (min(s for s, _ in a), max(mb for _, mb in a)) for name, a in answers.items()}


def cell(found: dict[str, tuple[float, float]], name: str) -> str:
    if name not in found:
        return ""
    seconds, mb = found[name]
    product = found["product" if name in ("product", "suite") else "product_fp32"][0]
    return f"{1e3 * seconds:,.1f} ms, {seconds / product:.1f} ×, {mb:,.0f} MB"


def main() -> None:
    out = ROOT / "out" / "benchmark.csv"
    out.parent.mkdir(exist_ok=True)
    print(f"\n{torch.get_num_threads()} threads; d_model, n_latents, L0, batch")
    print("| shape | method | " + " | ".join(COLUMNS) + " |\n" + "| --- " * (len(COLUMNS) + 2) + "|")
    with out.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["d_model", "n_latents", "l0", "batch", "method", "competitor", "seconds", "megabytes"])
        for shape in ROUNDS:
            for method in METHODS:
                found = measure(method, shape)
                rows.writerows([*shape, method, name, *numbers] for name, numbers in found.items())
                print(f"| {shape} | {method} | " + " | ".join(cell(found, name) for name in COLUMNS) + " |", flush=True)


if __name__ == "__main__":
    main()
