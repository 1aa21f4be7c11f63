"""Crosscoders: one code for two models that read the same token (Lindsey et al. 2024; Minder, Dumas et al. 2025).

    f      = activation( sum_m W_enc[m] (x[m] - b_dec[m]) + b_enc )              one code for both
    x_hat  = f W_dec[m] + b_dec[m]                                               for each model m: 0 = base, 1 = chat
    w_j    = sum_m |W_dec[m, j]|                                                 the size of latent j
    loss   = 1/2 sum_m |x[m] - x_hat[m]|  +  sparsity * sum_j f_j w_j            norms, not squares, by default

With e[m] = x[m] - x_hat[m] the squared loss has a bridge to that of an autoencoder of chat - base (Dumas 2025):

    loss   = |e[1]|^2 + |e[0]|^2 + 2 bridge e[0] . e[1]                         -1: |e[1] - e[0]|^2, only the difference

Norms of the decoder are free: a latent whose rows have equal norms is shared, one with a zero row is one model's own.
BatchTopK ranks latents by f_j w_j, so that scaling a decoder row up and its code down changes nothing.

Weights lie side by side, the rows of both models as one row of 2 d, so that all the machinery of an autoencoder serves
a crosscoder; `encoders` and `decoders` show them with a leading model axis.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from helpers.dictionaries import shards
from helpers.dictionaries.autoencoders import BatchTopK, Competition, ReLU, SparseAutoencoder, TopK

N_MODELS = 2
SIZES = ("sum", "joint")


class Crosscoder(SparseAutoencoder):
    """`forward(x)` is the reconstruction of x (batch, 2, d_model).

    size      "sum": w_j is the sum of a latent's two decoder norms, which lets latents be one model's own; "joint": the
              norm of both rows together, which favours shared ones
    squared   the loss takes squared errors, as Lindsey et al. do
    init_norm of each decoder row at the start, the same for both models, as are their directions
    bridge    from 0, both models' own errors, to -1, the error of their difference alone; the loss must be squared.
              AuxK has dead latents rebuild both errors all the same
    """

    free_norms = True

    def __init__(
        self,
        d_model: int,
        n_latents: int,
        activation: nn.Module,
        seed: int = 0,
        init_norm: float = 1.0,
        size: str = "sum",
        squared: bool = False,
        bridge: float = 0.0,
    ):
        if not isinstance(activation, ReLU | TopK | BatchTopK):
            raise ValueError(f"{type(activation).__name__} has no crosscoder: use ReLU, TopK or BatchTopK")
        super().__init__(d_model, n_latents, activation, seed)
        if size not in SIZES:
            raise ValueError(f"unknown size of a latent {size!r}: use one of {', '.join(SIZES)}")
        if not -1 <= bridge <= 0 or (bridge and not squared):
            raise ValueError(
                f"bridge = {bridge}, squared = {squared}: a bridge is from 0 to -1, and needs squared=True"
            )
        self.size, self.bridge = size, bridge
        self.squared = squared and not bridge  # else `misfit` is the loss
        self.switches = {"models": N_MODELS, "size": size, "squared": squared, "init_norm": init_norm}
        self.switches |= {"bridge": bridge} if bridge else {}  # what has none keeps the identity it is stored under
        both = self.W_dec.data.repeat(1, N_MODELS)
        self.W_dec, self.W_enc = nn.Parameter(init_norm * both), nn.Parameter(both.clone())
        self.b_dec = nn.Parameter(torch.zeros(N_MODELS * d_model))

    @property
    def d_model(self) -> int:
        return self.W_dec.shape[1] // N_MODELS

    @property
    def decoders(self) -> Tensor:
        """(2, n_latents, d_model), a view: base, chat."""
        return self.W_dec.view(self.n_latents, N_MODELS, -1).transpose(0, 1)

    @property
    def encoders(self) -> Tensor:
        """(2, n_latents, d_model), a view: base, chat."""
        return self.W_enc.view(self.n_latents, N_MODELS, -1).transpose(0, 1)

    @property
    def biases(self) -> Tensor:
        """Decoder biases (2, d_model), a view: base, chat."""
        return self.b_dec.view(N_MODELS, -1)

    def sizes(self) -> Tensor:
        """(n_latents,): what a unit of each latent adds to the reconstructions, in norm."""
        norms = torch.linalg.vector_norm(self.W_dec.view(self.n_latents, N_MODELS, -1), dim=-1)
        return norms.sum(1) if self.size == "sum" else torch.linalg.vector_norm(norms, dim=1)

    def pre_acts(self, x: Tensor) -> Tensor:
        """(batch, 2, d_model) or (batch, 2 d_model) -> (batch, n_latents), before the activation."""
        return super().pre_acts(x.flatten(1))

    def decode(self, latents: Tensor) -> Tensor:
        """(batch, n_latents) -> (batch, 2, d_model)."""
        return super().decode(latents).unflatten(1, (N_MODELS, -1))

    def misfit(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Mean length of the errors, over tokens and models: x and x_hat (batch, 2 d_model) -> (). With a bridge, the
        mean over tokens of both squares and their product."""
        errors = (x - x_hat).unflatten(1, (N_MODELS, -1))
        if self.bridge:
            return (errors.square().sum((1, 2)) + 2 * self.bridge * torch.linalg.vecdot(*errors.unbind(1))).mean()
        return torch.linalg.vector_norm(errors, dim=-1).mean()

    def unit(self, variance: Tensor) -> Tensor:
        """What the loss is counted in: the length of one model's typical deviation from the mean, or its square. ()"""
        return variance if self.squared or self.bridge else (variance / N_MODELS).sqrt()


class DecoupledCrosscoder(Crosscoder):
    """Latents compete in each model apart: a latent may be on in one of them and off in the other.

    Each model has its own ranking, by value times its own decoder's norm, its own k and its own threshold. Latents are
    (batch, 2, n_latents). Source: the released code of Minder, Dumas et al., "decoupled".
    """

    def __init__(self, d_model: int, n_latents: int, activation: BatchTopK, seed: int = 0, **switches):
        if not isinstance(activation, BatchTopK):
            raise ValueError(f"a decoupled crosscoder ranks by BatchTopK, not {type(activation).__name__}: pass that")
        super().__init__(d_model, n_latents, activation, seed, **switches)
        self.switches |= {"decoupled": True}
        self.activation_chat = BatchTopK(activation.k)

    def norms(self) -> Tensor:
        """(2, n_latents): what a unit of each latent adds to each reconstruction, in norm."""
        return torch.linalg.vector_norm(self.decoders, dim=-1)

    def scores(self, x: Tensor) -> Tensor:
        """(batch, 2, d_model) -> (batch, 2, n_latents)."""
        return self.pre_acts(x).unsqueeze(1) * self.norms()

    def encode(self, x: Tensor) -> Tensor:
        """(batch, 2, d_model) -> latents (batch, 2, n_latents)."""
        scores, activations = self.scores(x), (self.activation, self.activation_chat)
        active = torch.stack([activation(scores[:, m]) for m, activation in enumerate(activations)], 1)
        return active / self.norms().clamp(min=torch.finfo(active.dtype).tiny)

    def decode(self, latents: Tensor) -> Tensor:
        """(batch, 2, n_latents) -> (batch, 2, d_model)."""
        return shards.summed(torch.einsum("bmn,mnd->bmd", latents, self.decoders), self.group) + self.biases

    def competitions(self) -> list[Competition]:
        """One in each model."""
        return [Competition(self.activation.k, *each) for each in zip(self.norms(), self.decoders, strict=True)]

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        batches = list(batches)
        for m, activation in enumerate((self.activation, self.activation_chat)):
            activation.calibrate(self.scores(x)[:, m] for x in batches)
