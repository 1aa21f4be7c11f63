"""How close two models are, and which crosscoder explains more at equal sparsity.

matched L0  each method is interpolated along its own frontier; only the L0 that both have reached count
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from helpers.dictionaries.quality import at_matched_l0


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
