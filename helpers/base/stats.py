"""A mean over seeds and the interval around it.

The interval of a mean over n seeds is Student's:   mean ± t(n - 1) · s / √n.   It assumes roughly normal seeds; a
bootstrap of three values is far too narrow. Where one run has many rows of text or dialogues, they are resampled, and
the interval holds 95 % of the resamplings.
"""

import math
from collections.abc import Callable, Iterable

import pandas as pd
import scipy.stats
import torch

ROUNDING = 1e-5  # nats: what float32 leaves of no difference at all


def interval(values: Iterable[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean of independent values (one per seed) and the ends of its Student interval; one value has no ends (nan).

    Where a value is nan, all three are: `known_interval` leaves such out. Raises ValueError for no values.
    """
    values = [float(value) for value in values]
    if not values:
        raise ValueError("an interval needs at least one value, got none")
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan, math.nan
    half = scipy.stats.t.ppf((1 + confidence) / 2, len(values) - 1) * scipy.stats.sem(values)
    return mean, float(mean - half), float(mean + half)


def ratio_interval(ratios: Iterable[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Geometric mean of independent positive ratios and its interval: `interval` of their logarithms, and back.

    Where a ratio is nan, all three are. Raises ValueError for none, and for a ratio that is infinite or not positive.
    """
    ratios = [float(ratio) for ratio in ratios]
    if wrong := [ratio for ratio in ratios if ratio <= 0 or ratio == math.inf]:
        raise ValueError(f"a geometric mean needs positive, finite ratios, got {wrong[0]}")
    mean, low, high = map(math.exp, interval(map(math.log, ratios), confidence))
    return mean, low, high


def recovered(left: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
    """Share of a gap that is closed, 1 - left / gap, both in nats; NaN where the gap is nothing but rounding."""
    return 1 - left / gap.where(gap > ROUNDING, math.nan)


def resampled_columns(name: str, drawn: torch.Tensor) -> dict[str, list[float]]:
    """A value for each row of `drawn` (n, 1 + draws), and the ends of the interval of its resamplings: name, name_low,
    name_high. Without draws there are no ends."""
    value, draws = drawn[:, 0].tolist(), drawn[:, 1:]
    if not draws.shape[1]:
        return {name: value}
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype), dim=1).tolist()
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def percent(mean: float | None, low: float | None, high: float | None) -> str:
    """A share in per cent with half the width of its interval: `12.5 ± 3.1`, `12.5` where it has none."""
    known = [x is not None and math.isfinite(x) for x in (mean, low, high)]
    if not known[0]:
        return "n/a"
    return f"{100 * mean:.1f}" + (f" ± {50 * (high - low):.1f}" if all(known) else "")


def percent_table(rows: pd.DataFrame, index: str, columns: str) -> pd.DataFrame:
    """`percent` of rows that have mean, low and high: a line for each value of `index`, in the order of the rows.

    What no row has is "n/a".
    """
    cells = rows.assign(cell=[percent(*ends) for ends in zip(rows["mean"], rows.low, rows.high, strict=True)])
    wide = cells.pivot(index=index, columns=columns, values="cell").fillna("n/a")
    return wide.loc[rows[index].unique(), rows[columns].unique()].rename_axis(columns="in %")


def known_interval(values: Iterable[float]) -> tuple[float, float, float]:
    """`interval` of the values that are there; nan where none is."""
    known = [float(value) for value in values if value is not None and math.isfinite(value)]
    return interval(known) if known else (math.nan,) * 3


def per_seed(table: pd.DataFrame, statistic: Callable[[pd.DataFrame], float]) -> tuple[float, float, float]:
    """`known_interval` of a statistic of each seed's rows; `table` has a column `seed`."""
    return known_interval(statistic(part) for _, part in table.groupby("seed"))


def above_least(halves: pd.DataFrame, among: pd.Index | None = None) -> pd.Series:
    """How far each row lies above the least one of `among` (all), for two columns that measure the same: their mean.

    The least of noisy numbers is too low where the same numbers judge it, so each column picks it for the other.
    """
    (a, b), some = halves.columns, halves if among is None else halves.loc[among]
    return ((halves[a] - halves.loc[some[b].idxmin(), a]) + (halves[b] - halves.loc[some[a].idxmin(), b])) / 2


def with_ends(values: tuple[float, float, float], digits: int = 2) -> str:
    """An interval as it is printed: `0.50 [0.40, 0.60]`."""
    mean, low, high = values
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
