"""A toy pair that is nothing but sparse concepts with known owners, and how well a crosscoder's latents fit them.

    x[m] = sum_i a_i v_i[m]      v_i[m] a unit direction in model m, zero in a model that has not concept i;
                                 a_i between 1/2 and 3/2 at a share `rate` of the tokens, else zero

`drift` turns a shared concept's direction in chat away from that in base. Without a background every latent that is on
is on for a concept, so that its purity is known:

    purity      share of the tokens where a latent is on at which the concept that it fits best is on
    spurious    a live latent that is one model's by its norms, and points along a concept that both have

Sources: the toys of Dedicated Feature Crosscoders (arXiv 2602.11729) and of the interactive toy crosscoder page.
"""

import dataclasses
import math
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.dictionaries.crosscoders import Crosscoder
from helpers.dictionaries.training import TrainConfig, train
from helpers.diffing.norms import classes, delta_norm
from helpers.diffing.recovery import COSINE, larger_rows

OWNERS = ("shared", "base-only", "chat-only")


@dataclasses.dataclass(frozen=True)
class ConceptPair:
    """`shared` concepts of both models and `alone` of each; the same tokens every time."""

    d_model: int = 32
    shared: int = 64
    alone: int = 8
    rate: float = 0.05
    drift: float = 0.0  # radians
    rho: float = 1.0  # strength of shared concepts in base, as a share of that in chat
    seed: int = 0

    @cached_property
    def owners(self) -> np.ndarray:
        """(concepts,) of str."""
        return np.repeat(np.array(OWNERS, dtype=object), [self.shared, self.alone, self.alone])

    @cached_property
    def delta(self) -> Tensor:
        """Exact Delta_norm of each concept, (concepts,), for rho up to 1."""
        exact = {"shared": 1 - self.rho / 2, "base-only": 0.0, "chat-only": 1.0}
        return torch.tensor([exact[owner] for owner in self.owners])

    @cached_property
    def directions(self) -> Tensor:
        """(2, concepts, d_model), of unit norm or zero: in base and in chat."""
        base, aside = F.normalize(torch.randn(2, len(self.owners), self.d_model, generator=self._random(0)), dim=-1)
        aside = F.normalize(aside - (aside * base).sum(-1, keepdim=True) * base, dim=-1)
        chat = math.cos(self.drift) * base + math.sin(self.drift) * aside
        return torch.stack([base, chat]) * (self.strength > 0).unsqueeze(-1)

    @cached_property
    def strength(self) -> Tensor:
        """(2, concepts): in base and in chat, as a share of the larger."""
        has = {"shared": (self.rho, 1.0), "base-only": (1.0, 0.0), "chat-only": (0.0, 1.0)}
        return torch.tensor([has[owner] for owner in self.owners]).T

    def sample(self, n_tokens: int, seed: int = 1) -> tuple[Tensor, Tensor]:
        """Activations (n_tokens, 2, d_model), and strengths (n_tokens, concepts)."""
        random, shape = self._random(seed), (n_tokens, len(self.owners))
        strengths = (torch.rand(shape, generator=random) < self.rate) * (0.5 + torch.rand(shape, generator=random))
        return torch.einsum("ti,mi,mid->tmd", strengths, self.strength, self.directions), strengths

    def batches(self, n_tokens: int, batch_size: int = 512) -> Iterator[Tensor]:
        """(batch_size, 2, d_model), as many as `n_tokens` need."""
        return (self.sample(batch_size, 1000 + i)[0] for i in range(-(-n_tokens // batch_size)))

    def train(self, crosscoder: Crosscoder, n_tokens: int, price: float = 0.0, lr: float = 5e-3) -> Crosscoder:
        """The crosscoder, trained on the pair in place."""
        return train(crosscoder, self.batches(n_tokens), TrainConfig(n_tokens, lr=lr, sparsity=price)).sae

    def _random(self, what: int) -> torch.Generator:
        return torch.Generator().manual_seed(1_000_003 * self.seed + what)


@torch.no_grad()
def concept_table(crosscoder: Crosscoder, pair: ConceptPair, n_tokens: int = 16_384) -> pd.DataFrame:
    """A row for each latent, read on fresh tokens: rate, delta, class, concept (-1 for none), owner, purity.

    A latent is of the concept that its longer row points along in that row's model, by a cosine above
    `recovery.COSINE`. purity is NaN for a latent that is never on.
    """
    x, strengths = pair.sample(n_tokens, seed=2)
    on, there = (crosscoder.encode(x) > 0).double(), (strengths > 0).double()
    fired = on.sum(0)
    concept = nearest_concepts(crosscoder, pair)
    delta = delta_norm(crosscoder)
    owner = np.append(pair.owners, "none")[concept]
    purity = ((on.T @ there) / fired.unsqueeze(1)).amax(1)  # 0 / 0 is NaN
    about = {"rate": fired / n_tokens, "delta": delta, "class": classes(delta)}
    return pd.DataFrame(about | {"concept": concept, "owner": owner, "purity": purity})


def nearest_concepts(crosscoder: Crosscoder, pair: ConceptPair) -> np.ndarray:
    """The concept that each latent's longer row points along, (n_latents,); -1 for none."""
    model = (delta_norm(crosscoder) >= 0.5).long()  # of the longer row
    near = torch.einsum("jd,mid->mji", F.normalize(larger_rows(crosscoder), dim=-1), pair.directions)
    cosine, concept = near[model, torch.arange(len(model))].max(1)
    return concept.where(cosine > COSINE, -1).numpy()


def spurious(table: pd.DataFrame) -> int:
    """Latents of a `concept_table` that are live, one model's by their norms, and of a shared concept."""
    alone = table["class"].isin(["base-only", "chat-only"])
    return int((alone & (table.rate > 0) & (table.owner == "shared")).sum())
