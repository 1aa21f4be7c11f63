"""What a crosscoder says about two models, in numbers: how close they are, counts by class, modes, cosines, artefacts.

A latent that never fires on the sample is dead. It is counted, and left out of everything else.

    modes       bumps in the histogram of Delta_norm that stand out by half of their height, and by more than counting
                alone would make them (three times the root of the count)
    artefacts   share of chat-only latents whose nu lies in the central 95 % of shared ones: by Latent Scaling the base
                model has as much of them as of a shared latent
    matched L0  each method is interpolated along its own frontier; only the L0 that both have reached count
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import scipy.signal
import torch
from torch import Tensor

from helpers.dictionaries.crosscoders import Crosscoder
from helpers.dictionaries.quality import at_matched_l0
from helpers.diffing.norms import CLASSES, inside_shared, latent_table

LOW_COSINE = 0.5
BINS = 20  # of Delta_norm, where modes are counted


def closeness(x: Tensor, groups: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """How far chat is from base on groups of tokens, bool (n,) each; a group without tokens is left out.

    difference is the squared distance of the two activations, as a share of chat's from its mean over all of x (n, 2,
    d_model); norm_ratio is the mean norm in chat over that in base.
    """
    base, chat = x.unbind(1)
    apart, spread = (chat - base).square().sum(-1), (chat - chat.mean(0)).square().sum(-1)
    norms = x.norm(dim=-1)  # (n, 2)
    rows = []
    for name, inside in groups.items():
        if (mask := torch.as_tensor(inside)).any():
            ratio = norms[mask, 1].mean() / norms[mask, 0].mean()
            difference = apart[mask].sum() / spread[mask].sum()
            about = {"difference": difference.item(), "norm_ratio": ratio.item()}
            rows.append({"group": name, "tokens": int(mask.sum())} | about)
    return pd.DataFrame(rows)


def modes(delta: np.ndarray, bins: int = BINS) -> int:
    """Separate modes of Delta_norm values, see the module's head."""
    counts = np.concatenate([[0], np.histogram(delta, bins, (0.0, 1.0))[0], [0]])
    by_place = counts + 1e-6 * np.arange(len(counts))  # of two equal peaks one is the higher
    peaks, found = scipy.signal.find_peaks(by_place, prominence=0)
    height = counts[peaks]
    return int((found["prominences"] > np.maximum(height / 2, 3 * np.sqrt(height))).sum())


def live(table: pd.DataFrame) -> pd.DataFrame:
    """The latents of a `latent_table` that fired."""
    return table[table.rate > 0]


def artefact_share(table: pd.DataFrame, ratio: str = "nu_reconstruction") -> float:
    """Share of chat-only latents inside the central 95 % of shared ones; NaN where there are none of either."""
    alive = live(table)
    chat_only = alive["class"] == "chat-only"
    if not chat_only.any() or not (alive["class"] == "shared").any():
        return float("nan")
    return float(inside_shared(alive, ratio)[chat_only].mean())


def shuffled_cosines(crosscoder: Crosscoder, among: np.ndarray, seed: int = 0) -> np.ndarray:
    """Cosines of the base row of a latent and the chat row of another; `among`: (n_latents,) bool. What chance gives.

    Every latent of at least two gets another one, never itself.
    """
    chosen = np.random.default_rng(seed).permutation(np.flatnonzero(among))
    if len(chosen) < 2:
        return np.empty(0)
    base, chat = torch.nn.functional.normalize(crosscoder.decoders.detach()[:, torch.from_numpy(chosen)], dim=-1)
    return (base * chat.roll(1, 0)).sum(-1).numpy()


def describe(crosscoder: Crosscoder, x: Tensor, table: pd.DataFrame | None = None) -> dict[str, float]:
    """One crosscoder in a row of numbers, read on x (n, 2, d_model); `table`: its `latent_table`, if it is there.

    live, dead           latents
    base_only ... other  latents per 1,000 live ones, by class
    outer                share of live latents with Delta_norm in an outer tenth
    modes, artefacts     see the module's head
    cosine, low_share    of shared latents: median cosine of their rows, share below `LOW_COSINE`
    shuffled             95th percentile of cosines in shuffled pairs of shared latents
    """
    table = latent_table(crosscoder, x) if table is None else table
    alive, cosine = live(table), live(table).query("`class` == 'shared'").cosine
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


def gain_at_matched_l0(frame: pd.DataFrame, method: str, over: str) -> pd.Series:
    """Variance explained by one method minus that by another at matched L0, a mean over L0 for each seed.

    `frame` has a row for each crosscoder: method, seed, l0, fve. Counted are the L0 of either method that lie in the
    range of both. Raises ValueError for a seed whose methods share no L0.
    """
    return frame.groupby("seed").apply(_gain, method, over, include_groups=False)


def _gain(frame: pd.DataFrame, method: str, over: str) -> float:
    a, b = (frame[frame.method == name] for name in (method, over))
    low, high = max(a.l0.min(), b.l0.min()), min(a.l0.max(), b.l0.max())
    wanted = [l0 for l0 in (*a.l0, *b.l0) if low <= l0 <= high]
    if not wanted:
        raise ValueError(f"{method} and {over} share no L0: widen the prices or the k of either")
    errors = [[at_matched_l0(list(part.l0), list(1 - part.fve), l0) for l0 in wanted] for part in (a, b)]
    return float(np.subtract(errors[1], errors[0]).mean())
