"""Latent Scaling: how much of a latent is there in each model, whatever the norms of its decoder rows say?

When latent j fires, how much of its chat direction d = d_j^chat is there in a target y of each model?

    beta_j = argmin_b  sum |b f_j d - y|^2  =  d . sum f_j y / (|d|^2 sum f_j^2)
    nu_j   = beta_j(base) / beta_j(chat)                                   0: base has nothing of it; 1: as much as chat

    target                y, for model m
    error                 x[m] - x_hat[m] + f_j d_j^m     what the other latents leave    large in base: shrunk away
    reconstruction        x_hat[m]                        what all latents give           large in base: others carry it
    activation            x[m]                            what is there, whoever gives it
    activation_no_bias    x[m] - b_dec[m]

Latents of an autoencoder have the activation as only target.

    artefacts    share of latents called chat-only by norm whose ratios say that base has them as well: one of nu_error
                 and nu_reconstruction is not below the paper's cut, `SPECIFIC`. (The paper's other count is of ratios
                 where 95 % of the shared latents have theirs, near 1; that of a shrunk latent is near rho.)

A latent that never fires has no ratio. It is counted as dead, and left out of everything else.

Source: Minder, Dumas et al. 2025, section 3, with the targets of their released code. Index 0 is base, 1 chat.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from helpers.activations.views import view_of
from helpers.base.checks import require_finite
from helpers.dictionaries.autoencoders import SparseAutoencoder
from helpers.dictionaries.crosscoders import Crosscoder
from helpers.dictionaries.kernels import code_of
from helpers.diffing.norms import CLASSES, classes, decoder_cosine, delta_norm, modes, shuffled_cosines

TARGETS = ("error", "reconstruction", "activation", "activation_no_bias")
SPECIFIC = {"reconstruction": 0.5, "error": 0.2}  # a chat-specific latent of a crosscoder is below both (footnote 4)
SAE_SPECIFIC = 0.3  # one of an autoencoder has a ratio below this, either side of zero (Dumas, Minder & Nanda 2025)
NU_RANGE = (-0.1, 2.0)  # outside, Latent Scaling has found nothing (released code)
LOW_COSINE = 0.5
BATCH = 4096  # tokens a pass
NOTHING = "there is nothing to scale on: no activations came; check the stream"


class Scaling(NamedTuple):
    """What Latent Scaling found; NaN for latents that never fired, or whose chat row is zero."""

    beta: dict[str, Tensor]  # of each target: (2, n_latents) float64
    fired: Tensor  # (n_latents,) int64: tokens it was on for

    def nu(self, target: str) -> Tensor:
        """beta in base over beta in chat, (n_latents,); NaN where chat has nothing of the latent."""
        if target not in self.beta:
            raise ValueError(f"there is no target {target!r}: use one of {', '.join(self.beta)}")
        base, chat = self.beta[target]
        return base / chat.where(chat != 0, torch.nan)


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
        raise ValueError(NOTHING)
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


def latent_table(crosscoder: Crosscoder, x: Tensor) -> pd.DataFrame:
    """A row for each latent, read on x (n, 2, d_model): delta, class, cosine, rate, nu_<target> for each target.

    rate is the share of tokens it is on for. A latent that never fires has no ratios (NaN).
    """
    delta, scaling = delta_norm(crosscoder), latent_scaling(crosscoder, x.split(BATCH))
    ratios = {f"nu_{target}": scaling.nu(target) for target in TARGETS}
    geometry = {"delta": delta, "class": classes(delta), "cosine": decoder_cosine(crosscoder)}
    return pd.DataFrame(geometry | {"rate": scaling.fired / len(x)} | ratios)


@torch.no_grad()
def sae_table(sae: SparseAutoencoder, view: str, x: Tensor) -> pd.DataFrame:
    """A row for each latent of the autoencoder of a view, read on pairs x (n, 2, d_model): rate and nu_activation.

    rate is the share of tokens it is on for. A latent that never fires has no ratio (NaN).
    """
    sae.eval()
    sums = _Sums(sae.n_latents)
    for part in x.split(BATCH):
        sums.add(sae.encode(view_of(part, view)), {"activation": part})
    if not sums.tokens:
        raise ValueError(NOTHING)
    scaling = sums.scaling(sums.weighted, sae.W_dec.detach().double())
    return pd.DataFrame({"rate": scaling.fired / len(x), "nu_activation": scaling.nu("activation")})


def inside_shared(table: pd.DataFrame) -> pd.Series:
    """Whether a latent's nu_reconstruction lies in the central 95 % of those of shared latents: bool, a row of a
    `latent_table` each. All False where there are no shared latents."""
    ratio = table.nu_reconstruction
    return ratio.between(*ratio[table["class"] == "shared"].quantile([0.025, 0.975]))


def by_ratio(table: pd.DataFrame) -> np.ndarray:
    """Latents with both ratios below the paper's cuts, (rows,) bool; False where there is no ratio."""
    return np.all([table[f"nu_{target}"] < cut for target, cut in SPECIFIC.items()], axis=0)


def artefact_share(table: pd.DataFrame) -> float:
    """Share of the live chat-only latents that are not chat-only `by_ratio`; NaN where there are none."""
    chat_only = table[(table.rate > 0) & (table["class"] == "chat-only")]
    return 1 - float(by_ratio(chat_only).mean()) if len(chat_only) else float("nan")


def rank_sum(table: pd.DataFrame) -> pd.Series:
    """Score of each row of a `latent_table` by Latent Scaling, the best highest: -(rank of nu_error + rank of
    nu_reconstruction)."""
    return -(table.nu_error.rank() + table.nu_reconstruction.rank())


def crosscoder_summary(crosscoder: Crosscoder, table: pd.DataFrame) -> dict[str, float]:
    """One crosscoder and its `latent_table` in a row of numbers.

    live, dead           latents
    base_only ... other  latents per 1,000 live ones, by class
    outer                share of live latents with Delta_norm in an outer tenth
    modes, artefacts     see the heads of `norms` and of this module
    cosine, low_share    of shared latents: median cosine of their rows, share below `LOW_COSINE`
    shuffled             95th percentile of cosines in shuffled pairs of shared latents
    """
    alive = table[table.rate > 0]
    cosine = alive.cosine[alive["class"] == "shared"]
    by_class = {name.replace("-", "_"): (alive["class"] == name).mean() for name in (*CLASSES, "other")}
    chance = shuffled_cosines(crosscoder, ((table["class"] == "shared") & (table.rate > 0)).to_numpy())
    return {
        "live": len(alive),
        "dead": len(table) - len(alive),
        **{name: 1000 * share for name, share in by_class.items()},
        "outer": by_class["base_only"] + by_class["chat_only"],
        "modes": modes(alive.delta.to_numpy()),
        "artefacts": artefact_share(table),
        "cosine": cosine.median(),
        "low_share": (cosine < LOW_COSINE).mean(),
        "shuffled": np.quantile(chance, 0.95) if len(chance) else float("nan"),
    }


class _Sums:
    """Sums over tokens, in float64 and on the device of the first: of f, of f^2, and of f y for targets y (batch, 2,
    d_model)."""

    def __init__(self, n_latents: int):
        self.n_latents, self.tokens = n_latents, 0
        self.weighted: dict[str, Tensor] = {}

    def add(self, latents: Tensor, targets: dict[str, Tensor]) -> None:
        if not self.tokens:
            zeros = torch.zeros(2, self.n_latents, dtype=torch.float64, device=latents.device)
            (self.total, self.energy), self.fired = zeros, zeros[0].long()
        code = code_of(latents)
        self.tokens += len(latents)
        for sums, values in ((self.total, code.values), (self.energy, code.values.double().square())):
            sums.index_add_(0, code.latents, values.double())
        self.fired.index_add_(0, code.latents, torch.ones_like(code.latents, dtype=torch.int64))
        for name, y in targets.items():
            require_finite(y, "activations", "check the subject and its dtype")
            found = code.sums(code.values, y.flatten(1)).unflatten(1, y.shape[1:]).transpose(0, 1)
            self.weighted[name] = self.weighted.get(name, 0) + found.double()

    def scaling(self, by_target: dict[str, Tensor], directions: Tensor) -> Scaling:
        """`by_target`: sum of f y, (2, n_latents, d_model) each."""
        norm = directions.square().sum(-1) * self.energy
        beta = {name: (torch.linalg.vecdot(found, directions) / norm).cpu() for name, found in by_target.items()}
        return Scaling(beta, self.fired.cpu())
