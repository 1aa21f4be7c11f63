"""Reading a crosscoder: whose is a latent, and can the norms of its decoder rows be believed?

    Delta_j = 1/2 (1 + (|d_j^chat| - |d_j^base|) / max of both)        0 base-only, 1/2 shared, 1 chat-only    (eq. 3)

A loss may shrink a row to zero though the model has the concept. Latent Scaling asks the activations themselves: when
latent j fires, how much of its chat direction d = d_j^chat is there in a target y of each model?

    beta_j = argmin_b  sum |b f_j d - y|^2  =  d . sum f_j y / (|d|^2 sum f_j^2)

    target                y, for model m
    error                 x[m] - x_hat[m] + f_j d_j^m     what the other latents leave    large in base: shrunk away
    reconstruction        x_hat[m]                        what all latents give           large in base: others carry it
    activation            x[m]                            what is there, whoever gives it
    activation_no_bias    x[m] - b_dec[m]

    nu_j = beta_j(base) / beta_j(chat)      0: base has nothing of it; 1: as much as chat

Source: Minder, Dumas et al. 2025, sections 2 and 3, with the targets of their released code. Index 0 is base, 1 chat.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.activations.views import view_of
from helpers.dictionaries.autoencoders import SparseAutoencoder
from helpers.dictionaries.crosscoders import Crosscoder
from helpers.dictionaries.kernels import code_of

CLASSES = {"base-only": (0.0, 0.1), "shared": (0.4, 0.6), "chat-only": (0.9, 1.0)}  # of Delta_norm, ends included
TARGETS = ("error", "reconstruction", "activation", "activation_no_bias")
SPECIFIC = {"reconstruction": 0.5, "error": 0.2}  # a chat-specific latent has ratios below these (footnote 4)


def delta_norm(crosscoder: Crosscoder) -> Tensor:
    """Relative difference of a latent's decoder norms, (n_latents,) in 0 ... 1; one half where both are zero."""
    base, chat = crosscoder.decoders.detach().norm(dim=-1)
    largest = torch.maximum(base, chat)
    return 0.5 * (1 + (chat - base) / largest.where(largest > 0, 1))


def decoder_cosine(crosscoder: Crosscoder) -> Tensor:
    """Cosine of a latent's two decoder rows, (n_latents,)."""
    return F.cosine_similarity(*crosscoder.decoders.detach(), dim=-1)


def classes(delta: Tensor) -> np.ndarray:
    """The class of each Delta_norm (n_latents,), by name; "other" between the classes."""
    names = np.full(len(delta), "other", dtype=object)
    for name, (low, high) in CLASSES.items():
        names[((delta >= low) & (delta <= high)).cpu().numpy()] = name
    return names


@torch.no_grad()
def variance_explained(crosscoder: Crosscoder, x: Tensor, batch: int = 4096) -> tuple[float, float, float]:
    """1 - error variance / variance over x (n, 2, d_model): of both models together, of base, of chat."""
    errors = torch.cat([part - crosscoder.eval()(part) for part in x.split(batch)])
    left, total = (each.double().var(0).sum(-1) for each in (errors, x))  # (2,)
    both = 1 - left.sum() / total.sum()
    return both.item(), *(1 - left / total).tolist()


class Scaling(NamedTuple):
    """What Latent Scaling found; NaN for latents that never fired."""

    beta: dict[str, Tensor]  # of each target: (2, n_latents) float64
    energy: Tensor  # (n_latents,) float64: sum of squared activations
    fired: Tensor  # (n_latents,) int64: tokens it was on for

    def nu(self, target: str) -> Tensor:
        """beta in base over beta in chat, (n_latents,)."""
        if target not in self.beta:
            raise ValueError(f"there is no target {target!r}: use one of {', '.join(self.beta)}")
        base, chat = self.beta[target]
        return base / chat

    def chat_specific(self) -> Tensor:
        """Whether base has less of a latent than both cuts of the paper allow, (n_latents,) bool."""
        return torch.stack([self.nu(target) < cut for target, cut in SPECIFIC.items()]).all(0)


@torch.no_grad()
def latent_scaling(crosscoder: Crosscoder, batches: Iterable[Tensor]) -> Scaling:
    """Latent Scaling of every latent over batches (batch, 2, d_model), in one pass with sums in float64."""
    crosscoder.eval()
    sums = _Sums(crosscoder.n_latents)
    for x in batches:
        latents = crosscoder.encode(x)
        x_hat = crosscoder.decode(latents)
        sums.add(latents, {"missed": x - x_hat, "rebuilt": x_hat})
    if not sums.tokens:
        raise ValueError("there is nothing to scale: the batches are empty")
    directions, biases = crosscoder.decoders.detach().double(), crosscoder.biases.detach().double()
    missed, rebuilt = sums.weighted["missed"], sums.weighted["rebuilt"]  # (2, n_latents, d_model)
    own = sums.energy.unsqueeze(-1) * directions
    bias = sums.total.unsqueeze(-1) * biases.unsqueeze(1)
    by_target = {
        "error": missed + own,
        "reconstruction": rebuilt,
        "activation": missed + rebuilt,
        "activation_no_bias": missed + rebuilt - bias,
    }
    return sums.scaling(by_target, directions[1])


@torch.no_grad()
def activation_scaling(latents_and_pairs: Iterable[tuple[Tensor, Tensor]], directions: Tensor) -> Scaling:
    """Latent Scaling with the activations as only target: for autoencoders of one model or of a difference.

    Takes (latents (batch, n_latents), x (batch, 2, d_model)) and the decoder's rows (n_latents, d_model).
    """
    sums = _Sums(len(directions))
    for latents, x in latents_and_pairs:
        sums.add(latents, {"activation": x})
    if not sums.tokens:
        raise ValueError("there is nothing to scale: the batches are empty")
    return sums.scaling(sums.weighted, directions.detach().double())


def latent_table(crosscoder: Crosscoder, x: Tensor, batch: int = 4096) -> pd.DataFrame:
    """A row for each latent, read on x (n, 2, d_model): delta, class, cosine, rate, nu_<target> for each target.

    rate is the share of tokens it is on for. A latent that never fires has no ratios (NaN).
    """
    delta, scaling = delta_norm(crosscoder), latent_scaling(crosscoder, x.split(batch))
    ratios = {f"nu_{target}": scaling.nu(target) for target in TARGETS}
    geometry = {"delta": delta, "class": classes(delta), "cosine": decoder_cosine(crosscoder)}
    return pd.DataFrame(geometry | {"rate": scaling.fired / len(x)} | ratios)


def inside_shared(table: pd.DataFrame, ratio: str = "nu_reconstruction", share: float = 0.95) -> pd.Series:
    """Whether a latent's ratio lies in the central `share` of those of shared latents: bool, a row of a `latent_table`
    each. All False where there are no shared latents."""
    low, high = table[ratio][table["class"] == "shared"].quantile([(1 - share) / 2, (1 + share) / 2])
    return table[ratio].between(low, high)


class _Sums:
    """Sums over tokens, in float64: of f, of f^2, and of f y for targets y (batch, 2, d_model)."""

    def __init__(self, n_latents: int):
        self.total, self.energy = torch.zeros(2, n_latents, dtype=torch.float64).unbind()
        self.fired = torch.zeros(n_latents, dtype=torch.int64)
        self.weighted: dict[str, Tensor] = {}
        self.tokens = 0

    def add(self, latents: Tensor, targets: dict[str, Tensor]) -> None:
        code = code_of(latents)
        self.tokens += len(latents)
        for sums, values in ((self.total, code.values), (self.energy, code.values.double().square())):
            sums.index_add_(0, code.latents, values.double())
        self.fired.index_add_(0, code.latents, torch.ones_like(code.latents, dtype=torch.int64))
        for name, y in targets.items():
            found = code.sums(code.values, y.flatten(1)).unflatten(1, y.shape[1:]).transpose(0, 1)
            self.weighted[name] = self.weighted.get(name, 0) + found.double()

    def scaling(self, by_target: dict[str, Tensor], directions: Tensor) -> Scaling:
        """`by_target`: sum of f y, (2, n_latents, d_model) each."""
        norm = directions.square().sum(-1) * self.energy
        beta = {name: torch.linalg.vecdot(found, directions) / norm for name, found in by_target.items()}
        return Scaling(beta, self.energy, self.fired)


def twins(crosscoder: Crosscoder, cosine: float = 0.9) -> Tensor:
    """Pairs of a chat-only and a base-only latent whose own decoder rows point the same way, (pairs, 2)."""
    names = classes(delta_norm(crosscoder))
    chat, base = (torch.from_numpy(np.flatnonzero(names == name)) for name in ("chat-only", "base-only"))
    base_rows, chat_rows = (F.normalize(rows, dim=-1) for rows in crosscoder.decoders.detach())
    near = (chat_rows[chat] @ base_rows[base].T > cosine).nonzero()
    return torch.stack([chat[near[:, 0]], base[near[:, 1]]], 1)


def divergence(pairs: Tensor, worth: Tensor) -> Tensor:
    """How often the two latents of each pair (pairs, 2) fire apart: 0 always together, 1 always apart; NaN for never.

    `worth` (tokens, n_latents): activations times sizes. A latent is high above 0.4 of the pair's largest, low up to
    0.1 of it (released code); apart are tokens with one high and the other low, of those with any of them high.
    """
    found = []
    for pair in pairs.tolist():
        share = worth[:, pair] / worth[:, pair].max()
        high, low = share > 0.4, share <= 0.1
        apart = (high & low.flip(1)).any(1).sum()
        found.append(apart / high.any(1).sum())
    return torch.stack(found) if found else torch.empty(0)


@torch.no_grad()
def sae_table(sae: SparseAutoencoder, view: str, x: Tensor, batch: int = 4096) -> pd.DataFrame:
    """A row for each latent of the autoencoder of a view, read on pairs x (n, 2, d_model): rate and nu_activation.

    rate is the share of tokens it is on for. A latent that never fires has no ratio (NaN).
    """
    sae.eval()
    read = ((sae.encode(view_of(part, view)), part) for part in x.split(batch))
    scaling = activation_scaling(read, sae.W_dec)
    return pd.DataFrame({"rate": scaling.fired / len(x), "nu_activation": scaling.nu("activation")})
