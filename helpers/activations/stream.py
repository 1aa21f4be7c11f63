"""Harvest the residual stream at a subject's site into shuffled, normalised batches that stream.

Each activation x in R^d is centred over its own coordinates and scaled to unit length (Gao et al. 2024, section 2.1),

    m = mean_i x_i,    s = |x - m|,    y = (x - m) / s,    and back:    x = s y + m.

Tokens are cut into rows of `context` (`Subject.rows`). The first position of a row and special tokens are left out
(`Subject.studied`): their residuals are huge and say little of the text.

Rows come in random order, in blocks as large as memory may be; a block is harvested, shuffled as a whole and drained
before the next is harvested. The order depends on seed, epoch and block alone, so that a stream can be taken up
anywhere at the price of one block. From a cache each batch is gathered by itself: the order is the same, and what is in
memory is the batch, so that any number of processes can read one harvest.
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
from helpers.base.checks import checksum
from helpers.base.clock import spent_on
from helpers.base.storage import alone

if TYPE_CHECKING:
    from helpers.subjects.subject import Subject  # takes seconds to import, which workers without a model can save

DROPS = ("special", "none")  # "none" leaves out only the padding at the end of a row
NORMALISATIONS = ("unit", "none")


class Scale(NamedTuple):
    """What `normalise` took away, (..., 1) each."""

    mean: torch.Tensor
    norm: torch.Tensor


def normalise(x: torch.Tensor, mode: str = "unit") -> tuple[torch.Tensor, Scale]:
    """Centre each (..., d_model) over its coordinates and scale it to unit length; "none" leaves it as it is.

    `undo` inverts. A constant x becomes zero, and so does what differs from a constant by no more than rounding.
    """
    if mode == "none":
        return x, Scale(torch.zeros_like(x[..., :1]), torch.ones_like(x[..., :1]))
    if mode != "unit":
        raise ValueError(f'unknown normalisation "{mode}": use one of {", ".join(NORMALISATIONS)}')
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    norm = centred.norm(dim=-1, keepdim=True)
    number = torch.finfo(x.dtype)
    rounding = 8 * number.eps * x.shape[-1] ** 0.5 * mean.abs()
    return (centred / norm.clamp_min(number.tiny)).masked_fill(norm <= rounding, 0.0), Scale(mean, norm)


def undo(x: torch.Tensor, scale: Scale) -> torch.Tensor:
    """The inverse of `normalise`, (..., d_model) -> (..., d_model)."""
    return x * scale.norm + scale.mean


@dataclasses.dataclass(frozen=True)
class Harvest:
    """How activations are taken from a subject."""

    context: int = 128  # tokens a row; the papers use 64 (autoencoders) and 1,024 (crosscoders)
    drop: str = "special"
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
        """Activations a row, where no special token stands inside it."""
        return self.context - (self.drop != "none")

    def described(self, subject: "Subject") -> dict:
        """The policy in JSON's types, for a notebook's record: what is left out by id, and what heads each row."""
        left_out = {"drop": self.drop, "special_ids": subject.special_ids, "head": subject.head}
        return {"context": self.context, "normalisation": self.normalisation} | left_out

    def keeps(self, subject: "Subject", rows: torch.Tensor) -> torch.Tensor:
        """Which positions of token rows (B, T) are harvested: (B, T) bool."""
        return subject.studied(rows) if self.drop == "special" else ~subject.padding(rows)


@spent_on("harvest")
def harvest_rows(subject: "Subject", rows: torch.Tensor, harvest: Harvest) -> torch.Tensor:
    """Activations of token rows (B, context) at the positions that the harvest keeps, (n, d_model) in float32."""
    residuals = subject.residuals(rows)
    return normalise(residuals[harvest.keeps(subject, rows).to(residuals.device)], harvest.normalisation)[0]


class ActivationStream:
    """Shuffled activations of `tokens`, with at most `memory_limit_gb` (1e9 bytes) of them in memory beside a batch.

    tokens   (n,) ids of documents one after the other; a rest shorter than a row is left out
    cache    keep the activations on disk, in 16 bits, harvest only what is not there yet, and hold none in memory
    times    (rows, context) whole numbers: how often the activation of each token comes in an epoch, once by default

    Raises ValueError for `times` that do not fit the rows, and for a cache of what processes run together.
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
        times: torch.Tensor | None = None,
    ):
        if cache and getattr(subject, "group", None):
            raise ValueError(
                "one process fills a cache while the others wait, so no harvest can be divided there: give the stream "
                "cache=False, or the subject itself"
            )
        self.subject, self.harvest, self.batch_size, self.seed = subject, harvest or Harvest(), batch_size, seed
        self.rows = subject.rows(tokens, self.harvest.context)
        keeps = self.harvest.keeps(subject, self.rows)
        self.kept = keeps.sum(1).short()  # (rows,): activations of each
        self.times = None if times is None else _checked_times(times, self.rows)[keeps]  # (activations,), row after row
        self.given = self.kept if times is None else (times * keeps).sum(1)  # (rows,): how many of each an epoch has
        self.n_activations = int(self.given.sum())  # an epoch
        self.rows_per_block = self._rows_per_block(memory_limit_gb)
        self.position = 0  # activations yielded so far by the latest `batches`
        self._bounds = _One()  # where the blocks of an epoch begin and end
        self._held, self._order = _One(), _One()  # the block, and the order in which it is given out
        self._cache = self._open_cache() if cache else None

    def batches(
        self, n_tokens: int | None = None, batch_size: int | None = None, start: dict | None = None
    ) -> Iterator[torch.Tensor]:
        """Yield (batch_size, d_model) until `n_tokens` activations have come, by default those of one epoch.

        Each epoch holds every activation once, or its `times`, in an order of its own. Only the very last batch can be
        shorter.
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
        """The first n shuffled activations, (n, d_model), for means and variances. Does not move the stream.

        Raises ValueError for n below 1.
        """
        if n < 1:
            raise ValueError(f"{n} activations are nothing to measure on: take one or more")
        return self._read(0, n)

    def state(self) -> dict:
        """Where the latest `batches` is, for its `start`: JSON's types."""
        return {"position": self.position, "stream": self.fingerprint}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that the activations and their order depend on."""
        order = {"seed": self.seed, "rows_per_block": self.rows_per_block}
        order |= {} if self.times is None else {"times": hashlib.sha256(self.times.numpy()).hexdigest()}
        precision = {"cached": self._cache is not None, "dtype": str(self.harvest.dtype)}
        if precision == {
            "cached": True,
            "dtype": "torch.float32",
        }:  # what sweeps read keeps the name it is stored under
            precision = {}
        return hashlib.sha256(json.dumps(self._depends_on | order | precision).encode()).hexdigest()

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
        reader.rows = torch.empty(len(self.rows), 0)  # of a type that pickles, unlike uint16
        reader._bounds, reader._held, reader._order = _One(), _One(), _One()
        vars(reader).pop("_first", None)  # made again there
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
        bounds = self._bounds.get(epoch, lambda: self._block_bounds(epoch))
        block = int(np.searchsorted(bounds, within, side="right")) - 1
        within -= bounds[block]
        key = (0, 0) if self.rows_per_block == len(self.rows) else (epoch, block)  # one block serves every epoch
        held = self._held.get(key, lambda: self._block(self._block_rows(*key)))
        order = self._order.get((epoch, block), lambda: self._shuffled(self._block_rows(*key), epoch, block))
        some = held[order[within : within + n].to(held.device)]
        return self._cache.read(some).to(self.subject.device, self.harvest.dtype) if self._cache else some

    def _block_rows(self, epoch: int, block: int) -> torch.Tensor:
        return _permutation(len(self.rows), self.seed, epoch).split(self.rows_per_block)[block]

    def _block_bounds(self, epoch: int) -> np.ndarray:
        """Places in the epoch, (blocks + 1,): block b holds bounds[b] ... bounds[b + 1]."""
        given = self.given[_permutation(len(self.rows), self.seed, epoch)]
        return np.cumsum([0, *(int(part.sum()) for part in given.split(self.rows_per_block))])

    def _shuffled(self, rows: torch.Tensor, epoch: int, block: int) -> torch.Tensor:
        """Places among the activations of some rows (r,), each as often as it comes, in random order."""
        places = torch.arange(int(self.kept[rows].sum()))
        if self.times is not None:
            places = places.repeat_interleave(self.times[self._places(rows)])
        return places[_permutation(len(places), self.seed, epoch, block)]

    def _block(self, rows: torch.Tensor) -> torch.Tensor:
        """Activations of some rows (r,), row after row: (n, d_model); with a cache, their places in it: (n,)."""
        if self._cache:
            if not self._cache.ready():
                with alone(self._cache.path):
                    if not self._cache.ready():  # another process may have been faster
                        self._fill_cache()
            return self._places(rows)
        sizes = [int(self.kept[some].sum()) for some in self._passes(rows)]
        shape = (sum(sizes), self.subject.d_model)
        filled = torch.empty(shape, dtype=self.harvest.dtype, device=self.subject.device)
        for place, piece in zip(filled.split(sizes), self._harvested(rows), strict=True):
            place.copy_(piece)
        return filled

    def _places(self, rows: torch.Tensor) -> torch.Tensor:
        """Where the activations of some rows (r,) stand among those of all rows in their order: (n,)."""
        kept = self.kept[rows].long()
        first = self._first[rows] - (kept.cumsum(0) - kept)  # of a row, less those before it here
        return first.repeat_interleave(kept) + torch.arange(int(kept.sum()))

    @cached_property
    def _first(self) -> torch.Tensor:
        """Where the activations of each row begin among those of all, (rows,)."""
        return self.kept.cumsum(0) - self.kept

    def _fill_cache(self) -> None:
        """Goes on from where an interrupted harvest stopped, at the beginning of a forward pass."""
        rows = torch.arange(len(self.rows))
        ends = np.cumsum([int(self.kept[some].sum()) for some in self._passes(rows)])
        done = int(np.searchsorted(ends, self._cache.begun(), side="right"))
        begun = int(ends[done - 1]) if done else 0
        self._cache.write(self._harvested(rows[done * self.harvest.rows :]), begun)

    def _passes(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return rows.split(self.harvest.rows)

    def _harvested(self, rows: torch.Tensor) -> Iterator[torch.Tensor]:
        size = self.harvest.rows * self.harvest.context
        bar = tqdm(self._passes(rows), "harvest", unit=" tokens", unit_scale=size, delay=2, mininterval=1, leave=False)
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
        self._checked(self.batch_size)
        bytes_each = self.subject.d_model * self.harvest.dtype.itemsize + 8  # 8 for its place in the order
        activations = int(memory_limit_gb * 1e9) // bytes_each
        fitting = activations // int(self.kept.max())  # rows
        if fitting * int(self.kept.max()) < self.batch_size:
            raise ValueError(
                f"memory_limit_gb={memory_limit_gb} holds {activations} activations, fewer than one "
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
            "kept": checksum(self.harvest.keeps(self.subject, self.rows)),
            "normalisation": self.harvest.normalisation,
        }

    def _open_cache(self) -> ActivationCache:
        dtype = torch.float16 if self.harvest.normalisation == "unit" else torch.bfloat16  # raw ones can overflow
        return ActivationCache(self._depends_on, (int(self.kept.sum()), self.subject.d_model), dtype)


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


def _checked_times(times: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    if times.shape != rows.shape or times.is_floating_point() or (times < 0).any():
        raise ValueError(
            f"times are {times.dtype} {tuple(times.shape)}: give each token of the rows {tuple(rows.shape)} a whole "
            "number, 0 or more"
        )
    return times


def _permutation(n: int, *key: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(key).permutation(n))
