"""What figures are drawn on and with: checked frames, panels and axes, means with intervals, lines, bands, whiskers.

`plots` is made of these; a notebook calls `plots`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TypedDict

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from helpers.base.stats import interval
from helpers.figures.style import ALONE, LABELS, METHODS, PANEL_HEIGHT, TITLE_TOP, Look, faded, headline, looks

PANELS_A_ROW = 3
ARROWS = {"lower": "↓", "higher": "↑"}
MARKED = 30  # a line of at most so many points has a marker at each
Parts = list[tuple[dict, pd.DataFrame]]  # per panel: {"row": ..., "col": ...} and the rows that belong there


class Canvas(TypedDict, total=False):
    """What every figure takes: the finding as `title` (needed), and scale, subject and seeds as `subtitle`.

    `panel` is a column with one panel per value; `log` the logarithmic axes ("x", "y" or "xy"); `labels` an axis title
    per column, where it is not the suite's (`style.LABELS`); `better` the good direction of y, "lower" or "higher".
    """

    title: str
    subtitle: str
    panel: str | None
    log: str
    labels: Mapping[str, str]
    better: str


def blank(
    frame: pd.DataFrame,
    x: str,
    y: str,
    series: str | None = None,
    *,
    title: str,
    subtitle: str = "",
    panel: str | None = None,
    log: str = "",
    labels: Mapping[str, str] | None = None,
    better: str = "",
) -> tuple[go.Figure, Parts]:
    """A figure with titles and axes but no data, and the parts of the frame that go into its panels."""
    if not set(log) <= set("xy"):
        raise ValueError(f"`log` names the logarithmic axes, so it is 'x', 'y' or 'xy', not {log!r}.")
    groups = [("", frame)] if panel is None else list(frame.groupby(panel, observed=True, dropna=False))
    rows = -(-len(groups) // PANELS_A_ROW)
    columns = -(-len(groups) // rows)
    names = [value if isinstance(value, str) else f"{panel} = {_named(value)}" for value, _ in groups]
    figure = make_subplots(rows, columns, shared_xaxes="all", shared_yaxes="all", subplot_titles=names)
    labels = {**LABELS, **(labels or {})}
    figure.update_xaxes(title_text=labels.get(x, x), showticklabels=True, **_scale(frame, x, "x" in log))
    figure.update_yaxes(**_scale(frame, y, "y" in log)).update_yaxes(
        title_text=_with_direction(labels.get(y, y), better), col=1
    )
    if series is not None and pd.api.types.is_numeric_dtype(frame[series]):
        figure.update_layout(legend_title_text=labels.get(series, series))
    _set_margins(figure, *headline(title, subtitle), rows, bool(panel))
    places = [{"row": i // columns + 1, "col": i % columns + 1} for i in range(len(groups))]
    return figure, [(place, part) for place, (_, part) in zip(places, groups, strict=True)]


def spread(frame: pd.DataFrame, parts: Parts, series: str | None) -> Iterator[tuple[dict, Look, pd.DataFrame]]:
    """Per panel and series: where its trace goes and what it is called, how it looks, and its rows."""
    if series is None:
        for place, part in parts:
            yield {"showlegend": False, **place}, ALONE, part
        return
    style, seen = looks(frame[series]), set()
    for place, part in parts:
        for name in (name for name in style if (part[series] == name).any()):
            legend = {"name": _named(name), "legendgroup": _named(name), "showlegend": name not in seen}
            seen.add(name)
            yield {**legend, **place}, style[name], part[part[series] == name]


def band(frame: pd.DataFrame, by: str | list[str], y: str, sort: bool = True) -> pd.DataFrame:
    """A row per group of `by`: its columns, then mean, low, high (`stats.interval`) and seeds, the number of rows.

    A group of one row has no interval: its low and high are its value.
    """
    by = [by] if isinstance(by, str) else list(by)
    check(frame, [*by, y])
    groups = frame.groupby(by, sort=sort, observed=True, dropna=False)[y]
    rows = [(*key, *interval(values.tolist()), len(values)) for key, values in groups]
    table = pd.DataFrame(rows, columns=[*by, "mean", "low", "high", "seeds"])
    return table.fillna({"low": table["mean"], "high": table["mean"]})


def add_line(
    figure: go.Figure, table: pd.DataFrame, x: str, look: Look, trace: dict, error_y: dict | None = None
) -> None:
    """The means of a `band` table over `x`."""
    figure.add_scatter(
        x=plain(table[x]),
        y=plain(table["mean"]),
        mode="lines+markers" if len(table) <= MARKED else "lines",
        line={"color": look.color, "dash": look.dash, "width": 2},
        marker={"symbol": look.symbol, "size": 8},
        error_y=error_y,
        **trace,
    )


def add_band(figure: go.Figure, table: pd.DataFrame, x: str, look: Look, trace: dict, log: str) -> None:
    """The intervals of a `band` table over `x`, as one closed shape behind the line."""
    low = _lows(table, log)
    figure.add_scatter(
        x=plain([*table[x], *table[x][::-1]]),
        y=plain([*table["high"], *low[::-1]]),
        mode="lines",
        fill="toself",
        fillcolor=faded(look.color),
        line={"width": 0},
        hoverinfo="skip",
        **{**trace, "showlegend": False},
    )


def whiskers(table: pd.DataFrame, look: Look, log: str) -> dict:
    """The intervals of a `band` table as plotly's error bars."""
    many = table["seeds"] > 1
    up, down = (table["high"] - table["mean"]).where(many), (table["mean"] - _lows(table, log)).where(many)
    return {
        "symmetric": False,
        "array": plain(up),
        "arrayminus": plain(down),
        "color": look.color,
        "thickness": 1.5,
        "width": 4 if many.all() else 0,  # plotly would draw the two ends of no interval
    }


def add_paper(figure: go.Figure, parts: Parts, paper: float | pd.DataFrame | None, x: str, y: str) -> go.Figure:
    """The paper's value in every panel: a level across the data, or a line through a frame with columns `x` and `y`."""
    for i, (place, part) in enumerate([] if paper is None else parts):
        line = paper if isinstance(paper, pd.DataFrame) else pd.DataFrame({x: [part[x].min(), part[x].max()], y: paper})
        look = {"color": METHODS["paper"].color, "dash": METHODS["paper"].dash, "width": 2}
        trace = {"name": "paper", "legendgroup": "paper", "showlegend": i == 0, **place}
        figure.add_scatter(x=plain(line[x]), y=plain(line[y]), mode="lines", line=look, **trace)
    return figure


def plain(values: Iterable[float]) -> list[float]:
    """Numbers at six significant digits, which no eye can tell from more and which keep a stored notebook small."""
    return [float(f"{value:.6g}") for value in values]


def check(frame: pd.DataFrame, columns: Iterable[str | None], log_columns: Iterable[str] = ()) -> None:
    """Raise ValueError unless the frame has rows, has the columns, and a log axis can show the `log_columns`."""
    if not isinstance(frame, pd.DataFrame):
        raise ValueError(f"A figure needs a pandas DataFrame, not {type(frame).__name__}: pass pd.DataFrame(rows).")
    if frame.empty:
        raise ValueError("The frame to plot has no rows: look at the filter, or at the experiment, that made it.")
    if missing := [column for column in columns if column is not None and column not in frame]:
        raise ValueError(
            f"The frame to plot has no column {missing[0]!r}, it has {', '.join(map(str, frame.columns))}."
        )
    for column in log_columns:
        values = frame[column].to_numpy(dtype=float)
        if bad := int((~np.isfinite(values) | (values <= 0)).sum()):
            raise ValueError(
                f"A log axis cannot show {bad} of {len(values)} values of {column!r} (NaN, infinite or not positive): "
                "drop them, or leave this axis out of `log`."
            )


def _with_direction(title: str, better: str) -> str:
    return f"{title}<br>{ARROWS[better]} {better} is better" if better else title


def _lows(table: pd.DataFrame, log: str) -> pd.Series:
    """On a log axis an interval that reaches zero is cut a decade below its mean."""
    return table["low"].clip(lower=table["mean"] / 10) if "y" in log else table["low"]


def _set_margins(figure: go.Figure, text: str, text_height: float, rows: int, panels: bool) -> None:
    top, bottom = text_height + (34 if panels else 16), 95  # pixels; the bottom holds axis titles and the legend
    height = round(top + bottom + rows * PANEL_HEIGHT)
    margin = {"t": top, "b": bottom, "l": 75, "r": 20}
    figure.update_layout(title={"text": text, "y": 1 - TITLE_TOP / height}, margin=margin, height=height)


def _scale(frame: pd.DataFrame, column: str, log: bool) -> dict:
    """A log axis writes every tick out where the data spans few decades, as plotly shortens 20 to a small 2."""
    if not log:
        return {}
    if column not in frame or frame[column].max() > 2000 * frame[column].min():
        return {"type": "log", "dtick": 1}
    low, high = frame[column].min() / 1.2, frame[column].max() * 1.2
    steps = (1, 1.5, 2, 3, 4, 5, 7) if high < 10 * low else (1, 2, 5)
    steps = (1, 1.2, 1.5, *range(2, 10)) if high < 3 * low else steps
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
    return {"type": "log", "tickvals": plain(ticks), "ticktext": [_named(tick) for tick in plain(ticks)]}


def _named(value: object) -> str:
    """A number as it is best read on an axis or in a legend; anything else as it is."""
    if not isinstance(value, int | float | np.number):
        return str(value)
    size, unit = (1e6, "M") if value >= 1e6 else (1e3, "k") if value >= 1e4 and value % 1e3 == 0 else (1, "")
    return f"{value / size:,.6g}{unit}"
