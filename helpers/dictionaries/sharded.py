"""Training an autoencoder or crosscoder that one device cannot hold, by processes that `torchrun` started.

    with processes() as group:
        sae = split(SparseAutoencoder(d_model, n_latents, TopK(k)), group)
        trained = train(sae, stream.batches(), config, checkpoint=path)      in every process, on the same batches
        sae = whole(trained.sae)                                             in every process, where it fits

`train` is that of one process, and so is what it gives but for rounding. TopK and BatchTopK can be divided, their
crosscoders as well, against dead latents AuxK or nothing.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from helpers.dictionaries import shards
from helpers.dictionaries.autoencoders import BatchTopK, SparseAutoencoder, TopK

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

    Raises ValueError for an architecture whose latents do not compete by TopK or BatchTopK.
    """
    if type(sae.activation) not in (TopK, BatchTopK):
        raise ValueError(f"{type(sae.activation).__name__} is not trained by several processes: use TopK or BatchTopK")
    first, last = shards.span(sae.n_latents, group)
    for name in PER_LATENT:
        setattr(sae, name, nn.Parameter(getattr(sae, name).detach()[first:last].clone()))
    return _competing_in(sae, group)


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


def _competing_in(sae: SparseAutoencoder, group: shards.Group) -> SparseAutoencoder:
    for module in sae.modules():
        if isinstance(module, TopK | BatchTopK):
            module.group = group
    return sae
