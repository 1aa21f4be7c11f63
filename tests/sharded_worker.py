"""One of four processes that test_sharded.py starts, with the folder that is to hold what comes of it.

"killed"    all train, and the fourth is killed at batch 9
"compared"  each case is trained by all four and by the first two, which then go on from where the
            killed one was, and from where one process was
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from helpers.base import products
from helpers.dictionaries.autoencoders import BatchTopK, SparseAutoencoder, TopK
from helpers.dictionaries.crosscoders import Crosscoder, DecoupledCrosscoder
from helpers.dictionaries.dead_latents import AuxK, Remedy
from helpers.dictionaries.sharded import processes, split, whole
from helpers.dictionaries.training import TrainConfig, train

D, N, BATCH = 12, 50, 64  # 4 processes hold 12, 13, 12 and 13 latents
CONFIG = TrainConfig(tokens=50 * BATCH, lr=5e-3, remedy=AuxK(k=6, scale_by_dead=True), ema=0.9)
PLAIN = TrainConfig(tokens=50 * BATCH, lr=5e-3, remedy=Remedy())
CASES = {
    "topk": (lambda: SparseAutoencoder(D, N, TopK(20)), PLAIN),  # k is more than a process holds
    "topk auxk": (lambda: SparseAutoencoder(D, N, TopK(2)), CONFIG),
    "batchtopk auxk": (lambda: SparseAutoencoder(D, N, BatchTopK(2)), CONFIG),
    "crosscoder": (lambda: Crosscoder(D // 2, N, BatchTopK(2)), CONFIG),
    "decoupled": (lambda: DecoupledCrosscoder(D // 2, N, BatchTopK(2)), PLAIN),
}


def batches(seed=0):
    """Sums of few of 24 directions: something that a sparse code can find."""
    random = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(24, D, generator=random), dim=1)
    on = (torch.rand(50 * BATCH, 24, generator=random) < 0.08) * (0.5 + torch.rand(50 * BATCH, 24, generator=random))
    return (on @ directions + 0.1).split(BATCH)


def compare(group, folder: Path) -> None:
    for name, (make, config) in CASES.items():
        trained = train(split(make(), group), batches(), config)
        own = {f"own.{k}": v for k, v in trained.sae.state_dict().items()}
        found = {"own x_hat": trained.sae(batches()[0]).detach()}
        sae = whole(trained.sae)
        found |= own | sae.state_dict() | {"curve": trained.record["curve"]}
        torch.save(found, folder / f"{name} {group.rank()} of {group.size()}.pt")


def other_start() -> SparseAutoencoder:
    """Of "batchtopk auxk": only who goes on from a checkpoint ends where that began."""
    return SparseAutoencoder(D, N, BatchTopK(2), seed=1)


def with_checkpoint(sae: SparseAutoencoder, group, folder: Path, x, save_every_minutes: float) -> SparseAutoencoder:
    config = CASES["batchtopk auxk"][1]
    return train(split(sae, group), x, config, None, folder / "training.safetensors", save_every_minutes).sae


def killing():
    """The fourth process is killed at batch 9."""
    for number, x in enumerate(batches()):
        if number == 9 and dist.get_rank() == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        yield x


def main(task: str, folder: Path) -> None:
    with processes(timeout_minutes=1) as four:
        if task == "killed":
            with_checkpoint(CASES["batchtopk auxk"][0](), four, folder, killing(), 0.0)
        two = dist.new_group([0, 1])
        compare(four, folder)
        if four.rank() in (0, 1):
            compare(two, folder)
            for of, place in {"four": folder, "one": folder / "of one"}.items():
                sae = with_checkpoint(other_start(), two, place, batches(), 1.0)
                torch.save(whole(sae).state_dict(), folder / f"resumed of {of} {two.rank()}.pt")


if __name__ == "__main__":
    products.has_fast_bf16 = lambda *_: False  # in 16 bits values are often equal, and which of them win is free
    main(sys.argv[1], Path(sys.argv[2]))
