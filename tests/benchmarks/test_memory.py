"""Peak memory of training, beyond what the process held before: at most weights, gradients, moments and 1.5 blocks.

A block is (batch, n_latents) pre-activations as they are computed, in bf16 where that is fast.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from side_by_side import STATUS

from helpers.base.products import has_fast_bf16
from helpers.base.storage import ROOT

TRAIN = """
import sys, torch
from competitors import suite
from side_by_side import megabytes

method, sizes = sys.argv[1], map(int, sys.argv[2:])
d, n, l0, batch = sizes
torch.randn(64, 64) @ torch.randn(64, 64)
x = torch.nn.functional.normalize(torch.randn(batch, d), dim=-1)
import helpers.dictionaries.sweeps
before = megabytes("VmRSS")
step = suite(method, d, n, l0, x)
for _ in range(4):
    step(x)
print(megabytes("VmHWM") - before)
"""


@pytest.mark.skipif(not STATUS.exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize("method", ["TopK", "ReLU", "JumpReLU", "Gated"])
@pytest.mark.parametrize("size", [(256, 8_192, 32, 4_096), (768, 24_576, 32, 2_048)], ids=str)
def test_peak_memory(method, size, capsys):
    d, n, _, batch = size
    command = [sys.executable, "-c", TRAIN, method, *map(str, size)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    peak = float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    state, block = (bytes / 2**20 for bytes in (4 * 4 * 2 * n * d, (2 if has_fast_bf16() else 4) * batch * n))
    with capsys.disabled():
        print(f"\n{method} {size}: {peak:.0f} MB, of which state {state:.0f}; a block is {block:.0f}")
    assert peak <= state + 1.5 * block
