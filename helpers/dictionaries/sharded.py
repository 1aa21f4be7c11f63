"""Training an autoencoder or crosscoder that one device cannot hold, by processes that `torchrun` started.

    with processes() as group:
        stream = ActivationStream(Together(subject, group), tokens)          each runs the model on its share of rows
        sae = split(SparseAutoencoder(d_model, n_latents, TopK(k)), group)   or `part`, where no process could hold all
        trained = train(sae, stream.batches(), config, checkpoint=path)      in every process, on the same batches
        sae = whole(trained.sae)                                             in every process, where it fits

`train` is that of one process, and so is what it gives but for rounding. TopK and BatchTopK can be divided, their
crosscoders as well, against dead latents AuxK or nothing.
"""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from helpers.dictionaries import shards
from helpers.dictionaries.autoencoders import BatchTopK, SparseAutoencoder, TopK

if TYPE_CHECKING:
    from helpers.subjects.subject import Subject

PER_LATENT = ("W_enc", "W_dec", "b_enc")  # parameters with a row for each latent


@contextlib.contextmanager
def processes(timeout_minutes: float = 10.0, device: str = "cpu") -> Iterator[dist.ProcessGroup]:
    """All that `torchrun` started, joined while it lasts. Who does not answer for so long is taken for dead."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=timeout_minutes))
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def split(sae: SparseAutoencoder, group: dist.ProcessGroup) -> SparseAutoencoder:
    """Leave this process its share of a whole `sae`, which is the same in all of them. Changes `sae`, and returns it.

    Raises ValueError for an architecture whose latents do not compete by TopK or BatchTopK, or are not all alike.
    """
    sae, (first, last) = _competing_in(sae, group), shards.span(sae.n_latents, group)
    for name in PER_LATENT:
        setattr(sae, name, nn.Parameter(getattr(sae, name).detach()[first:last].clone()))
    return sae


def part(make: Callable[[int, int], SparseAutoencoder], n_latents: int, group: dist.ProcessGroup) -> SparseAutoencoder:
    """This process's share of `n_latents`: `make(n, seed)` is called for its own alone. Raises ValueError as `split`.

    Which start the latents have depends on how many processes there are; a checkpoint does not.
    """
    first, last = shards.span(n_latents, group)
    return _competing_in(make(last - first, first), group)


@torch.no_grad()
def whole(sae: SparseAutoencoder) -> SparseAutoencoder:
    """Undo `split`: every process gets the rows of all."""
    group = sae.group
    sizes = shards.gathered(torch.tensor([sae.n_latents], device=sae.W_dec.device), group).flatten().tolist()
    for name in PER_LATENT:
        own = getattr(sae, name)
        padded = torch.cat([own, own.new_zeros(max(sizes) - len(own), *own.shape[1:])])
        everyone = shards.gathered(padded, group)
        setattr(sae, name, nn.Parameter(torch.cat([part[:n] for part, n in zip(everyone, sizes, strict=True)])))
    return _competing_in(sae, None)


class Together:
    """A subject that all processes run together: each does its share of the rows of a forward pass, all get all of it.

    In the place of `subject` in an `ActivationStream`, whose batches are then the same in every process, and take each
    the p-th part of the work. A stream with a cache refuses it: one process fills that for all of its machine.
    """

    def __init__(self, subject: "Subject", group: dist.ProcessGroup):
        self.subject, self.group = subject, group

    def residuals(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of token rows (B, T), the same in every process: (B, T, d_model)."""
        share = -(-len(tokens) // self.group.size())
        first = share * self.group.rank()
        own = tokens[first : first + share]  # none, where there are fewer rows than processes
        found = self.subject.residuals(own) if len(own) else torch.empty(0, *tokens.shape[1:], self.subject.d_model)
        padded = F.pad(found.to(self.subject.device), (0, 0, 0, 0, 0, share - len(own)))
        return shards.gathered(padded, self.group).flatten(0, 1)[: len(tokens)]

    def __getattr__(self, name: str) -> object:
        return getattr(self.subject, name)


def _competing_in(sae: SparseAutoencoder, group: shards.Group) -> SparseAutoencoder:
    if type(sae.activation) not in (TopK, BatchTopK):
        raise ValueError(f"{type(sae.activation).__name__} is not trained by several processes: use TopK or BatchTopK")
    counts = ("constrain", "other_error")  # latents, and would count those of a part
    if any(getattr(type(sae), name) is not getattr(SparseAutoencoder, name) for name in counts):
        raise ValueError(f"a {type(sae).__name__} is not trained by several processes: use a Crosscoder")
    for module in sae.modules():
        if isinstance(module, TopK | BatchTopK):
            module.group = group
    return sae
