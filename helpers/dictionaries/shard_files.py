"""A training's state whose latents lie in several processes: a file that tells of it, and a part of each process.

The file is a state of `base.storage` with what all processes share, and names the parts, which hold rows of latents. A
part is never written over: the file is, in one step, when all parts of a new state are there, and then the old ones go.
So whoever is killed at any time leaves a whole state, and any number of processes can take it up: each reads the rows
that are its own, wherever they lie. They may lie in the file itself, as one process leaves them, and one process may
take up what several left.
"""

import glob
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.distributed as dist
from torch import Tensor

from helpers.base.storage import save_state
from helpers.dictionaries import shards

PER_LATENT = ("W_enc", "W_dec", "b_enc", "silent")  # names, or parts of names, of tensors with a row for each latent


def save_shards(path: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup, tokens: int, **metadata: Any) -> None:
    """Write a state of all processes at once: `tensors` as this one has them. `tokens` tells states apart."""
    part = Path(f"{path}.{tokens}.{group.rank()}-of-{group.size()}")
    own = {name: tensor for name, tensor in tensors.items() if _per_latent(name)}
    save_state(part, own)
    rows = shards.gathered(torch.tensor(len(own["silent"])), group).tolist()  # now all parts are there
    if group.rank() == 0:
        parts = [(f"{path.name}.{tokens}.{rank}-of-{group.size()}", n) for rank, n in enumerate(rows)]
        common = {name: tensor for name, tensor in tensors.items() if name not in own}
        save_state(path, common, parts=parts, tokens=tokens, **metadata)
        for old in set(path.parent.glob(f"{glob.escape(path.name)}.*-of-*")) - {path.with_name(n) for n, _ in parts}:
            old.unlink()


def own_rows(
    path: Path, tensors: dict[str, Tensor], parts: list[tuple[str, int]] | None, first: int, last: int
) -> dict[str, Tensor]:
    """The `tensors` of the state at `path` with rows first ... last, of its `parts` or, without any, its own.

    Raises what `load_rows` raises.
    """
    if parts:
        return tensors | load_rows(path, parts, first, last)
    return {name: tensor[first:last] if _per_latent(name) else tensor for name, tensor in tensors.items()}


def load_rows(path: Path, parts: list[tuple[str, int]], first: int, last: int) -> dict[str, Tensor]:
    """Rows first ... last of every tensor in the `parts` (name, rows) of the state at `path`.

    Raises ValueError naming a part that is not there or not whole.
    """
    pieces, begin = {}, 0
    for part, n in parts:
        some = slice(max(first - begin, 0), min(last - begin, n))
        begin += n
        if some.start < some.stop:
            for name, rows in _rows(path.with_name(part), some).items():
                pieces.setdefault(name, []).append(rows)
    return {name: torch.cat(each) for name, each in pieces.items()}


def _rows(path: Path, some: slice) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_slice(name)[some] for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is not a whole part of a checkpoint ({error}); put it back, or start anew") from error


def _per_latent(name: str) -> bool:
    return not set(PER_LATENT).isdisjoint(name.split("."))
