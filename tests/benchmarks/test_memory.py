"""Peak memory of training, beyond what the process held before: at most weights, gradients, moments and 1.5 blocks.

A block is (batch, n_latents) pre-activations as they are computed, in bf16 where that is fast.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from helpers.base.products import has_fast_bf16
from helpers.base.storage import ROOT

TRAIN = """
import re, sys, torch
from helpers.dictionaries.autoencoders import SparseAutoencoder, TopK
from helpers.dictionaries.training import TrainConfig, Training

def memory(what):  # bytes
    return 1024 * int(re.search(what + r":\\s*(\\d+)", open("/proc/self/status").read())[1])

d, n, k, batch = map(int, sys.argv[1:])
torch.randn(64, 64) @ torch.randn(64, 64)
x = torch.nn.functional.normalize(torch.randn(batch, d), dim=-1)
before = memory("VmRSS")
training = Training(SparseAutoencoder(d, n, TopK(k)), TrainConfig(10**9), x)
for _ in range(4):
    training.step(x)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize("size", [(256, 8_192, 32, 4_096), (768, 24_576, 32, 2_048)], ids=str)
def test_peak_memory(size, capsys):
    d, n, _, batch = size
    command = [sys.executable, "-c", TRAIN, *map(str, size)]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    state, block = 4 * 4 * 2 * n * d, (2 if has_fast_bf16() else 4) * batch * n
    with capsys.disabled():
        print(f"\n{size}: {peak / 1e6:.0f} MB, of which state {state / 1e6:.0f}; a block is {block / 1e6:.0f}")
    assert peak <= state + 1.5 * block
