"""Crosscoders in which some latents are told beforehand whose they are.

    dedicated     the first m latents read and write base alone, the next m chat alone: exclusive by construction
    designated    the first m latents write the same row into both models, at a part of the price of the others

Weights are brought back to this after each update.

Sources: Dedicated Feature Crosscoders (arXiv 2602.11729); Anthropic 2025, designated shared features, whose numbers are
not confirmed. The loss and the competition for places are those of the other crosscoders, so that they compare.
"""

import dataclasses

import torch
from torch import Tensor, nn

from helpers.dictionaries.autoencoders import ReLU
from helpers.dictionaries.crosscoders import Crosscoder
from helpers.dictionaries.sweeps import CrosscoderCell


class DedicatedCrosscoder(Crosscoder):
    """`dedicated` latents belong to each model. Raises ValueError for none, and for more than there are."""

    def __init__(
        self, d_model: int, n_latents: int, activation: nn.Module, seed: int = 0, *, dedicated: int, **switches
    ):
        super().__init__(d_model, n_latents, activation, seed, **switches)
        if not 0 < 2 * dedicated <= n_latents:
            raise ValueError(f"{dedicated} of {n_latents} latents cannot be dedicated to each model: at most half can")
        self.dedicated = dedicated
        self.switches |= {"dedicated": dedicated}
        self.constrain()

    @torch.no_grad()
    def constrain(self) -> None:
        m = self.dedicated
        for weights in (self.encoders, self.decoders):
            weights[1, :m] = 0.0
            weights[0, m : 2 * m] = 0.0


class DesignatedCrosscoder(Crosscoder):
    """`designated` latents are shared, and cost `cost` times what others do. Raises ValueError for more than there are,
    for a cost that is not above 0, and for an activation without a price."""

    def __init__(
        self, d_model: int, n_latents: int, activation: ReLU, seed: int = 0, *, designated: int, cost: float, **switches
    ):
        super().__init__(d_model, n_latents, activation, seed, **switches)
        if not 0 < designated <= n_latents or not cost > 0 or not isinstance(activation, ReLU):
            raise ValueError(
                f"{designated} of {n_latents} latents at {cost} times the price cannot be designated as shared: give "
                "from one to all of them, a cost above 0, and ReLU, whose latents have a price"
            )
        self.designated, self.cost = designated, cost
        self.switches |= {"designated": designated, "cost": cost}
        self.constrain()

    @torch.no_grad()
    def constrain(self) -> None:
        rows = self.decoders[:, : self.designated]
        rows.copy_(rows.mean(0).expand_as(rows).clone())

    def sizes(self) -> Tensor:
        """(n_latents,): what a unit of each latent adds, times what that costs."""
        sizes = super().sizes()
        return torch.cat([self.cost * sizes[: self.designated], sizes[self.designated :]])


@dataclasses.dataclass(frozen=True)
class DedicatedCell(CrosscoderCell):
    """One crosscoder of a sweep with `dedicated` latents for each model."""

    dedicated: int = 1

    def build(self, d_model: int) -> DedicatedCrosscoder:
        switches = self.switches()
        del switches["decoupled"]  # it has one competition
        return DedicatedCrosscoder(d_model, int(self.n_latents), self.activation(), int(self.seed), **switches)

    def switches(self) -> dict:
        return super().switches() | {"dedicated": int(self.dedicated)}
