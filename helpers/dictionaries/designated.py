"""Crosscoders in which some latents are told beforehand what they are for.

    dedicated     the first m latents read and write base alone, the next m chat alone: exclusive by construction
    designated    the first m latents write the same row into both models, at a part of the price of the others
    delta         the first m latents have places of their own, and must rebuild chat - base without the others

The weights of the first two are brought back to this after each update. The third adds to the loss

    weight |(x[1] - x[0]) - sum_{j < m} f_j (W_dec[1, j] - W_dec[0, j]) - (b_dec[1] - b_dec[0])|^2 / variance of x

Sources: Dedicated Feature Crosscoders (arXiv 2602.11729); Anthropic 2025, designated shared features, whose numbers are
not confirmed; Delta-Crosscoder (arXiv 2603.04426), whose two k, weight and share of delta latents are not published, so
that all are arguments here. What is not said is as in the other crosscoders, so that they compare.
"""

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from helpers.dictionaries.autoencoders import BatchTopK, Competition, ReLU
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


class DeltaCrosscoder(Crosscoder):
    """`delta` latents compete among themselves for `k_delta` places, the others for the activation's k; what they write
    must rebuild the difference of the models, at a `weight`. Raises ValueError for no latents of either kind, for more
    places than latents, for a weight below 0, and for an activation without places."""

    def __init__(
        self,
        d_model: int,
        n_latents: int,
        activation: BatchTopK,
        seed: int = 0,
        *,
        delta: int,
        k_delta: int,
        weight: float,
        **switches,
    ):
        super().__init__(d_model, n_latents, activation, seed, **switches)
        if not isinstance(activation, BatchTopK) or not weight >= 0:
            raise ValueError(f"{type(activation).__name__} at a weight of {weight}: give BatchTopK, and 0 or more")
        if not k_delta <= delta <= n_latents - activation.k:
            raise ValueError(
                f"{delta} of {n_latents} latents for the difference, {k_delta} and {activation.k} places: each kind "
                "needs as many latents as places"
            )
        self.delta, self.weight, self.activation_delta = delta, weight, BatchTopK(k_delta)
        self.switches |= {"delta": delta, "k_delta": k_delta, "weight": weight}

    def encode(self, x: Tensor) -> Tensor:
        """(batch, 2, d_model) -> latents (batch, n_latents)."""
        delta, others = self._scores(x)
        return self.unscaled(torch.cat([self.activation_delta(delta), self.activation(others)], 1))

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        batches = list(batches)
        for i, activation in enumerate((self.activation_delta, self.activation)):
            activation.calibrate(self._scores(x)[i] for x in batches)

    def competitions(self) -> list[Competition]:
        """That of the delta latents, then that of the others."""
        takes_part = torch.arange(self.n_latents, device=self.W_dec.device) < self.delta
        places = ((self.activation_delta.k, takes_part), (self.activation.k, ~takes_part))
        return [Competition(k, self.sizes() * which, self.W_dec) for k, which in places]

    def other_error(self, x: Tensor, parts: list[Tensor]) -> Tensor:
        """Squared error of chat - base as the delta latents write it, times the weight: ()."""
        base, chat = (x - parts[0] - self.b_dec).unflatten(1, (2, -1)).unbind(1)
        return self.weight * (chat - base).square().sum(-1).mean()

    def _scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the delta latents, and of the others."""
        scores = self.scores(x)
        return scores[:, : self.delta], scores[:, self.delta :]


@dataclasses.dataclass(frozen=True)
class DeltaCell(CrosscoderCell):
    """One Delta-Crosscoder of a sweep; `sparsity` is the places of all latents together."""

    delta: int = 1
    k_delta: int = 1
    weight: float = 1.0

    def build(self, d_model: int) -> DeltaCrosscoder:
        return self.of_kind(DeltaCrosscoder, d_model, BatchTopK(int(self.sparsity) - self.k_delta))

    def switches(self) -> dict:
        given = {"delta": int(self.delta), "k_delta": int(self.k_delta), "weight": float(self.weight)}
        return super().switches() | given


@dataclasses.dataclass(frozen=True)
class DedicatedCell(CrosscoderCell):
    """One crosscoder of a sweep with `dedicated` latents for each model."""

    dedicated: int = 1

    def build(self, d_model: int) -> DedicatedCrosscoder:
        return self.of_kind(DedicatedCrosscoder, d_model, self.activation())

    def switches(self) -> dict:
        return super().switches() | {"dedicated": int(self.dedicated)}
