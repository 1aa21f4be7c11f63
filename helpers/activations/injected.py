"""A pair with exact truth: real activations as background, and sparse directions planted on top.

    base  x_b = x + sum_i rho_i a_i v_i             chat  x_c = R x + sum_i a_i v_i

x are activations of a real model, v_i unit directions, a_i >= 0 the strength of direction i at a token, mostly zero,
and R a small rotation of the background, as fine-tuning moves what it does not change. rho says whose a direction is:

    chat-only  rho = 0        shared  rho = 1        weak  rho in between: it is in base, only less of it
    base-only  in base as a_i v_i, absent from chat
    context    at a third of its tokens in both models, at a third in chat alone, at a third in base alone: sharing
               depends on the context (Latent Decoupling)

A method that calls a context direction chat-only, or a weak one that is not nearly so, is wrong about it, and here that
can be counted.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.activations.stream import ActivationStream

KINDS = ("chat-only", "base-only", "shared", "context", "weak")
CASES = ("both", "chat alone", "base alone")  # of a context direction, equally often


class Truth(NamedTuple):
    """What was planted at some tokens."""

    base: Tensor  # (tokens, n_planted): strength in base
    chat: Tensor  # (tokens, n_planted): strength in chat


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is planted."""

    each: int = 16  # directions of every kind, and of every rho
    rhos: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75)  # of the weak ones
    rate: float = 0.01  # share of tokens that a direction is on for
    strength: float = 0.5  # mean of a_i, as a share of the background's mean norm around its mean
    rotation: float = 0.05  # radians, in planes chosen at random

    def __post_init__(self):
        if not 0 < self.rate <= 1 or self.each < 1 or self.strength <= 0:
            raise ValueError(
                f"rate {self.rate}, each {self.each} and strength {self.strength} plant nothing: give a rate in "
                "(0, 1], at least one direction of each kind, and a strength above 0"
            )


class InjectedPair:
    """A stream of pairs (batch, 2, d_model) over a stream of one model's activations; the same plants every time."""

    cases: tuple[str, ...] = CASES  # what its identity says of context directions

    def __init__(self, stream: ActivationStream, plan: Plan | None = None, seed: int = 0):
        self.stream, self.plan, self.seed = stream, plan or Plan(), seed
        self.batch_size = stream.batch_size

    @cached_property
    def labels(self) -> list[str]:
        """The kind of each planted direction."""
        kinds = KINDS[:-1] + ("weak",) * len(self.plan.rhos)
        return [kind for kind in kinds for _ in range(self.plan.each)]

    @cached_property
    def rho(self) -> Tensor:
        """Strength in base over strength in chat, (n_planted,); infinite for base-only, NaN where it varies."""
        values = [0.0, torch.inf, 1.0, torch.nan, *self.plan.rhos]
        return torch.tensor(values).repeat_interleave(self.plan.each)

    @cached_property
    def delta(self) -> Tensor:
        """Delta_norm of a latent that is on wherever its direction is, as least squares would have it: (n_planted,)."""
        return 1 - self.rho.nan_to_num(nan=1.0, posinf=2.0) / 2  # of a context direction both models have as much

    @cached_property
    def directions(self) -> Tensor:
        """(n_planted, d_model), of unit norm, at random."""
        d_model = self._sample.shape[1]
        drawn = torch.randn(len(self.labels), d_model, generator=self._random("directions"))
        return F.normalize(drawn, dim=-1).to(self._sample)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that the pairs depend on."""
        parts = (self.stream.fingerprint, dataclasses.astuple(self.plan), self.cases, self.seed)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def batches(self, n_tokens: int | None = None, batch_size: int | None = None) -> Iterator[Tensor]:
        """Yield (batch, 2, d_model), as the stream's `batches` does."""
        return (pairs for pairs, _ in self.with_truth(n_tokens, batch_size))

    def with_truth(self, n_tokens: int | None = None, batch_size: int | None = None) -> Iterator[tuple[Tensor, Truth]]:
        """The same with what was planted in each batch. What is planted depends on the batch's number and size."""
        for number, x in enumerate(self.stream.batches(n_tokens, batch_size)):
            yield self.plant(x, self._random(f"batch {number} of {len(x)}"))

    def reader(self) -> "InjectedPair":
        """The same for other processes."""
        return type(self)(self.stream.reader(), self.plan, self.seed)

    def sample(self, x: Tensor, seed: int) -> tuple[Tensor, Truth]:
        """Plant in other activations x (tokens, d_model) of the same model, held-out ones."""
        return self.plant(x, self._random(f"sample {seed}"))

    def plant(self, x: Tensor, random: torch.Generator) -> tuple[Tensor, Truth]:
        truth = Truth(*(strength.to(x.device) for strength in self._strengths(len(x), random)))
        base = x + truth.base @ self.directions
        chat = x @ self._rotation.T + truth.chat @ self.directions
        return torch.stack([base, chat], 1), truth

    def _strengths(self, n: int, random: torch.Generator) -> Truth:
        shape = (n, len(self.labels))
        on = torch.rand(shape, generator=random) < self.plan.rate
        strength = on * (0.5 + torch.rand(shape, generator=random)) * self.plan.strength * self._norm
        case = torch.randint(len(CASES), shape, generator=random)
        base = torch.where(self.rho.isnan(), (case != 1).float(), self.rho.clamp(max=1.0))
        chat = torch.where(self.rho.isnan(), case != 2, self.rho != torch.inf)
        return Truth(strength * base, strength * chat)

    @cached_property
    def _sample(self) -> Tensor:
        return self.stream.take(min(4096, self.stream.n_activations))

    @cached_property
    def _norm(self) -> Tensor:
        """Mean distance of the background from its mean. ()"""
        return (self._sample - self._sample.mean(0)).norm(dim=-1).mean().cpu()

    @cached_property
    def _rotation(self) -> Tensor:
        """(d_model, d_model): exp of a skew matrix whose planes turn by about `plan.rotation`."""
        d_model = self._sample.shape[1]
        free = torch.randn(d_model, d_model, generator=self._random("rotation"), dtype=torch.float64)
        skew = (free - free.T) / (2 * d_model) ** 0.5  # a random plane turns by about one radian
        return torch.linalg.matrix_exp(self.plan.rotation * skew).to(self._sample)

    def _random(self, purpose: str) -> torch.Generator:
        """A stream of random numbers of its own for each purpose."""
        digest = hashlib.sha256(f"injected {self.seed} {purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class MovedPair(InjectedPair):
    """An injected pair in which the context directions are old ones that fire at new places: chat has them at all of
    their tokens, base at two thirds."""

    cases = ("both", "chat alone")

    def _strengths(self, n: int, random: torch.Generator) -> Truth:
        base, chat = super()._strengths(n, random)
        return Truth(base, torch.where(self.rho.isnan(), torch.maximum(base, chat), chat))
