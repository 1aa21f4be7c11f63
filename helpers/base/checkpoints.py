"""A training's state on disk: one safetensors file with named tensors and JSON metadata, never a pickle.

Written aside and renamed, so an interrupted run finds either the old state or the new one.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from helpers.base.storage import written_aside


def save_state(path: Path, tensors: dict[str, Tensor], **metadata: Any) -> None:
    """Write tensors and JSON-able metadata to `path` in one step."""
    with written_aside(Path(path)) as aside:
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(contiguous, aside, {k: json.dumps(v) for k, v in metadata.items()})


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata) of a file written by `save_state`. Raises ValueError naming a file that cannot be read."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return tensors, {k: json.loads(v) for k, v in (file.metadata() or {}).items()}
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole checkpoint ({error}); delete it and run again") from error


def training_tensors(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """A training's tensors: weights as `model.<name>`, states as `optimizer<i>.<parameter index>.<entry>`."""
    tensors = _weights(model)
    for i, optimizer in enumerate(optimizers):
        tensors |= optimizer_tensors(optimizer, f"optimizer{i}")
    return tensors


def restore_training(tensors: dict[str, Tensor], model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Put back what `training_tensors` took. Raises ValueError, and changes nothing, if `model` is another model."""
    weights = _weights(model)
    saved = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("model.")}
    if saved != {name: weight.shape for name, weight in weights.items()}:
        raise ValueError("the checkpoint is of another model; build the same one, or move the checkpoint away")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[name])
    for i, optimizer in enumerate(optimizers):
        load_optimizer(optimizer, tensors, f"optimizer{i}")


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """Every tensor of an optimiser's state, named `prefix.<parameter index>.<entry>`."""
    state = optimizer.state_dict()["state"]
    return {f"{prefix}.{i}.{k}": torch.as_tensor(v) for i, entries in state.items() for k, v in entries.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str) -> None:
    """Put back a copy of what `optimizer_tensors` took; learning rates and other settings stay those of `optimizer`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{prefix}."):
            _, index, entry = name.rsplit(".", 2)
            state.setdefault(int(index), {})[entry] = tensor.clone()  # it is updated in place
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": parameter for name, parameter in model.named_parameters()}  # a tied one comes once
