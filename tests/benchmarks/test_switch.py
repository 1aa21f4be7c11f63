"""Whether the stated share of latents up to which a step is sparse is where the sparse step is the faster one here."""

import time

import pytest
from competitors import suite
from side_by_side import activations

from helpers.dictionaries import training
from helpers.dictionaries.autoencoders import Gated, ReLU

D, N, BATCH, REPEATS = 256, 2048, 1024, 10  # at n = 512 both paths are within a tenth of each other below the switch


@pytest.mark.parametrize("method", ["ReLU", "Gated", "L1 crosscoder"])
def test_sparse_well_below_the_switch_and_dense_well_above_it_are_faster(method, monkeypatch, capsys):
    x = activations(D, BATCH).repeat(1, 2 if method == "L1 crosscoder" else 1)
    switch = (Gated if method == "Gated" else ReLU).dense_cost * training._sparse_up_to(x)
    faster = {}
    for times in (1 / 3, 1, 3):
        step, seconds = suite(method, D, N, round(times * switch * N), x), {0.0: [], 1.0: []}
        for up_to in REPEATS * [0.0, 1.0]:  # dense, sparse
            monkeypatch.setattr(training, "_sparse_up_to", lambda x, up_to=up_to: up_to)
            started = time.perf_counter()
            step(x)
            seconds[up_to].append(time.perf_counter() - started)
        faster[times] = min(seconds[0.0]) / min(seconds[1.0])
    with capsys.disabled():
        ratios = ", ".join(f"{ratio:.2f} at {times:.2g}" for times, ratio in faster.items())
        print(f"\n{method}, n = {N}: dense over sparse time {ratios} times the switch")
    assert faster[1 / 3] > 1 > faster[3]
