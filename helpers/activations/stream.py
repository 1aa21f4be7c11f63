"""Harvest the residual stream at a subject's site into shuffled, normalised batches that stream.

Each activation x in R^d is centred over its own coordinates and scaled to unit length (Gao et al. 2024, section 2.1),

    m = mean_i x_i,    s = |x - m|,    y = (x - m) / s,    and back:    x = s y + m.

Tokens are cut into rows of `context`. Rows come in random order, in blocks as large as memory may be; a block is
harvested, shuffled as a whole and drained before the next is harvested. The order depends on seed, epoch and block
alone, so that a stream can be taken up anywhere at the price of one block.
"""

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Hashable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from helpers.activations.cache import ActivationCache, ModelElsewhere

if TYPE_CHECKING:
    from helpers.subjects.subject import Subject  # takes seconds to import, which workers without a model can save

DROPS = {"first": 1, "none": 0}  # positions left out of each row: the first one has a huge norm
NORMALISATIONS = ("unit", "none")


class Scale(NamedTuple):
    """What `normalise` took away, (..., 1) each."""

    mean: torch.Tensor
    norm: torch.Tensor


def normalise(x: torch.Tensor, mode: str = "unit") -> tuple[torch.Tensor, Scale]:
    """Centre each (..., d_model) over its coordinates and scale it to unit length; "none" leaves it as it is.

    `undo` inverts. A constant x becomes zero.
    """
    if mode == "none":
        return x, Scale(torch.zeros_like(x[..., :1]), torch.ones_like(x[..., :1]))
    if mode != "unit":
        raise ValueError(f'unknown normalisation "{mode}": use one of {", ".join(NORMALISATIONS)}')
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    norm = centred.norm(dim=-1, keepdim=True)
    return centred / norm.clamp_min(torch.finfo(x.dtype).tiny), Scale(mean, norm)


def undo(x: torch.Tensor, scale: Scale) -> torch.Tensor:
    """The inverse of `normalise`, (..., d_model) -> (..., d_model)."""
    return x * scale.norm + scale.mean


@dataclasses.dataclass(frozen=True)
class Harvest:
    """How activations are taken from a subject."""

    context: int = 128  # tokens a row; the papers use 64 (autoencoders) and 1,024 (crosscoders)
    drop: str = "first"
    normalisation: str = "unit"
    rows: int = 16  # rows a forward pass; about 2,000 tokens stay near the processor, more is slower there
    dtype: torch.dtype = torch.float32  # of the batches

    def __post_init__(self):
        if self.drop not in DROPS:
            raise ValueError(f'unknown rule for positions "{self.drop}": use one of {", ".join(DROPS)}')
        if self.normalisation not in NORMALISATIONS:
            raise ValueError(f'unknown normalisation "{self.normalisation}": use one of {", ".join(NORMALISATIONS)}')
        if self.kept < 1 or self.rows < 1:
            raise ValueError(f"a forward pass of {self.rows} rows of {self.context} tokens gives nothing: use more")

    @property
    def kept(self) -> int:
        """Activations a row."""
        return self.context - DROPS[self.drop]


def harvest_rows(subject: "Subject", rows: torch.Tensor, harvest: Harvest) -> torch.Tensor:
    """Activations of token rows in one forward pass, (B, context) -> (B * kept, d_model) in float32.

    Raises ValueError if any is NaN or infinite.
    """
    residuals = subject.residuals(rows)[:, DROPS[harvest.drop] :]
    broken = ~residuals.sum(-1).isfinite()  # a sum is finite only if all are, and costs a tenth of testing each
    if broken.any():
        row, position = broken.nonzero()[0].tolist()
        raise ValueError(
            f"{broken.sum()} of {broken.numel()} activations of {subject.name} at {subject.site} are NaN or infinite, "
            f"first in row {row} at position {position + DROPS[harvest.drop]}: check the weights, or load in float32"
        )
    return normalise(residuals, harvest.normalisation)[0].flatten(0, 1)


class ActivationStream:
    """Shuffled activations of `tokens`, with at most `memory_limit_gb` (1e9 bytes) of them in memory beside a batch.

    tokens   (n,) ids of documents one after the other; a rest shorter than a row is left out
    cache    keep the activations on disk, in 16 bits, and harvest only what is not there yet
    """

    def __init__(
        self,
        subject: "Subject",
        tokens: torch.Tensor | np.ndarray,
        harvest: Harvest | None = None,
        batch_size: int = 4096,
        seed: int = 0,
        memory_limit_gb: float = 1.0,
        cache: bool = False,
    ):
        self.subject, self.harvest, self.batch_size, self.seed = subject, harvest or Harvest(), batch_size, seed
        self.rows = _rows(tokens, self.harvest.context, subject)
        self.n_activations = len(self.rows) * self.harvest.kept  # an epoch
        self.rows_per_block = self._rows_per_block(memory_limit_gb)
        self.position = 0  # activations yielded so far by the latest `batches`
        self._held, self._order = _One(), _One()  # the block in memory, and the order in which it is given out
        self._cache = self._open_cache() if cache else None

    def batches(
        self, n_tokens: int | None = None, batch_size: int | None = None, start: dict | None = None
    ) -> Iterator[torch.Tensor]:
        """Yield (batch_size, d_model) until `n_tokens` activations have come, by default those of one epoch.

        Each epoch holds every activation once, in an order of its own. Only the very last batch can be shorter.
        From `start`, a `state()`, on, the batches are those of an uninterrupted run; `n_tokens` counts the whole run.
        Another `batch_size` than the stream's cuts the same activations otherwise.
        """
        size = self._checked(self.batch_size if batch_size is None else batch_size)
        position = self.position = self._position(start)
        end = self.n_activations if n_tokens is None else n_tokens
        while position < end:
            batch = self._read(position, min(size, end - position))
            position = self.position = position + len(batch)  # not the shared one: another `batches` may be under way
            yield batch

    def take(self, n: int) -> torch.Tensor:
        """The first n shuffled activations, (n, d_model), for means and variances. Does not move the stream."""
        return self._read(0, n)

    def state(self) -> dict:
        """Where the latest `batches` is, for its `start`: JSON's types."""
        return {"position": self.position, "stream": self.fingerprint}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that the activations and their order depend on."""
        order = {"seed": self.seed, "rows_per_block": self.rows_per_block}
        return hashlib.sha256(json.dumps(self._depends_on | order).encode()).hexdigest()

    def reader(self) -> "ActivationStream":
        """The same stream without model and text, for other processes: it only reads the cache, and pickles.

        Harvests now if that was not done. Raises ValueError for a stream without a cache.
        """
        if not self._cache:
            raise ValueError("other processes read activations from disk: make the ActivationStream with cache=True")
        if not self._cache.ready():
            self._fill_cache()
        reader = copy.copy(self)
        reader.subject = ModelElsewhere(self.subject.d_model, self.subject.device, self._cache.path)
        reader.rows = self.rows.new_empty(len(self.rows), 0)
        reader._held, reader._order = _One(), _One()
        return reader

    def _position(self, start: dict | None) -> int:
        if start is not None and start["stream"] != self.fingerprint:
            raise ValueError(
                "the state to go on from is another stream's: give this one the same subject, tokens, harvest, seed "
                "and memory limit, or start anew"
            )
        return 0 if start is None else start["position"]

    def _read(self, position: int, n: int) -> torch.Tensor:
        """Activations position ... position + n of the endless stream, (n, d_model)."""
        pieces = []
        while n > 0:
            pieces.append(self._read_block(position, n))
            position += len(pieces[-1])
            n -= len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _read_block(self, position: int, n: int) -> torch.Tensor:
        """The same, to the end of one block at most."""
        epoch, within = divmod(position, self.n_activations)
        block, within = divmod(within, self.rows_per_block * self.harvest.kept)
        key = (0, 0) if self.rows_per_block == len(self.rows) else (epoch, block)  # one block serves every epoch
        activations = self._held.get(key, lambda: self._activations(self._block_rows(*key)))
        order = self._order.get((epoch, block), lambda: _permutation(len(activations), self.seed, epoch, block))
        return activations[order[within : within + n].to(activations.device)]

    def _block_rows(self, epoch: int, block: int) -> torch.Tensor:
        return _permutation(len(self.rows), self.seed, epoch).split(self.rows_per_block)[block]

    def _activations(self, rows: torch.Tensor) -> torch.Tensor:
        """Activations of some rows (r,), row after row: (r * kept, d_model)."""
        if self._cache and not self._cache.ready():
            self._fill_cache()
        pieces = self._cache.read(rows, self.harvest.rows) if self._cache else self._harvested(rows)
        shape = (len(rows) * self.harvest.kept, self.subject.d_model)
        filled = torch.empty(shape, dtype=self.harvest.dtype, device=self.subject.device)
        for place, piece in zip(filled.split(self.harvest.rows * self.harvest.kept), pieces, strict=True):
            place.copy_(piece)
        return filled

    def _fill_cache(self) -> None:
        self._cache.write(self._harvested(torch.arange(len(self.rows))))

    def _harvested(self, rows: torch.Tensor) -> Iterator[torch.Tensor]:
        parts, size = rows.split(self.harvest.rows), self.harvest.rows * self.harvest.context
        bar = tqdm(parts, "harvest", unit=" tokens", unit_scale=size, delay=2, mininterval=1, leave=False)
        return (harvest_rows(self.subject, self.rows[some], self.harvest) for some in bar)

    def _checked(self, batch_size: int) -> int:
        if not 1 <= batch_size <= self.n_activations:
            raise ValueError(
                f"a batch of {batch_size} is not within an epoch of {self.n_activations}: choose another size"
            )
        return batch_size

    def _rows_per_block(self, memory_limit_gb: float) -> int:
        if self.n_activations < self.batch_size:
            raise ValueError(
                f"{len(self.rows)} rows of {self.harvest.context} tokens give {self.n_activations} activations, fewer "
                f"than one batch of {self.batch_size}: pass more tokens, or a smaller batch_size"
            )
        bytes_each = self.subject.d_model * self.harvest.dtype.itemsize + 8  # 8 for its place in the order
        fitting = int(memory_limit_gb * 1e9) // (self.harvest.kept * bytes_each)  # rows
        if fitting * self.harvest.kept < self.batch_size:
            raise ValueError(
                f"memory_limit_gb={memory_limit_gb} holds {fitting * self.harvest.kept} activations, fewer than one "
                f"batch of {self.batch_size}: raise the limit, or use a smaller batch_size"
            )
        n_blocks = math.ceil(len(self.rows) / fitting)
        return math.ceil(len(self.rows) / n_blocks)  # blocks of one size, so that none is small and badly mixed

    @cached_property
    def _depends_on(self) -> dict:
        """All that the activations depend on, in JSON's types."""
        return {
            "subject": self.subject.fingerprint,
            "site": self.subject.site,
            "computed_in": str(self.subject.dtype),
            "tokens": hashlib.sha256(self.rows.to(torch.int64).numpy()).hexdigest(),
            "context": self.harvest.context,
            "drop": self.harvest.drop,
            "normalisation": self.harvest.normalisation,
        }

    def _open_cache(self) -> ActivationCache:
        dtype = torch.float16 if self.harvest.normalisation == "unit" else torch.bfloat16  # raw ones can overflow
        return ActivationCache(self._depends_on, (len(self.rows), self.harvest.kept, self.subject.d_model), dtype)


class _One:
    """Remembers one value, and lets go of it before it makes the next. Threads may share it."""

    def __init__(self):
        self.held = None

    def get(self, key: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        held = self.held  # read once: another thread may change it
        if held is None or key != held[0]:
            self.held = held = None
            self.held = held = (key, make())
        return held[1]


def _rows(tokens: torch.Tensor | np.ndarray, context: int, subject: "Subject") -> torch.Tensor:
    """(n,) -> (n // context, context), a view."""
    tokens = torch.as_tensor(tokens)
    if tokens.ndim != 1 or tokens.is_floating_point():
        raise ValueError(f"tokens must be one row of integer ids, not {tokens.dtype} of shape {tuple(tokens.shape)}")
    if context > subject.context:
        raise ValueError(f"Harvest.context is {context} but {subject.name} reads at most {subject.context}: lower it")
    return tokens[: len(tokens) // context * context].view(-1, context)


def _permutation(n: int, *key: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(key).permutation(n))
