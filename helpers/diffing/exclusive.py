"""Latents that belong to one model: when training finds what they stand for, and whether it is found again.

    half tokens   tokens until the recall of planted directions is half of what it is in the end
    found again   share of some directions that one of some others points along: of another seed, or of the other model
    isolation     F1 of the best latent for a label, less the F1 of the same latent for its second-best label

Sources: Dedicated Feature Crosscoders (arXiv 2602.11729) for time and seeds; arXiv 2605.07324 for isolation.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch.nn.functional as F
from torch import Tensor

from helpers.activations.injected import InjectedPair
from helpers.base.checks import require_finite
from helpers.dictionaries.crosscoders import Crosscoder
from helpers.dictionaries.training import TrainConfig, Training
from helpers.diffing.recovery import COSINE, directions, recalls

# ---- when


def recall_curve(
    crosscoder: Crosscoder, batches: Iterable[Tensor], pair: InjectedPair, config: TrainConfig, points: int = 40
) -> pd.DataFrame:
    """Train on batches (batch, 2, d_model) of the pair, and say on the way what is found: tokens, and a column for each
    kind of `recalls`, with "exclusive". Raises ValueError for batches that end before the training does."""
    batches = (x.flatten(1) for x in batches)
    first = next(batches)
    training, rows = Training(crosscoder, config, first), []
    for x in (first, *batches):
        training.step(x)
        if training.tokens >= (len(rows) + 1) * config.tokens / points:
            rows.append({"tokens": training.tokens} | recalls(directions(crosscoder), pair).to_dict())
        if training.tokens >= config.tokens:
            return pd.DataFrame(rows)
    raise ValueError(f"the batches ended after {training.tokens:,} of {config.tokens:,} tokens: train less")


def half_tokens(tokens: pd.Series, recall: pd.Series) -> float:
    """Tokens until recall first is half of its last value, on straight lines between points and from none at none; NaN
    where nothing is found."""
    tokens, recall = (np.r_[0.0, values] for values in (tokens, recall))
    if not recall[-1] > 0:
        return float("nan")
    above = int((recall >= recall[-1] / 2).argmax())
    part = slice(above - 1, above + 1)
    return float(np.interp(recall[-1] / 2, recall[part], tokens[part]))


# ---- again


def found_again(rows: Tensor, others: Tensor, cosine: float = COSINE) -> float:
    """Share of `rows` (m, d_model) with one of `others` (n, d_model) along them; NaN for no rows."""
    for each in (rows, others):
        require_finite(each, "directions", "check the dictionary's weights")
    if not len(rows) or not len(others):
        return 0.0 if len(rows) else float("nan")
    return (F.normalize(rows, dim=-1) @ F.normalize(others, dim=-1).T > cosine).any(1).float().mean().item()


# ---- alone


def isolation(chosen: np.ndarray, scored: np.ndarray, label: int) -> dict[str, float]:
    """F1 scores (n_labels, n_latents) twice: the latent that is best for a label in `chosen`, and of its F1 in `scored`
    best, that for the label, other, its highest for another label, and isolation, their difference.

    Raises ValueError for fewer than two labels.
    """
    if len(scored) < 2:
        raise ValueError("isolation compares a label with others: give two at least")
    latent = chosen[label].argmax()
    best, other = scored[label, latent], np.delete(scored[:, latent], label).max()
    return {"best": float(best), "other": float(other), "isolation": float(best - other)}
