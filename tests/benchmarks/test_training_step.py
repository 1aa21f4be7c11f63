"""Tokens a second of one TopK training step, beside three other libraries and beside the encoder's product alone.

`make bench` runs it in an environment with the peers. All read the same batches, in turns: each round times every
competitor once, so that a slow moment of the machine meets them all. `PEERS=bf16` gives the peers autocast in bf16.
"""

import contextlib
import itertools
import os

import pytest
import torch
from competitors import STEPS

SIZES = {"small": (256, 8_192, 32, 4_096), "large": (768, 24_576, 32, 2_048)}  # d_model, n_latents, k, batch
ROUNDS = {"small": 9, "large": 5}
BF16_PEERS = os.environ.get("PEERS") == "bf16"
BATCHES = 4


def activations(d_model: int, n: int) -> torch.Tensor:
    """Unit vectors, sums of few of 4 d fixed directions: (n, d_model)."""
    random = torch.Generator().manual_seed(1000)
    directions = torch.randn(4 * d_model, d_model, generator=random)
    on = torch.rand(n, 4 * d_model, generator=random) < 0.02
    noise = 0.3 * torch.randn(n, d_model, generator=random)
    return torch.nn.functional.normalize(on.float() @ directions + noise, dim=-1)


@pytest.fixture(scope="module")
def made():
    """Batches and steps, made once per size; only one size is kept."""
    held = {}

    def make(size):
        if held.get("size") != size:
            held.clear()
            d_model, n, k, batch = SIZES[size]
            batches = activations(d_model, BATCHES * batch).split(batch)
            steps = {name: step(d_model, n, k, batches[0]) for name, step in STEPS.items()}
            held.update(size=size, batches=batches, steps=steps)
        return held["batches"], held["steps"]

    return make


ORDER = [case for size in SIZES for case in itertools.product([size], range(ROUNDS[size]), STEPS)]


@pytest.mark.parametrize("size, turn, name", ORDER)
def test_step(size, turn, name, made, benchmark):
    batches, steps = made(size)
    peer = name not in ("suite", "encoder_product")
    precision = torch.autocast("cpu", torch.bfloat16) if BF16_PEERS and peer else contextlib.nullcontext()
    benchmark.group = size
    benchmark.extra_info |= {"size": size, "name": name, "tokens": len(batches[0])}
    with precision:
        benchmark.pedantic(steps[name], (batches[turn % BATCHES],), rounds=1, iterations=2, warmup_rounds=1)
