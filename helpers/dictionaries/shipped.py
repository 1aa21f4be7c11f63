"""Dictionaries that the repository ships, so that a laptop reads what takes hours to train.

    w = s q    each row of a matrix: whole numbers q in -127 to 127, and one scale s; all else as it was trained

A dictionary is found by what its cell says: method, size, sparsity, seed, how long and how it was trained. The text may
be another, since another Python has other documentation: then a warning says so. Its quality is measured on the text at
hand.
"""

import copy
import dataclasses
import warnings
from pathlib import Path

import torch
from torch import Tensor

from helpers.base.storage import load_state, save_state
from helpers.dictionaries.autoencoders import SparseAutoencoder
from helpers.dictionaries.sweep_store import Finished, StoredCell, measure

LEVELS = 127
WORSE = 0.01  # share by which 8 bits may raise NMSE
SCALE = ".scale"
OF_THE_RUN = ("stream", "products")  # parts of an identity that differ between machines


@dataclasses.dataclass(frozen=True)
class Shelf:
    """A folder of shipped dictionaries."""

    folder: Path

    def put(self, stored: StoredCell, finished: Finished, heldout: Tensor) -> Path:
        """Write a trained dictionary in 8 bits. Raises ValueError where that raises its NMSE by more than `WORSE`."""
        state = in_8_bits(finished.sae.state_dict())
        (rounded := copy.deepcopy(finished.sae)).load_state_dict(in_full(state))
        nmse = measure(rounded, heldout)["nmse"]
        if nmse > (1 + WORSE) * finished.quality["nmse"]:
            raise ValueError(f"in 8 bits NMSE is {nmse:.4f}, it was {finished.quality['nmse']:.4f}: ship it as it is")
        path = self.path(stored)
        save_state(path, state, identity=stored.identity, record=finished.record)
        return path

    def get(self, stored: StoredCell, sae: SparseAutoencoder, heldout: Tensor) -> Finished | None:
        """What was put there for such a cell, its weights put into `sae`; None if nothing was.

        Raises ValueError for a file that cannot be read.
        """
        if not (path := self.path(stored)).is_file():
            return None
        state, about = load_state(path)
        sae.load_state_dict(in_full(state))
        if about["identity"]["stream"] != stored.identity["stream"]:
            warnings.warn(f"{path.name} was trained on another text or model than those at hand", stacklevel=2)
        return Finished(sae.eval(), about["record"], measure(sae, heldout))

    def path(self, stored: StoredCell) -> Path:
        cell = {name: value for name, value in stored.identity.items() if name not in OF_THE_RUN}
        return dataclasses.replace(stored, directory=self.folder, identity=cell).path


def in_8_bits(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each matrix as int8 (n, d), with the scales of its rows beside it (n, 1); other tensors as they are."""
    found = {}
    for name, tensor in state.items():
        found[name] = tensor
        if tensor.ndim == 2:
            scale = tensor.abs().amax(1, keepdim=True).clamp_min(torch.finfo(tensor.dtype).tiny) / LEVELS
            found |= {name: (tensor / scale).round().to(torch.int8), name + SCALE: scale}
    return found


def in_full(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse, but for the rounding: each entry within half a scale of what it was."""
    plain = {name: tensor for name, tensor in state.items() if not name.endswith(SCALE)}
    return {name: x * state[name + SCALE] if name + SCALE in state else x for name, x in plain.items()}
