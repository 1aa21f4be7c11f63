"""The autoencoders that the four evaluations measure (notebooks 05 to 08), trained once and kept in the cache.

    "n"     TopK at one k, dictionaries of growing size
    "k"     TopK at one size, from very sparse to k near d_model
    "ReLU"  ReLU with an L1 price at that size, prices from loose to strict, so that L0 spans most of those k

The groups share a cell, TopK at the middle n and k. What one notebook has trained the next one loads. The reference
collection is larger and sees thirteen times the tokens; what was measured on it is stored with the repository.
"""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch

from helpers.activations.stream import ActivationStream, Harvest
from helpers.base.storage import cache_dir
from helpers.dictionaries.autoencoders import SparseAutoencoder
from helpers.dictionaries.sweeps import Cell, sweep
from helpers.subjects.subject import CONTEXTS, Subject, load_subject, subject_for, warn_if_other_corpus
from helpers.text.documents import TokenStream, text_for

GROUPS = ("n", "k", "ReLU")


@dataclasses.dataclass(frozen=True)
class SAEPlan:
    """Which autoencoders there are, and what they read. Amounts are tokens."""

    sizes: tuple[int, ...]
    ks: tuple[int, ...]
    prices: tuple[float, ...]  # of a ReLU latent
    tokens: int  # an autoencoder reads
    text: int  # harvested, read again when it is used up
    heldout: int = 16_384  # activations to measure on
    n: int = 2048  # where k and prices vary
    k: int = 32  # where n varies
    context: int = 0  # tokens a row, which the subject decides
    batch_size: int = 1024
    lr: float = 6e-3  # at 1,024 latents, times 1/sqrt(n)
    relu_lr: float = 4e-3  # of the methods with a price, at 1,024 latents too


PLANS = {
    "smoke": SAEPlan((64, 128), (4, 16), (0.1, 0.4), 4_000, 6_000, 1024, n=128, k=16, batch_size=256),
    "laptop": SAEPlan((256, 512, 1024, 2048), (8, 32, 128, 230), (0.05, 0.15, 0.5), 150_000, 420_000),
    "reference": SAEPlan(
        (512, 1024, 2048, 4096), (8, 16, 32, 64, 128, 230), (0.03, 0.06, 0.12, 0.25, 0.5), 2_000_000, 2_100_000
    ),
    "frontier": SAEPlan(
        *((512, 2048, 8192, 16_384), (8, 16, 32, 64, 128), (0.5, 0.3, 0.18, 0.1, 0.06), 4_000_000, 4_200_000),
        lr=5e-3,
    ),
    "paper": SAEPlan(
        *((2048, 8192, 32_768), (8, 16, 32, 64, 128, 256, 512), (0.002, 0.005, 0.01, 0.02, 0.05)),
        *(10**9, 10**9, 10**5),
        **{"n": 32_768, "batch_size": 131_072, "lr": 5e-4, "relu_lr": 5e-4},
    ),
}


class TrainedSAEs:
    """A subject, its activations, and autoencoders trained on them on demand.

    plan      name of one of `PLANS`: a notebook's scale, or "reference"
    subject   a notebook's dial: "embedded", "hub" or "gemma"
    seeds     of the dictionaries; the first is the data's as well
    """

    def __init__(self, plan: str, subject: str, seeds: Sequence[int]):
        if plan not in PLANS or not len(seeds):
            raise ValueError(f"plan {plan!r}, seeds {list(seeds)}: choose of {', '.join(PLANS)}, and give a seed")
        self.subject, self._name, self.seeds = subject, subject_for(subject), list(seeds)
        contexts = CONTEXTS[subject]
        self.plan = dataclasses.replace(PLANS[plan], context=contexts.get(plan, contexts["laptop"]))

    @property
    def settings(self) -> dict:
        """The plan, the seeds and the harvest, for a notebook's record."""
        harvest = Harvest(context=self.plan.context).described(self.model)
        return dataclasses.asdict(self.plan) | {"seeds": self.seeds, "harvest": harvest}

    @cached_property
    def model(self) -> Subject:
        return load_subject(self._name)

    @cached_property
    def stream(self) -> ActivationStream:
        """Activations of training text."""
        text = text_for(self.subject, "train", self.model.tokenizer, self.plan.text)
        warn_if_other_corpus(self.model, text.corpus)
        return self._stream(text, cache=True)

    @cached_property
    def heldout_text(self) -> TokenStream:
        return text_for(self.subject, "heldout", self.model.tokenizer, 6 * self.plan.heldout)

    @cached_property
    def heldout(self) -> torch.Tensor:
        """Held-out activations in random order, (plan.heldout, d_model)."""
        return self._stream(self.heldout_text).take(self.plan.heldout)

    def heldout_rows(self, n_rows: int | None = None, context: int | None = None) -> torch.Tensor:
        """The first rows of held-out text, or all, (n_rows, context); raises ValueError if there are fewer."""
        rows = self.model.rows(self.heldout_text.tokens, context or self.plan.context)
        if n_rows is not None and len(rows) < n_rows:
            raise ValueError(f"{n_rows} rows are more than the {len(rows)} of held-out text: ask for fewer")
        return rows[:n_rows].long()

    def cells(self, *groups: str) -> list[Cell]:
        """The cells of some groups, all by default, each once."""
        plan, seeds = self.plan, self.seeds
        if unknown := set(groups) - set(GROUPS):
            raise ValueError(f"there is no group {', '.join(sorted(unknown))}: choose of {', '.join(GROUPS)}")
        by_group = {
            "n": [self.cell("TopK", n, plan.k, seed) for seed in seeds for n in plan.sizes],
            "k": [self.cell("TopK", plan.n, k, seed) for seed in seeds for k in plan.ks],
            "ReLU": [self.cell("ReLU", plan.n, price, seed) for seed in seeds for price in plan.prices],
        }
        return list(dict.fromkeys(cell for group in groups or GROUPS for cell in by_group[group]))

    def cell(self, method: str, n: int, sparsity: float, seed: int) -> Cell:
        """One autoencoder, with the plan's tokens and its learning rate at n latents."""
        lr = self.plan.lr if method.endswith("TopK") else self.plan.relu_lr
        return Cell(method, n, sparsity, seed, lr=lr * (1024 / n) ** 0.5, tokens=self.plan.tokens)

    def train(self, *groups: str) -> tuple[pd.DataFrame, dict[Cell, SparseAutoencoder]]:
        """A row for each cell, in the order of `cells`, with nmse, l0 and dead on held-out activations; and the
        autoencoders. What the cache holds is loaded."""
        found = sweep(self.cells(*groups), self.stream.batches, self.heldout, self.plan.tokens, self.folder)
        return found.frame, found.saes

    @property
    def folder(self) -> Path:
        return cache_dir() / "sweeps" / "collection"

    def _stream(self, text: TokenStream, cache: bool = False) -> ActivationStream:
        take = {"harvest": Harvest(context=self.plan.context), "batch_size": self.plan.batch_size, "seed": 0}
        return ActivationStream(self.model, text.tokens, **take, memory_limit_gb=3, cache=cache)
