"""Sweeps whose processes are killed: slow batches, and batches that kill the process that reads them.

A process that is started to train on them imports this file; it then saves a checkpoint after every step and counts.
"""

import dataclasses
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from helpers.dictionaries import sweeps
from helpers.dictionaries.sweeps import Cell, sweep
from helpers.dictionaries.training import Training, train

HELDOUT = torch.randn(256, 8, generator=torch.Generator().manual_seed(1))
CELLS = [Cell("TopK", 16, 2, tokens=tokens) for tokens in (1280, 1024, 768, 512)]
STEPS = sum(cell.tokens // 64 for cell in CELLS)


def note(folder: Path, event: str) -> None:
    with (folder / event).open("a") as file:
        file.write(f"{os.getpid()}\n")


def noted(folder: Path, event: str) -> list[int]:
    """The processes that noted it, once for each time."""
    path = folder / event
    return [int(line) for line in path.read_text().split()] if path.exists() else []


@dataclasses.dataclass
class Killing:
    """A process that reads batches of `victim` tokens is killed at the fifth, so many times. Each takes `seconds`."""

    folder: Path
    victim: int = 0
    times: int = 0
    seconds: float = 0.0
    fingerprint = "normal numbers"
    batch_size = 64

    def batches(self, tokens: int, batch_size: int = 64) -> Iterator[torch.Tensor]:
        x = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(0))
        for number, batch in enumerate(x.split(batch_size)):
            if (number, tokens) == (5, self.victim) and len(noted(self.folder, "killed")) < self.times:
                note(self.folder, "killed")
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(self.seconds)
            yield batch

    def sweep(self, n_jobs: int = 2) -> sweeps.Sweep:
        return sweep(CELLS, self.batches, HELDOUT, 0, self.folder / "cells", n_jobs)


if __name__ == "__main__":
    import killed  # by its name, so that other processes import it as well

    killed.Killing(Path(sys.argv[1]), seconds=0.2).sweep()
elif multiprocessing.parent_process():  # a process that trains for another
    save = Training.save

    def saved(training: Training, path: Path) -> None:
        save(training, path)
        note(path.parents[1], "step")

    Training.save, sweeps.train = saved, partial(train, save_every_minutes=0)
