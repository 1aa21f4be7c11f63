"""One of four processes that `torchrun` starts for test_sharded.py: each case by all four, then by the first two.

What comes of a case lies in the folder that is named, for the test to compare with one process.
"""

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
    "topk": (lambda: SparseAutoencoder(D, N, TopK(3)), PLAIN),
    "topk more than a process holds": (lambda: SparseAutoencoder(D, N, TopK(20)), PLAIN),
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


if __name__ == "__main__":
    products.has_fast_bf16 = lambda *_: False  # in 16 bits values are often equal, and which of them win is free
    with processes(timeout_minutes=1) as four:
        two = dist.new_group([0, 1])
        for group in (four, two):
            if group != dist.GroupMember.NON_GROUP_MEMBER:
                compare(group, Path(sys.argv[1]))
