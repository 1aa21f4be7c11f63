"""Time and memory of a training step: each method, in the suite, in other libraries, and the encoder's product alone.

    python tests/benchmarks/side_by_side.py            # in an environment with the peers: `make bench`
    PEERS=bf16 python tests/benchmarks/side_by_side.py # the peers under autocast in bf16

Each competitor lives in a process of its own. All read the same batch, in turns: each round asks every competitor for
one step, so that a slow moment of the machine meets them all. A cell of the table holds the least of its times in ms,
how many products of the encoder that is (in the suite's type of products, or in fp32), and the MB that the process grew
by, where Linux tells. The table is printed, and is PAGE.
"""

import contextlib
import multiprocessing
import os
import re
import sys
import time
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
PAGE = Path(__file__).with_name("README.md")
sys.path.insert(0, str(ROOT))

from competitors import METHODS, OURS, Step  # noqa: E402

from helpers.notebook.run import commit, hardware  # noqa: E402

# of a shape, (d_model, n_latents, L0, batch): steps that are not timed, while a process's heap still grows, and rounds
STEPS = {(256, 8_192, 32, 4_096): (2, 3), (256, 2_048, 32, 1_024): (40, 8), (256, 512, 32, 1_024): (40, 8)}
PAUSE = 0.1  # seconds, after which the threads of the one before no longer wait busily
COLUMNS = ("product", "suite", "product_fp32", "suite_fp32", "sparsify", "dictionary_learning", "saelens")
PEERS = ("sae-lens", "eai-sparsify", "dictionary-learning")
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
    """In a process of its own: the steps that are not timed, then for each message a step to warm up and another, whose
    seconds are sent back with the MB that were added by then."""
    d_model, n, l0, batch = shape
    x = activations(d_model, batch)
    x = x.repeat(1, 2) if method == "L1 crosscoder" else x
    before = megabytes("VmRSS")
    step = make(method, d_model, n, l0, x)
    peer = BF16_PEERS and make not in OURS
    with torch.autocast("cpu", torch.bfloat16) if peer else contextlib.nullcontext():
        for _ in range(pipe.recv()):
            step(x)
        pipe.send(None)
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
    warm, rounds = STEPS[shape]
    for pipe in pipes.values():
        pipe.send(warm)
        pipe.recv()
    for _ in range(rounds):
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


def page(rows: list[str]) -> str:
    """PAGE from the rows of the table."""
    peers = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("sae-lens", "eai-sparsify", "dictionary-learning")
    )
    kind = "under autocast in bf16" if BF16_PEERS else "in fp32"
    return (
        f"""# A training step beside other libraries

What `make bench` measured last: {hardware()}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit
{commit()}; {peers}, {kind}. All read the same batch, in turns, each in a process of its own.

A cell holds the least time of a step, how many times the time of the encoder's product alone that is, and what the
process grew by. `suite` multiplies in 16 bits where the processor has them, `suite_fp32` and the others do not; each is
compared with a product of its own kind. A shape is d_model, n_latents, L0 and batch.

| shape | method | {" | ".join(COLUMNS)} |
{"| --- " * (len(COLUMNS) + 2)}|
"""
        + "\n".join(rows)
        + "\n"
    )


def main() -> None:
    rows = []
    for shape in STEPS:
        for method in METHODS:
            found = measure(method, shape)
            rows.append(f"| {shape} | {method} | " + " | ".join(cell(found, name) for name in COLUMNS) + " |")
            print(rows[-1], flush=True)
    PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
