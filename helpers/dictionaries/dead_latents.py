"""Keeping latents alive: a latent that never wins its place gets no gradient, and stays silent for good.

    AuxK        dead latents rebuild what the living missed:                              Gao et al. 2024, A.2
                    e = x - x_hat      e_hat = W_dec TopK_{k_aux}(relu(pre_acts of dead latents))
                    loss  |e - e_hat|^2 / variance of e
    GhostGrads  they do so all at once, through an exponential that lets gradient pass at any pre-activation:
                    e_hat = s exp(pre_acts of dead latents) W_dec,   s: |e_hat| = |e| / 2     Jermyn & Templeton 2024
    Resample    a few times in the run each of them starts anew as a badly rebuilt input      Bricken et al. 2023

A remedy has a `loss`, paid at each batch while any latent is dead, and `renew`, called after each update.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.base import products
from helpers.dictionaries import kernels, shards
from helpers.dictionaries.adam import Adam
from helpers.dictionaries.autoencoders import SparseAutoencoder

NORMALISERS = ("residual", "input")


@dataclass(frozen=True)
class Remedy:
    """Nothing is done against dead latents."""

    def loss(self, sae: SparseAutoencoder, x: Tensor, x_hat: Tensor, dead: Tensor) -> Tensor | float:
        """What is added to the loss on x (batch, d_model). `dead`: (n_latents,) bool, some true."""
        return 0.0

    def renew(
        self, sae: SparseAutoencoder, optimizer: Adam, x: Tensor, dead: Tensor, progress: tuple[float, float]
    ) -> bool:
        """Whether dead latents were started anew. `progress`: share of the run before and after this batch."""
        return False


@dataclass(frozen=True)
class AuxK(Remedy):
    """The switches are what released trainers do differently; the defaults are the paper's."""

    weight: float = 1 / 32
    k: int | None = None  # dead latents used per token, d_model / 2 by default; never more than are dead
    share: float = 1.0  # of the batch's tokens, from its start: the loss is a mean, and a part estimates it
    detach: bool = True  # what is left to rebuild carries no gradient: the living are not taught through it
    bias: bool = False  # the rebuilt residual includes b_dec, as a plain decode would
    normalise_by: str = "residual"  # or "input": then the loss fades as the living get better
    scale_by_dead: bool = False  # times dead / k while fewer are dead than k

    def __post_init__(self):
        if self.normalise_by not in NORMALISERS:
            raise ValueError(f"unknown normaliser {self.normalise_by!r}: use one of {', '.join(NORMALISERS)}")
        if self.k is not None and self.k < 1:
            raise ValueError(f"AuxK with k = {self.k} rebuilds nothing: choose k >= 1")
        if not 0 < self.share <= 1:
            raise ValueError(f"AuxK needs a share of the tokens above 0 and at most 1, not {self.share}")

    def k_of(self, d_model: int) -> int:
        """Dead latents used per token where as many are dead."""
        return self.k or max(1, d_model // 2)

    def loss(self, sae: SparseAutoencoder, x: Tensor, x_hat: Tensor, dead: Tensor) -> Tensor:
        some = slice(0, max(2, round(self.share * len(x))))  # one token has no variance
        residual = x[some] - (x_hat[some].detach() if self.detach else x_hat[some])
        rows, k = dead.nonzero().squeeze(1), self.k_of(sae.d_model)
        n_dead = int(shards.total(dead.sum(), sae.group))
        weights = (sae.W_enc, sae.b_enc, sae.b_dec)
        code = kernels.encode_topk(x[some], *weights, min(k, n_dead), sae.sizes(), rows, sae.group)
        rebuilt = kernels.decode_sparse(code, sae.W_dec) + (sae.b_dec if self.bias else 0.0)
        missed = (residual - rebuilt).square().sum(-1).mean()
        scale = min(1.0, n_dead / k) if self.scale_by_dead else 1.0
        return (
            self.weight
            * scale
            * _in_variance(missed, residual.detach() if self.normalise_by == "residual" else x[some])
        )


@dataclass(frozen=True)
class GhostGrads(Remedy):
    """The ghosts' loss is scaled to the size of the main one, so it has no weight to choose."""

    def loss(self, sae: SparseAutoencoder, x: Tensor, x_hat: Tensor, dead: Tensor) -> Tensor:
        residual = (x - x_hat).detach()
        with products.fast_products(x.device):
            pre_acts = F.linear(x - sae.b_dec.detach(), sae.W_enc[dead], sae.b_enc[dead])
            ghost = (pre_acts.float().exp() @ sae.W_dec[dead]).float()
        ghost = ghost * (residual.norm(dim=-1, keepdim=True) / (2 * ghost.norm(dim=-1, keepdim=True) + 1e-6)).detach()
        missed = (ghost - residual).square().sum(-1).mean()
        main = _in_variance(residual.square().sum(-1).mean(), x)
        return missed * (main / (missed + 1e-6)).detach()


@dataclass(frozen=True)
class Resample(Remedy):
    """Four times in the first half of the run, as in the paper."""

    at: tuple[float, ...] = (1 / 8, 1 / 4, 3 / 8, 1 / 2)  # shares of the run
    scale: float = 0.2  # length of a new encoder row, as a share of the living ones'

    @torch.no_grad()
    def renew(
        self, sae: SparseAutoencoder, optimizer: Adam, x: Tensor, dead: Tensor, progress: tuple[float, float]
    ) -> bool:
        before, after = progress
        if not any(before < mark <= after for mark in self.at) or dead.all() or not dead.any():
            return False
        badness = (x - sae(x)).square().sum(-1).square()  # inputs come with probability ~ loss^2
        if not badness.any():  # nothing is badly rebuilt
            return False
        random = torch.Generator(x.device).manual_seed(round(1e9 * after))
        chosen = torch.multinomial(badness, int(dead.sum()), replacement=True, generator=random)
        directions = F.normalize(x[chosen] - sae.b_dec, dim=-1)
        sae.W_dec[dead] = directions
        sae.W_enc[dead] = directions * self.scale * sae.W_enc[~dead].norm(dim=-1).mean()
        sae.b_enc[dead] = 0.0
        optimizer.forget(dead)
        return True


def _in_variance(error: Tensor, x: Tensor) -> Tensor:
    """An error over the mean squared distance of rows x (batch, d_model) from their mean; 0 where all are equal. ()"""
    size, variance = x.square().sum(-1).mean(), (x - x.mean(0)).square().sum(-1).mean()
    there = variance > 1e-12 * size  # else it is rounding
    return torch.where(there, error, 0.0) / torch.where(there, variance, 1.0)
