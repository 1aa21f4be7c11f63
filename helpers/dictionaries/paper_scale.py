"""The papers' own runs, and what one takes before anything is allocated: memory, traffic and time of each process.

Counted for the training that `sharded` divides over p processes, with b the bytes of a number in the products:

    state       weights, both moments of Adam and their average, 4 bytes a number; tokens since each latent fired
    working     copies of both weights for products in 16 bits, a block of pre-activations, the pairs that are on and
                AuxK's, as while latents are dead, the offers of all processes for a block of tokens, and the batch
    traffic     what a process receives in a step: (p - 1) k b a token for the offers, 2 (p - 1) / p 4 d for x_hat, and
                while latents are dead both once more with AuxK's k
    seconds     products / their rate + bytes through memory / its rate + traffic / its rate, nothing at the same time

It is a lower bound: to choose the k largest is counted by its memory alone, which is least true where rows are narrow.
A machine is three rates: `measure_machine` finds them by works that are no training, so that `against_measured` says
how far a plan may be trusted.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from helpers.base import products
from helpers.dictionaries import kernels, shards
from helpers.dictionaries.speed import itemsize, time_step


@dataclass(frozen=True)
class Run:
    """One training of a paper."""

    d: int  # width of a row: d_model, or that of both models of a crosscoder
    n_latents: int
    k: int
    tokens: int
    batch: int
    k_aux: int = 512
    ema: bool = True
    models: int = 1  # that are read; two by a crosscoder
    source: str = ""


PAPERS = {
    "GPT-2, 131 thousand": Run(
        768, 2**17, 32, 6_400_000_000, 2**17, source="Gao et al. 2024, GPT-2 small; tokens of one epoch"
    ),
    "GPT-4, 16 million": Run(
        *(768, 2**24, 256, 40_000_000_000, 2**17),
        source="Gao et al. 2024, 4.1, k from the released viewer; d of GPT-4 is not published, this is GPT-2 small's",
    ),
    "Gemma 2 2B, crosscoder": Run(
        *(2 * 2304, 73_728, 100, 200_000_000, 2048), ema=False, models=2, source="Minder, Dumas et al. 2025, two epochs"
    ),
}


@dataclass(frozen=True)
class Machine:
    """Rates of one process's device."""

    products: float  # FLOP/s of matrix products as training makes them
    memory: float  # bytes/s, read and written
    link: float  # bytes/s received from other processes
    gpu: bool = False


# assumed, not measured: 40 % of its peak in bf16, 75 % of its memory's, half of what its NVLink receives
H100 = Machine(4e14, 2.5e12, 2e11, gpu=True)


def memory_bytes(run: Run, processes: int, number: int, gpu: bool) -> dict[str, int]:
    """Bytes of each process, the one with most latents: {"state", "working"}. `number`: of one in the products."""
    n, block = -(-run.n_latents // processes), min(run.batch, kernels.BLOCK["gpu" if gpu else "cpu"])
    state = (3 + run.ema) * 4 * (n * (2 * run.d + 1) + run.d) + 8 * n
    copies = (number < 4) * number * n * 2 * run.d
    pairs, most = 48 * (run.k + run.k_aux) * run.batch, max(run.k, run.k_aux)
    offers = (processes > 1) * processes * most * block * (3 * number + 9)
    return {
        "state": state,
        "working": copies + number * block * n + pairs + offers + 6 * 4 * run.d * run.batch,
    }


def traffic_bytes(run: Run, processes: int, number: int, dead: bool = False) -> int:
    """Bytes that each process receives in a step; `dead` while there are dead latents, at least k_aux of them."""
    contests, others = [run.k] + dead * [run.k_aux], processes - 1
    return sum(run.batch * others * (k * number + 2 * 4 * run.d / processes) for k in contests).__ceil__()


def step_seconds(run: Run, processes: int, machine: Machine, number: int) -> float:
    """Seconds of a step while no latent is dead."""
    n = run.n_latents / processes
    adam, copies = (32 + 12 * run.ema) * n * 2 * run.d, (number < 4) * (4 + number) * n * 2 * run.d
    selection, sparse = 3 * number * run.batch * n, (number + 12) * run.batch * run.k * run.d
    return (
        2 * n * run.d * run.batch / machine.products
        + (adam + copies + selection + sparse) / machine.memory
        + traffic_bytes(run, processes, number) / machine.link
    )


def plan(run: Run, processes: Iterable[int], machine: Machine = H100, number: int = 2) -> pd.DataFrame:
    """A row for each number of processes: GB (1e9 bytes) of each, GB it receives in a step, seconds a step, days."""
    rows = []
    for p in processes:
        memory, seconds = memory_bytes(run, p, number, machine.gpu), step_seconds(run, p, machine, number)
        rows.append(
            {
                "processes": p,
                "state GB": memory["state"] / 1e9,
                "memory GB": sum(memory.values()) / 1e9,
                "traffic GB": traffic_bytes(run, p, number) / 1e9,
                "traffic GB, some dead": traffic_bytes(run, p, number, dead=True) / 1e9,
                "seconds": seconds,
                "days": seconds * run.tokens / run.batch / 86_400,
            }
        )
    return pd.DataFrame(rows).set_index("processes")


def measure_machine(group: shards.Group = None, repeats: int = 5) -> Machine:
    """Rates of this process: a product of 1,024 tokens with 4,096 latents, a sum of 16 million numbers, and, in a
    `group`, the offers of a few thousand tokens."""
    dtype = torch.bfloat16 if products.has_fast_bf16() else torch.float32
    x, W, out = torch.randn(1024, 256).to(dtype), torch.randn(4096, 256).to(dtype), torch.empty(1024, 4096, dtype=dtype)
    numbers, offer = torch.zeros(2**24), torch.zeros(4096, 32)
    received = 0 if group is None else offer.nbytes * (group.size() - 1)
    return Machine(
        2 * 1024 * 4096 * 256 / _median_seconds(lambda: torch.mm(x, W.T, out=out), repeats),
        2 * numbers.nbytes / _median_seconds(lambda: numbers.add_(1.0), repeats),
        received / _median_seconds(lambda: shards.gathered(offer, group), repeats) if received else float("inf"),
    )


def against_measured(
    sizes: Iterable[tuple[int, int, int, int]], group: shards.Group = None, repeats: int = 5
) -> pd.DataFrame:
    """Steps as planned for this machine and as measured: a row for each (d, n_latents, k, batch), with seconds.

    Every process of a `group` must ask for the same.
    """
    machine, p, rows = measure_machine(group), group.size() if group else 1, []
    for d, n, k, batch in sizes:
        planned = step_seconds(Run(d, n, k, batch, batch, ema=False), p, machine, itemsize())
        measured = time_step(d, n, k, batch, repeats, group)
        rows.append({"d": d, "n_latents": n, "k": k, "batch": batch, "planned": planned, "measured": measured})
    return pd.DataFrame(rows).assign(ratio=lambda table: table.measured / table.planned)


def _median_seconds(work: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[1:]))
