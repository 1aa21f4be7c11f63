"""How good is a sparse code? Error, sparsity, dead latents, shrinkage, and what its largest latents alone rebuild.

NMSE  = sum |x - x_hat|^2 / sum |x - mean|^2     1 for predicting the mean, 0 for a perfect reconstruction
L0    = latents on per token
dead  = share of latents that never fire on the sample
shrinkage: keep which latents are on, choose their best values, and see how the values move
          (Gao et al. 2024, section 5.1, "refinement")

A code is progressive if the reconstruction gets better with every latent that is kept, in order of size:

    TopK rule        the k' largest latents of each token
    threshold rule   z 1[z > theta], with one theta for all tokens, such that as many are kept on average

An autoencoder trained at one k answers for that k alone; MultiTopK is trained at two (Gao et al. 2024, section 5.3).
Every k' comes from one pass of the encoder and one sorting.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.base.checks import require_finite, spread
from helpers.dictionaries import kernels
from helpers.dictionaries.autoencoders import ReLU, SparseAutoencoder, TopK


class Quality(NamedTuple):
    """Measured on one sample of activations."""

    nmse: float
    l0: float  # mean over tokens
    l0_sd: float  # standard deviation over tokens
    dead: float  # share of latents
    density: Tensor  # (n_latents,): share of tokens each latent is on for


def nmse(x: Tensor, x_hat: Tensor, mean: Tensor | None = None) -> float:
    """Squared error of x_hat over that of always predicting `mean` (of x by default). Both (batch, d_model).

    Raises ValueError for x or x_hat that is not finite, and for x that is all `mean`.
    """
    total = spread(x, around=mean)
    require_finite(x_hat, "reconstructions", "check the autoencoder's weights")
    return ((x - x_hat).square().sum() / total).item()


@torch.no_grad()
def evaluate(sae: SparseAutoencoder, x: Tensor, batch: int = 4096) -> Quality:
    """NMSE, L0, dead share and density of `sae` on x (n, d_model), in fp32, without a full (n, n_latents) code.

    Raises ValueError for x that is not finite or has no variance, as none or one activation has, and for weights that
    are not finite.
    """
    sae.eval()
    spread(x)
    error, counts, l0 = 0.0, torch.zeros(sae.n_latents, dtype=torch.int64, device=x.device), []
    for part in x.split(batch):
        latents = sae.encode(part)
        on = (latents > 0).view(len(part), -1, sae.n_latents).any(1)  # a decoupled latent is on in either model
        x_hat = sae.decode(latents)
        require_finite(x_hat, "reconstructions", "check the autoencoder's weights")
        error += (part - x_hat).square().sum(dtype=torch.float64).item()
        counts += on.sum(0)
        l0.append(on.sum(1))
    l0 = torch.cat(l0).double()
    total = (x - x.mean(0)).square().sum(dtype=torch.float64).item()
    density = counts / len(x)
    return Quality(error / total, l0.mean().item(), l0.std().item(), (counts == 0).float().mean().item(), density)


@torch.no_grad()
def silent(sae: SparseAutoencoder, batches: Iterable[Tensor], windows: Sequence[int]) -> dict[int, float]:
    """Share of the latents that no token of a window turns on, for each window: as many tokens from the first on.

    A rare latent is silent in a short window, a dead one in each. Of `batches` (n, d_model) a window has those that end
    in it. Raises ValueError for batches that end before a window.
    """
    sae.eval()
    since, read = torch.full((sae.n_latents,), math.inf), 0  # tokens read when a latent was first on
    for x in batches:
        read += len(x)
        since = torch.where(_fired(sae, x).cpu(), since.clamp(max=read), since)
    if read < max(windows):
        raise ValueError(f"a window of {max(windows):,} tokens in {read:,}: give more batches, or ask for less")
    return {window: (since > window).float().mean().item() for window in windows}


def _fired(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """(n_latents,) bool: on for any token. Of TopK without its dense code, in a third of the time."""
    if not isinstance(sae.activation, TopK):
        return (sae.encode(x) > 0).view(-1, sae.n_latents).any(0)
    return kernels.encode_topk(x, sae.W_enc, sae.b_enc, sae.b_dec, sae.activation.k, sae.sizes()).fired()


def at_matched_l0(l0: list[float], error: list[float], wanted: float) -> float:
    """NMSE at sparsity `wanted`, interpolated linearly between neighbours in log L0 and log NMSE.

    An L0 of zero, which has no logarithm, is left out. Raises ValueError when `wanted` lies outside the measured range
    (no extrapolation), and for values that are not finite, or an error of zero.
    """
    points = sorted((x, y) for x, y in zip(l0, error, strict=True) if x != 0)
    if wrong := [point for point in points if not all(0 < value < math.inf for value in point)]:
        raise ValueError(f"an L0 and its NMSE must be finite and positive, found {wrong[0]}: leave out what failed")
    if not points or not points[0][0] <= wanted <= points[-1][0]:
        reached = f"{points[0][0]:.1f} to {points[-1][0]:.1f}" if points else "nothing"
        raise ValueError(f"L0 {wanted} lies outside the measured range ({reached}); widen the sweep")
    logs = torch.tensor(points, dtype=torch.float64).log()
    place = torch.tensor(wanted, dtype=torch.float64).log()
    right = int(torch.searchsorted(logs[:, 0].contiguous(), place).clamp(1, len(logs) - 1)) if len(logs) > 1 else 0
    if right == 0:
        return points[0][1]
    (x0, y0), (x1, y1) = logs[right - 1], logs[right]
    share = ((place - x0) / (x1 - x0)).item() if x1 > x0 else 0.0
    return float((y0 + share * (y1 - y0)).exp())


class Refined(NamedTuple):
    """Latents before and after refinement, both (batch, n_latents)."""

    before: Tensor
    after: Tensor

    def shift(self) -> Tensor:
        """Relative change of each token's summed latents: (tokens with any latent on,). Positive: they were shrunk."""
        before, after = self.before.sum(1), self.after.sum(1)
        on = before > 0
        return after[on] / before[on] - 1


@torch.no_grad()
def refine(sae: SparseAutoencoder, x: Tensor, n_iterations: int = 200) -> Refined:
    """Best non-negative values for the latents that are on, decoder fixed, the rest kept at zero.

    Accelerated projected gradient descent on |x - b_dec - z W_dec|^2 from the encoder's values; the error never
    ends higher than it began. x: (batch, d_model).
    """
    require_finite(x, "activations", "check the subject and its dtype")
    before = sae.eval().encode(x)
    k = int((before > 0).sum(1).amax()) if len(x) else 0
    start, rows = before.topk(max(k, 1), dim=1)
    support = (start > 0).to(x)
    W = sae.W_dec[rows] * support.unsqueeze(-1)  # (batch, k, d_model), zero for what is off
    gram, wanted = W @ W.mT, (W @ (x - sae.b_dec).unsqueeze(-1)).squeeze(-1)
    step = 1 / torch.linalg.matrix_norm(gram, ord=1).clamp(min=1e-12).unsqueeze(1)  # at least the largest eigenvalue
    z, momentum, t = start, start, 1.0
    for _ in range(n_iterations):
        gradient = (gram @ momentum.unsqueeze(-1)).squeeze(-1) - wanted
        new, t_new = (momentum - step * gradient).relu() * support, (1 + (1 + 4 * t * t) ** 0.5) / 2
        z, momentum, t = new, new + (t - 1) / t_new * (new - z), t_new
    worse = _error(gram, wanted, z) > _error(gram, wanted, start)
    z = torch.where(worse.unsqueeze(1), start, z)
    return Refined(before, torch.zeros_like(before).scatter(1, rows, z))


def _error(gram: Tensor, wanted: Tensor, z: Tensor) -> Tensor:
    """|x - b_dec - z W|^2 up to a constant, per token."""
    return ((gram @ z.unsqueeze(-1)).squeeze(-1) * z).sum(1) - 2 * (wanted * z).sum(1)


@torch.no_grad()
def recovery(sae: SparseAutoencoder, x: Tensor, kept: Sequence[int]) -> pd.DataFrame:
    """NMSE of x (batch, d_model) by number of latents kept: columns kept, rule ("TopK" or "threshold"), l0, nmse.

    The threshold keeps as many latents on average as the TopK rule finds positive, so the two are at equal L0. The code
    of all of x, (batch, n_latents), is held in memory. Raises ValueError unless `kept` ascends from 1 or more to
    n_latents at most, and for an activation that does more than to select.
    """
    if not isinstance(sae.activation, TopK | ReLU):
        name = type(sae.activation).__name__
        raise ValueError(f"{name} does more than to select latents: take TopK, MultiTopK or ReLU")
    spread(x)
    if not kept or not all(low < high for low, high in pairwise([0, *kept, sae.n_latents + 1])):
        raise ValueError(f"`kept` must ascend between 1 and {sae.n_latents}, it is {list(kept)}")
    latents = sae.pre_acts(x).relu()
    largest, rows = latents.flatten().sort(descending=True).values, []
    for k, (l0, x_hat) in zip(kept, keep_largest(sae, latents, kept), strict=True):
        above = latents * (latents > threshold(largest, round(l0 * len(x))))
        rows.append({"kept": k, "rule": "TopK", "l0": l0, "nmse": nmse(x, x_hat)})
        l0 = (above > 0).sum().item() / len(x)
        rows.append({"kept": k, "rule": "threshold", "l0": l0, "nmse": nmse(x, sae.decode(above))})
    return pd.DataFrame(rows)


def keep_largest(sae: SparseAutoencoder, latents: Tensor, kept: Sequence[int]) -> Iterator[tuple[float, Tensor]]:
    """L0 and reconstruction (batch, d_model) from the largest of latents (batch, n_latents), for each of `kept`."""
    values, indices = latents.topk(kept[-1])
    x_hat = sae.b_dec.expand(len(latents), -1)
    for low, high in pairwise([0, *kept]):
        part = slice(low, high)
        x_hat = x_hat + F.embedding_bag(indices[:, part], sae.W_dec, per_sample_weights=values[:, part], mode="sum")
        yield (values[:, :high] > 0).sum().item() / len(latents), x_hat


def threshold(largest: Tensor, count: int) -> float:
    """The theta that `count` of the values, sorted from the largest, exceed; fewer where values are equal."""
    return largest[count].item() if count < len(largest) else 0.0
