"""Keep what a sweep has finished on disk: a safetensors file for each autoencoder, with its record and its quality.

A file's name ends in the SHA-256 of the identity, that is of all the weights depend on: configuration, tokens, stream.
So a folder holds the cells of any number of sweeps, and a cell that changes is another file. The identity is in the
file as well, and a file that is not what its name says is refused, not used and not overwritten. A cell under way has
a checkpoint beside it, which goes when the cell is finished.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from helpers.base.storage import load_state, save_state
from helpers.dictionaries.autoencoders import SparseAutoencoder
from helpers.dictionaries.quality import evaluate

VERSION = 1  # of the files; raise it when their content changes, or when training gives other weights


class Finished(NamedTuple):
    """A trained autoencoder and what is known about it."""

    sae: SparseAutoencoder
    record: dict  # of helpers.dictionaries.training
    quality: dict  # nmse, l0, l0_sd, dead on held-out activations


@dataclasses.dataclass(frozen=True)
class StoredCell:
    """Where one cell of a sweep is kept. `identity`: all that its weights depend on, in JSON's types."""

    directory: Path
    label: str  # for people; the name begins with it
    identity: dict

    @property
    def path(self) -> Path:
        key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        return Path(self.directory) / f"{self.label}-{key[:16]}.safetensors"

    @property
    def checkpoint(self) -> Path:
        """Of the training under way."""
        return self.path.with_suffix(".checkpoint")

    def save(self, finished: Finished, heldout: Tensor) -> None:
        """Write it in one step; `heldout` (n, d_model) is what its quality was measured on."""
        about = {"record": finished.record, "quality": finished.quality, "heldout": _digest(heldout)}
        save_state(self.path, finished.sae.state_dict(), version=VERSION, identity=self.identity, **about)
        self.checkpoint.unlink(missing_ok=True)

    def load(self, sae: SparseAutoencoder, heldout: Tensor) -> Finished | None:
        """What was saved, its weights put into `sae`; None if the cell is not finished.

        The quality is measured again if `heldout` is another sample. Raises ValueError for a file that cannot be used.
        """
        if not self.path.is_file():
            return None
        tensors, about = load_state(self.path)
        self._require_own(about)
        sae.load_state_dict(tensors)
        finished = Finished(sae.eval(), about["record"], about["quality"])
        if about["heldout"] != _digest(heldout):
            finished = finished._replace(quality=measure(sae, heldout))
            self.save(finished, heldout)
        self.checkpoint.unlink(missing_ok=True)
        return finished

    def _require_own(self, about: dict) -> None:
        if about.get("version") != VERSION:
            raise ValueError(
                f"{self.path} is in format {about.get('version')} of a sweep's files, this suite uses {VERSION}: "
                "move it away to train the cell again, or use the suite that wrote it"
            )
        if about["identity"] != self.identity:
            raise ValueError(f"{self.path} is of another configuration than its name says: move it away, and run again")


def measure(sae: SparseAutoencoder, heldout: Tensor) -> dict:
    """nmse, l0, l0_sd and dead on activations (n, d_model)."""
    quality = evaluate(sae, heldout)._asdict()
    del quality["density"]
    return quality


def _digest(x: Tensor) -> str:
    return hashlib.sha256(x.detach().cpu().contiguous().view(torch.uint8).numpy()).hexdigest()  # numpy has no bfloat16
