"""Seconds to find the best of 8,192 units for 40 tasks on 50,000 tokens; the aim is a minute on two cores.

Labels are noisy halves of random directions, so no unit stands out and the search has to
fit more of them than on real data.
"""

import time

import torch

from helpers.evaluation.probe_tasks import Labelled
from helpers.evaluation.probes import best_probes

N_UNITS, N_TASKS, N_TOKENS, WIDTH = 8_192, 40, 50_000, 256


def test_best_of_many_units():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(N_TOKENS, WIDTH, generator=random)
    logits = x @ torch.randn(WIDTH, N_TASKS, generator=random)
    y = (logits + torch.randn(logits.shape, generator=random) * WIDTH**0.5 > WIDTH**0.5).T
    data = Labelled(x, y, tuple(map(str, range(N_TASKS))), torch.zeros(N_TOKENS, dtype=torch.long))
    directions = torch.randn(N_UNITS, WIDTH, generator=random)
    started = time.perf_counter()
    found = best_probes(data, directions)
    assert len(found) == N_TASKS and time.perf_counter() - started < 60
