"""Whose is a latent? By the norms of its two decoder rows, and do these point the same way?

    Delta_j = 1/2 (1 + (|d_j^chat| - |d_j^base|) / max of both)        0 base-only, 1/2 shared, 1 chat-only    (eq. 3)

    modes    bumps in the histogram of Delta_norm that stand out by half of their height, and by more than counting
             alone would make them (three times the root of the count)
    twins    a chat-only and a base-only latent whose own decoder rows point the same way

A loss may shrink a row to zero though the model has the concept: `latent_scaling` asks the activations themselves.

Source: Minder, Dumas et al. 2025, section 2. Index 0 is base, 1 chat.
"""

import numpy as np
import scipy.signal
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.dictionaries.crosscoders import Crosscoder

CLASSES = {"base-only": (0.0, 0.1), "shared": (0.4, 0.6), "chat-only": (0.9, 1.0)}  # of Delta_norm, ends included
BINS = 20  # of Delta_norm, where modes are counted


def delta_norm(crosscoder: Crosscoder) -> Tensor:
    """Relative difference of a latent's decoder norms, (n_latents,) in 0 ... 1; one half where both are zero."""
    base, chat = crosscoder.decoders.detach().norm(dim=-1).cpu()
    largest = torch.maximum(base, chat)
    return 0.5 * (1 + (chat - base) / largest.where(largest > 0, 1))


def classes(delta: Tensor) -> np.ndarray:
    """The class of each Delta_norm (n_latents,), by name; "other" between the classes."""
    names = np.full(len(delta), "other", dtype=object)
    for name, (low, high) in CLASSES.items():
        names[((delta >= low) & (delta <= high)).numpy()] = name
    return names


def modes(delta: np.ndarray) -> int:
    """Separate modes of Delta_norm values, see the module's head."""
    counts = np.concatenate([[0], np.histogram(delta, BINS, (0.0, 1.0))[0], [0]])
    by_place = counts + 1e-6 * np.arange(len(counts))  # of two equal peaks one is the higher
    peaks, found = scipy.signal.find_peaks(by_place, prominence=0)
    height = counts[peaks]
    return int((found["prominences"] > np.maximum(height / 2, 3 * np.sqrt(height))).sum())


def decoder_cosine(crosscoder: Crosscoder) -> Tensor:
    """Cosine of a latent's two decoder rows, (n_latents,)."""
    return F.cosine_similarity(*crosscoder.decoders.detach(), dim=-1).cpu()


def shuffled_cosines(crosscoder: Crosscoder, among: np.ndarray, seed: int = 0) -> np.ndarray:
    """Cosines of the base row of a latent and the chat row of another; `among`: (n_latents,) bool. What chance gives.

    Every latent of at least two gets another one, never itself.
    """
    chosen = np.random.default_rng(seed).permutation(np.flatnonzero(among))
    if len(chosen) < 2:
        return np.empty(0)
    base, chat = torch.nn.functional.normalize(crosscoder.decoders.detach()[:, torch.from_numpy(chosen)], dim=-1)
    return (base * chat.roll(1, 0)).sum(-1).cpu().numpy()


def twins(crosscoder: Crosscoder, cosine: float = 0.9) -> Tensor:
    """Pairs of a chat-only and a base-only latent whose own decoder rows point the same way, (pairs, 2)."""
    names = classes(delta_norm(crosscoder))
    chat, base = (torch.from_numpy(np.flatnonzero(names == name)) for name in ("chat-only", "base-only"))
    base_rows, chat_rows = (F.normalize(rows, dim=-1) for rows in crosscoder.decoders.detach())
    near = (chat_rows[chat] @ base_rows[base].T > cosine).nonzero().cpu()
    return torch.stack([chat[near[:, 0]], base[near[:, 1]]], 1)


@torch.no_grad()
def twin_counts(crosscoder: Crosscoder, x: Tensor) -> dict[str, float]:
    """pairs, the number of `twins`, and apart, the share of them that mostly fire apart on x (n, 2, d_model).

    A pair that never fires is not in the share, which is NaN where none is left.
    """
    latents = twins(crosscoder).flatten()
    worth = crosscoder.encode(x)[:, latents] * crosscoder.sizes()[latents]
    apart = divergence(torch.arange(len(latents)).view(-1, 2), worth.cpu())
    return {"pairs": len(latents) // 2, "apart": (apart[~apart.isnan()] > 0.5).float().mean().item()}


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
