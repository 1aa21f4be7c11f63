"""Which latents are called chat-only, and which of them wrongly.

    by norm      Delta_norm of at least 0.9
    by ratio     nu_reconstruction and nu_error below the paper's cuts, `latent_scaling.SPECIFIC`

    shrunk       weak directions called chat-only by norm though their exact Delta_norm, 1 - rho / 2, is below the cut
    decoupled    latents called chat-only by norm whose nu_reconstruction lies where shared latents' do
    twinned      context directions that have both a chat-only and a base-only latent

Tables have a row for each live latent: the columns of `latent_table`, of an injected pair those of `planted_of` too.

Source: Minder, Dumas et al. 2025, sections 2.3 and 3.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from helpers.diffing.latent_scaling import NU_RANGE, SPECIFIC, inside_shared
from helpers.diffing.norms import CLASSES
from helpers.diffing.recovery import score_planted

CUT = CLASSES["chat-only"][0]  # of Delta_norm
RATIOS = ["nu_error", "nu_reconstruction"]


def by_norm(table: pd.DataFrame) -> np.ndarray:
    """Latents with a Delta_norm of the class chat-only, (rows,) bool."""
    return (table["class"] == "chat-only").to_numpy()


def by_ratio(table: pd.DataFrame) -> np.ndarray:
    """Latents with both ratios below the paper's cuts, (rows,) bool; False where there is no ratio."""
    return np.all([table[f"nu_{target}"] < cut for target, cut in SPECIFIC.items()], axis=0)


RULES = {"by norm": by_norm, "by ratio": by_ratio}


def larger_ratio(table: pd.DataFrame) -> pd.Series:
    """The larger of |nu_error| and |nu_reconstruction|: near zero for a latent that base has nothing of."""
    return table[RATIOS].abs().max(axis=1)


def lowest(values: pd.Series, size: int) -> np.ndarray:
    """Which rows are the `size` lowest, missing values last: (rows,) bool."""
    order = np.argsort(values.fillna(np.inf).to_numpy())
    return np.isin(np.arange(len(values)), order[:size])


def rule_scores(planted: pd.DataFrame, delta: Tensor) -> pd.DataFrame:
    """`score_planted` of each rule on each crosscoder: method, seed, rule, precision, recall, called, live.

    `delta`: the exact Delta_norm of all planted directions.
    """
    rows = []
    for (method, seed), table in planted.groupby(["method", "seed"]):
        for rule, called in RULES.items():
            score = score_planted(called(table), table.planted.to_numpy(int), delta)._asdict()
            counts = {"called": int(called(table).sum()), "live": len(table)}
            rows.append({"method": method, "seed": seed, "rule": rule} | score | counts)
    return pd.DataFrame(rows)


def best_matches(planted: pd.DataFrame) -> pd.DataFrame:
    """The latent of each crosscoder (method, seed) that matches a planted direction best, a row for each found one."""
    return planted[planted.planted >= 0].sort_values("match").groupby(["method", "seed", "planted"]).tail(1)


def shrunk(best: pd.DataFrame) -> float:
    """Share of the weak directions with an exact Delta_norm below the cut that are called chat-only; NaN without any.

    `best` is of `best_matches`.
    """
    weak = best[(best.kind == "weak") & (1 - best.rho.astype(float) / 2 < CUT)]
    return (weak.delta >= CUT).mean()


def decoupled(table: pd.DataFrame) -> float:
    """Share of the latents called chat-only by norm that are `inside_shared`; NaN without any."""
    called = by_norm(table)
    return inside_shared(table)[called].mean() if called.any() else np.nan


def twinned(planted: pd.DataFrame, labels: Sequence[str]) -> float:
    """Share of the planted context directions of one crosscoder that have a chat-only and a base-only latent; NaN
    without any.

    `labels` are the kinds of all planted directions.
    """
    classes = planted[planted.kind == "context"].groupby("planted")["class"].agg(set)
    n = labels.count("context")
    return sum({"chat-only", "base-only"} <= found for found in classes) / n if n else np.nan


def agreement(table: pd.DataFrame, ratio: str) -> float:
    """|Pearson's r| of Delta_norm and a ratio (its column), over latents whose ratio lies in `NU_RANGE`.

    NaN where either does not vary over them.
    """
    usable = table.loc[table[ratio].between(*NU_RANGE), ["delta", ratio]].astype(float)
    if len(usable) < 2 or (np.ptp(usable, axis=0) == 0).any():
        return np.nan
    return abs(np.corrcoef(usable.T)[0, 1])


def counts_below(table: pd.DataFrame, cuts: Iterable[float]) -> pd.DataFrame:
    """Latents of each crosscoder whose `larger_ratio` is below a cut: method, seed, cut, latents."""
    rows = [
        {"method": method, "seed": seed, "cut": cut, "latents": int((larger_ratio(part) < cut).sum())}
        for (method, seed), part in table.groupby(["method", "seed"])
        for cut in cuts
    ]
    return pd.DataFrame(rows)
