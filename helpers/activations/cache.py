"""Keep harvested activations on disk in 16 bits: one raw file, and one JSON that says of what they are.

The files' name is the SHA-256 of that JSON, so activations of another model, site, text or normalisation are another
file. A file is complete when it has its final name, and is used when its JSON and its size are right.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from helpers.base.storage import cache_dir, largest_leftover, write_atomic, written_aside


class ActivationCache:
    """Activations of `shape` (..., d_model), stored as float16, or as bfloat16 where norms may overflow it.

    `depends_on` is all that they depend on, in JSON's types.
    """

    def __init__(self, depends_on: dict, shape: tuple[int, ...], dtype: torch.dtype):
        self.header = {**depends_on, "shape": list(shape), "dtype": str(dtype)}
        self.shape, self.dtype = shape, dtype
        name = hashlib.sha256(json.dumps(self.header, sort_keys=True).encode()).hexdigest()
        self.path = cache_dir() / "activations" / f"{name}.bin"

    def ready(self) -> bool:
        """Whether the activations are on disk."""
        size = math.prod(self.shape) * self.dtype.itemsize
        return self.path.is_file() and self.path.stat().st_size == size and self._stored_header() == self.header

    def begun(self) -> int:
        """How many activations an interrupted `write` has left, for the next one to go on from."""
        left = largest_leftover(self.path)
        return left.stat().st_size // self._bytes_each if left else 0

    def write(self, pieces: Iterable[torch.Tensor], begun: int = 0) -> None:
        """Store (n, d_model) pieces that follow each other: all activations in their order, but for the first `begun`.

        Says so in one line if a file is there already. Raises OSError on a full disk. A failure leaves no file, an
        interruption what `begun` counts.
        """
        if self.path.exists():
            print(f"{self.path} is cut short or not what its name says: harvesting it again")
        with written_aside(self.path, goes_on=True) as aside:
            with aside.open("r+b") as file:
                file.truncate(begun * self._bytes_each)
                file.seek(0, os.SEEK_END)
                for piece in pieces:
                    file.write(piece.to("cpu", self.dtype).contiguous().view(torch.int16).numpy())
                    file.flush()  # what is killed now has lost nothing
            write_atomic(self._json, json.dumps(self.header, sort_keys=True, indent=1))  # first: it is no use alone
        vars(self).pop("_stored", None)  # of the file that was there before

    def read(self, places: torch.Tensor) -> torch.Tensor:
        """Activations at some places (n,) of all, as stored: (n, d_model). Nothing else of the file is in memory."""
        return self._stored.index_select(0, places)

    @cached_property
    def _stored(self) -> torch.Tensor:
        """The whole file, mapped into memory, which all processes of a machine share: (n, d_model)."""
        options = {"shared": False, "size": math.prod(self.shape), "dtype": self.dtype}  # shared ones can be written to
        return torch.from_file(str(self.path), **options).view(-1, self.shape[-1])

    def __getstate__(self) -> dict:
        """To pickle: whoever receives it maps the file itself."""
        return {name: value for name, value in vars(self).items() if name != "_stored"}

    @property
    def _bytes_each(self) -> int:
        return self.shape[-1] * self.dtype.itemsize

    @property
    def _json(self) -> Path:
        return self.path.with_suffix(".json")

    def _stored_header(self) -> dict | None:
        try:
            return json.loads(self._json.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None


class ModelElsewhere(NamedTuple):
    """In a subject's place where there is only the cache of its activations."""

    d_model: int
    device: torch.device
    path: Path  # of the cache

    def residuals(self, tokens: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(
            f"{self.path} cannot be used here, where no model is to harvest it again: run again, and let all machines "
            "that take part share the folder SUITE_CACHE"
        )
