"""Is a code progressive: does the reconstruction get better with every latent that is kept, in order of size?

    TopK rule        the k' largest latents of each token
    threshold rule   z 1[z > theta], with one theta for all tokens, such that as many are kept on average

An autoencoder trained at one k answers for that k alone; MultiTopK is trained at two (Gao et al. 2024, section 5.3).
Every k' comes from one pass of the encoder and one sorting.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.dictionaries.autoencoders import ReLU, SparseAutoencoder, TopK
from helpers.dictionaries.quality import nmse


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
    if not all(low < high for low, high in pairwise([0, *kept, sae.n_latents + 1])):
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
