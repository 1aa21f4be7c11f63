"""Which latents are called chat-only, and which of them wrongly.

    by norm      Delta_norm of at least 0.9
    by ratio     nu_reconstruction and nu_error below the paper's cuts, `latent_scaling.SPECIFIC`

    shrunk       weak directions called chat-only by norm though their exact Delta_norm, 1 - rho / 2, is below the cut
    twinned      context directions that have both a chat-only and a base-only latent (Latent Decoupling); the ratio of
                 such a chat-only latent is that of the share of its tokens at which base has the direction as well

Tables have a row for each live latent: the columns of `latent_table`, of an injected pair those of `planted_of` too.

Source: Minder, Dumas et al. 2025, sections 2.3 and 3.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from helpers.diffing.latent_scaling import NU_RANGE, by_ratio
from helpers.diffing.norms import CLASSES
from helpers.diffing.recovery import score_planted

CUT = CLASSES["chat-only"][0]  # of Delta_norm
RATIOS = ["nu_error", "nu_reconstruction"]


def by_norm(table: pd.DataFrame) -> np.ndarray:
    """Latents with a Delta_norm of the class chat-only, (rows,) bool."""
    return (table["class"] == "chat-only").to_numpy()


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


def twinned(planted: pd.DataFrame, labels: Sequence[str]) -> float:
    """Share of the planted context directions of one crosscoder that have a chat-only and a base-only latent; NaN
    without any.

    `labels` are the kinds of all planted directions.
    """
    n = labels.count("context")
    return len(_twins(planted)) / n if n else np.nan


def chat_only_ratios(planted: pd.DataFrame) -> dict[str, float]:
    """Median nu_reconstruction of the chat-only latents of one crosscoder whose direction is twinned, and of those of a
    direction in chat alone: "twinned", "alone"; NaN without any."""
    called = planted[by_norm(planted)]
    parts = {"twinned": called.planted.isin(_twins(planted)), "alone": called.kind == "chat-only"}
    return {name: called.nu_reconstruction[part].astype(float).median() for name, part in parts.items()}


def _twins(planted: pd.DataFrame) -> list[int]:
    """The context directions that have both."""
    classes = planted[planted.kind == "context"].groupby("planted")["class"].agg(set)
    return [direction for direction, found in classes.items() if {"chat-only", "base-only"} <= found]


def counts_at(table: pd.DataFrame, cuts: Sequence[float] = (0.8, CUT)) -> pd.DataFrame:
    """Live latents of one crosscoder from a cut of Delta_norm on, and what the ratios say of them: a row for each cut.

    Columns: cut, per_1000 (of the live ones), nu_error and nu_reconstruction (medians), unspecific (the share that
    `by_ratio` does not call chat-only); NaN where there are none.
    """
    rows = []
    for cut in cuts:
        called = table[table.delta >= cut]
        medians = {ratio: called[ratio].astype(float).median() for ratio in RATIOS}
        unspecific = 1 - by_ratio(called).mean() if len(called) else np.nan
        rows.append({"cut": cut, "per_1000": 1000 * len(called) / len(table)} | medians | {"unspecific": unspecific})
    return pd.DataFrame(rows)


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
