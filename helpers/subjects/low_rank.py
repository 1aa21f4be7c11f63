"""A fine-tune as a low-rank difference: trained beside frozen weights, shipped without them, merged where it is loaded.

    y = W x + up (down x)        down (rank, d_in), up (d_out, rank), up = 0 at the start: LoRA with its scale at 1

Only the differences are trained, of every projection inside the blocks, and only they are shipped: 7.6 MB for Gemma 3
270M at rank 16. Merged, W + up down, the model is an ordinary one: bridge, patching and generation see no difference.

Source: Hu et al. 2022, section 4.1.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from helpers.base.storage import load_state, restore_training, save_state, training_tensors, written_aside

RANK = 16
FILE = "low_rank.safetensors"  # in a subject's folder
PARTS = ("down", "up")
WARMUP = 0.05  # share of the updates
SAVE_EVERY = 10  # updates


class LowRank(nn.Module):
    """A frozen linear map and its low-rank difference."""

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.linear, self.counts = linear, True
        self.down = nn.Parameter(torch.randn(rank, linear.in_features, generator=generator) / linear.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y + F.linear(F.linear(x, self.down), self.up) if self.counts else y


def add_low_rank(model: PreTrainedModel, rank: int = RANK, seed: int = 0) -> list[nn.Parameter]:
    """Freeze `model` and put a difference beside every linear map of its blocks; the parameters to train."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name in _projections(model):
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, LowRank(model.get_submodule(name), rank, generator))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@contextlib.contextmanager
def as_base(model: PreTrainedModel) -> Iterator[None]:
    """While it lasts, the model is the one without its differences."""
    wrapped = [module for module in model.modules() if isinstance(module, LowRank)]
    try:
        for module in wrapped:
            module.counts = False
        yield
    finally:
        for module in wrapped:
            module.counts = True


def differences(model: PreTrainedModel) -> dict[str, Tensor]:
    """What `merge` takes, of a model with `add_low_rank`'s modules: up and down of each map, by its name."""
    wrapped = {name: module for name, module in model.named_modules() if isinstance(module, LowRank)}
    return {f"{name}.{part}": getattr(module, part).detach() for name, module in wrapped.items() for part in PARTS}


def tune(
    model: PreTrainedModel,
    batches: Iterable[Any],
    n_steps: int,
    loss: Callable[[PreTrainedModel, Any], Tensor],
    checkpoint: Path,
    lr: float = 1e-3,
) -> list[float]:
    """Train the differences of `model` (`add_low_rank`) on the first `n_steps` batches; the loss of each.

    AdamW, a short warm-up, then a rate that falls to zero. A run that finds `checkpoint` goes on from it, with the same
    batches: those it has seen are skipped. Raises ValueError where training diverges, for the checkpoint of another
    model, and for too few batches.
    """
    trained = nn.ParameterList(parameter for parameter in model.parameters() if parameter.requires_grad)
    optimizer, losses = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0), []
    if checkpoint.is_file():
        tensors, metadata = load_state(checkpoint)
        restore_training(tensors, trained, [optimizer])
        losses = metadata["losses"]
    source = iter(batches)
    for step in tqdm(range(n_steps)):
        if (batch := next(source, None)) is None:
            raise ValueError(f"there are {step} batches for {n_steps} updates: give more, or ask for fewer")
        if step < len(losses):
            continue
        value = loss(model, batch)
        if not math.isfinite(value.item()):
            raise ValueError(
                f"training diverged: the loss of update {step + 1} is {value.item()}; lower lr (now {lr:g})"
            )
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / (WARMUP * n_steps), 1 - step / n_steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
        if len(losses) % SAVE_EVERY == 0 or len(losses) == n_steps:
            save_state(checkpoint, training_tensors(trained, [optimizer]), losses=losses)
    return losses


@torch.no_grad()
def merge(model: PreTrainedModel, found: Mapping[str, Tensor]) -> None:
    """Add differences to the weights of an ordinary model, in place.

    Raises ValueError for the differences of a model of other names or shapes.
    """
    names = _projections(model)
    if other := sorted({f"{name}.{part}" for name in names for part in PARTS} ^ found.keys()):
        raise ValueError(f"the low-rank difference and the model do not fit, first at {other[0]}: use its own base")
    for name in names:
        weight, (down, up) = model.get_submodule(name).weight, (found[f"{name}.{part}"].float() for part in PARTS)
        if up.shape[0] != weight.shape[0] or down.shape[1] != weight.shape[1] or up.shape[1] != down.shape[0]:
            shapes = f"{tuple(up.shape)} and {tuple(down.shape)}"
            raise ValueError(f"{name} is {tuple(weight.shape)}, its low-rank difference {shapes}: use its own base")
        weight += (up @ down).to(weight)


def save_differences(found: Mapping[str, Tensor], folder: Path) -> None:
    """Write them in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    with written_aside(folder / FILE) as aside:
        safetensors.torch.save_file({name: part.to(torch.bfloat16).contiguous() for name, part in found.items()}, aside)


def load_differences(folder: Path) -> dict[str, Tensor]:
    """What `save_differences` wrote. Raises ValueError for a file that cannot be read."""
    try:
        return safetensors.torch.load_file(folder / FILE)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{folder / FILE} cannot be read ({error}): fetch the repository's file again") from error


def _projections(model: PreTrainedModel) -> list[str]:
    """Names of the linear maps inside the blocks; the head is outside."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
