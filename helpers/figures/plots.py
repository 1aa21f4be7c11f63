"""Figures: `show`, and functions that turn a tidy frame into a plotly Figure.

A tidy frame has one row per measurement and named columns (method, n_latents, sparsity, seed, l0, nmse, ...). Rows that
differ in their seed only are one point: its height is their mean, its band or whisker their t interval
(`stats.interval`). `series` is the column that tells lines apart; `paper` is the paper's value, grey and dashed. The
keywords of `Canvas` go with every function: title, subtitle, panel, log, labels. A wrong column, an empty frame, or a
value that a log axis cannot show raises ValueError.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from html import unescape
from typing import Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from IPython.display import display

from helpers.base.clock import spent_on
from helpers.figures.canvas import (
    Canvas,
    Parts,
    add_band,
    add_line,
    add_paper,
    band,
    blank,
    check,
    plain,
    spread,
    whiskers,
)
from helpers.figures.style import FAINT, INK, LABELS, METHODS, sampled, text_on

SHARE, BINS = "share per bin", 40
DASHES = ("solid", "dash", "dot")  # of the lines that `trend` adds to a figure


@spent_on("figures")
def show(figure: go.Figure) -> None:
    """Display one output: interactive in Jupyter, its titles for a screen reader; stored, it has an image too."""
    alt = unescape(" ".join(re.sub(r"<[^>]*>", " ", figure.layout.title.text or "a figure").split()))
    config = {"displayModeBar": False, "responsive": True, "typesetMath": False}  # dollar signs are no formula
    content = {**json.loads(figure.to_json()), "config": config}
    display({"text/plain": alt, "application/vnd.plotly.v1+json": content}, raw=True)


def frontier(
    frame: pd.DataFrame,
    x: str = "l0",
    y: str = "nmse",
    *,
    series: str = "method",
    cell: str = "sparsity",
    paper: pd.DataFrame | None = None,
    **canvas: Unpack[Canvas],
) -> go.Figure:
    """`y` against `x`, both log: a line per series, a marker with whiskers per `cell` (the k, or the L1 weight).

    One panel per n_latents unless `panel` says otherwise. The seeds of a cell may differ in `x` too, as an L1 weight
    does not fix L0: the marker stands at their mean.
    """
    canvas = {"panel": "n_latents", "log": "xy", **canvas}
    figure, parts = _prepared(frame, x, y, series, [cell], canvas)
    for trace, look, part in spread(frame, parts, series):
        table = band(part, cell, y).assign(**{x: band(part, cell, x)["mean"]}).sort_values(x)
        add_line(figure, table, x, look, trace, whiskers(table, look, canvas["log"]))
    return add_paper(figure, parts, paper, x, y)


def curves(
    frame: pd.DataFrame,
    x: str,
    y: str,
    *,
    series: str | None = None,
    paper: float | pd.DataFrame | None = None,
    **canvas: Unpack[Canvas],
) -> go.Figure:
    """`y` over `x`: a line per series with a band over the rows that share `x`. `paper` is a level, or a frame."""
    figure, parts = _prepared(frame, x, y, series, [], canvas)
    for trace, look, part in spread(frame, parts, series):
        table = band(part, x, y)
        add_band(figure, table, x, look, trace, canvas.get("log", ""))
        add_line(figure, table, x, look, trace)
    return add_paper(figure, parts, paper, x, y)


def scatter(
    frame: pd.DataFrame,
    x: str,
    y: str,
    *,
    series: str | None = None,
    hover: str | None = None,
    paper: float | pd.DataFrame | None = None,
    **canvas: Unpack[Canvas],
) -> go.Figure:
    """A marker per row, a few thousand at most; `hover` is a column of text to show under the pointer."""
    figure, parts = _prepared(frame, x, y, series, [hover], canvas)
    for trace, look, part in spread(frame, parts, series):
        marker = {"color": look.color, "symbol": look.symbol, "size": 8, "opacity": 0.7}
        text = part[hover].astype(str).tolist() if hover else None
        figure.add_scatter(x=plain(part[x]), y=plain(part[y]), mode="markers", marker=marker, text=text, **trace)
    return add_paper(figure, parts, paper, x, y)


def histogram(frame: pd.DataFrame, x: str, *, series: str | None = None, **canvas: Unpack[Canvas]) -> go.Figure:
    """The share of each series' rows in bins of `x`, as steps over common bins.

    On a log y axis an empty bin leaves the picture at its lower edge, as zero has no logarithm.
    """
    figure, parts = _prepared(frame, x, SHARE, series, [], canvas)
    log_x = "x" in canvas.get("log", "")
    edges = np.histogram_bin_edges(np.log(frame[x]) if log_x else frame[x], BINS)
    edges = np.exp(edges) if log_x else edges
    drawn = [(*each, np.histogram(each[-1][x], edges)[0] / len(each[-1])) for each in spread(frame, parts, series)]
    shares = np.concatenate([share for *_, share in drawn])
    floor, ends = 0.0, shares.max() * np.array([-0.03, 1.2])  # room for what is written at the top
    if "y" in canvas.get("log", ""):
        least = shares[shares > 0].min()
        floor, ends = least / 10, np.log10([least / 2, 3 * shares.max()])
    figure.update_yaxes(range=plain(ends))
    for trace, look, _, share in drawn:
        line = {"shape": "hv", "color": look.color, "dash": look.dash, "width": 2}
        x_steps, y_steps = plain([edges[0], *edges]), plain([floor, *share.clip(min=floor), floor])
        figure.add_scatter(x=x_steps, y=y_steps, mode="lines", line=line, **trace)
    return figure


def bars(
    frame: pd.DataFrame,
    x: str,
    y: str,
    *,
    series: str | None = None,
    paper: Mapping[str, float] | None = None,
    **canvas: Unpack[Canvas],
) -> go.Figure:
    """A bar per category `x` and series: the mean of its rows with its interval. `paper` maps categories to values."""
    figure, parts = _prepared(frame, x, y, series, [], canvas)
    for trace, look, part in spread(frame, parts, series):
        table = band(part, x, y, sort=False)
        marker = {"color": look.color, "pattern": {"shape": look.pattern, "fillmode": "overlay", "size": 6}}
        error_y = {**whiskers(table, look, canvas.get("log", "")), "color": "black"}
        figure.add_bar(x=table[x].astype(str).tolist(), y=plain(table["mean"]), error_y=error_y, marker=marker, **trace)
    for i, (place, _) in enumerate(parts if paper else []):
        mark = {"symbol": "line-ew-open", "size": 40, "line": {"width": 3}, "color": METHODS["paper"].color}
        trace = {"name": "paper", "legendgroup": "paper", "showlegend": i == 0, **place}
        figure.add_scatter(
            x=[str(name) for name in paper], y=plain(paper.values()), mode="markers", marker=mark, **trace
        )
    return figure.update_xaxes(type="category").update_yaxes(rangemode="tozero")


def heatmap(frame: pd.DataFrame, x: str, y: str, z: str, *, digits: int = 2, **canvas: Unpack[Canvas]) -> go.Figure:
    """A coloured cell per pair (x, y), with the mean of its rows in column `z` written in it."""
    figure, parts = _prepared(frame, x, y, None, [z], canvas)
    means = [part.groupby([x, y], observed=True)[z].mean() for _, part in parts]
    low, high = min(map(min, means)), max(map(max, means))
    for place, part in parts:
        table = part.pivot_table(index=y, columns=x, values=z, sort=False)
        columns, rows = table.columns.astype(str).tolist(), table.index.astype(str).tolist()
        cells = [plain(row) for row in table.to_numpy()]
        figure.add_heatmap(z=cells, x=columns, y=rows, coloraxis="coloraxis", xgap=2, ygap=2, **place)
        written = [(c, r, z) for r, row in zip(rows, cells, strict=True) for c, z in zip(columns, row, strict=True)]
        written = [cell for cell in written if cell[2] == cell[2]]  # no number, no text
        shades = sampled("Cividis", [(z - low) / ((high - low) or 1) for *_, z in written])
        font = {"color": [text_on(shade) for shade in shades]}
        places = {"x": [c for c, *_ in written], "y": [r for _, r, _ in written], "hoverinfo": "skip"}
        text = [f"{z:.{digits}f}" for *_, z in written]
        figure.add_scatter(mode="text", text=text, textfont=font, showlegend=False, **places, **place)
    figure.update_layout(coloraxis={"cmin": low, "cmax": high})
    figure.update_layout(coloraxis_colorbar_title_text={**LABELS, **canvas.get("labels", {})}.get(z, z))
    return figure.update_xaxes(type="category", showgrid=False).update_yaxes(type="category", showgrid=False)


def mark(figure: go.Figure, x: object, y: float, text: str, log: str = "", **place: int) -> go.Figure:
    """Point at (x, y), the one that the title speaks of. `log` as in `Canvas`; `place` is row and col of its panel,
    and where the text stands, `ax` pixels right of the point and `ay` below it."""
    at = {axis: math.log10(v) if axis in log else v for axis, v in (("x", x), ("y", y))}
    arrow = {"showarrow": True, "arrowhead": 2, "ax": 40, "ay": -35, "bgcolor": "rgba(255,255,255,0.8)"}
    return figure.add_annotation(text=text, **at, **(arrow | place))


def trend(
    figure: go.Figure,
    law: Callable[[np.ndarray], np.ndarray],
    between: tuple[float, float],
    text: str,
    log: str = "",
    at: float = 0.5,
    **place: int,
) -> go.Figure:
    """A thin black line y = law(x) for x `between`, behind what was measured; `text`, the number that it gives to the
    title, is marked at the share `at` of its length. `log` and `place` as in `mark`. Left out is an unknown law (nan),
    and one that reaches zero on a logarithmic axis, where it has no place.
    """
    x = np.geomspace(*between, 41) if "x" in log else np.linspace(*between, 41)
    y = np.broadcast_to(law(x), x.shape)
    if not np.isfinite([*x, *y]).all() or ("y" in log and y.min() <= 0):
        return figure
    panel = {name: value for name, value in place.items() if name in ("row", "col")}
    line = {"color": INK, "width": 1.5, "dash": DASHES[sum(trace.name == "law" for trace in figure.data) % len(DASHES)]}
    figure.add_scatter(x=plain(x), y=plain(y), mode="lines", line=line, name="law", showlegend=False, **panel)
    figure.data = (figure.data[-1], *figure.data[:-1])
    return mark(figure, x[round(40 * at)], y[round(40 * at)], text, log, **place)


def cut(figure: go.Figure, text: str, x: float | None = None, y: float | None = None, **place: int) -> go.Figure:
    """A dashed line at x or y, with what it separates written on it; in every panel, or in that of row and col."""
    axis, at, add = ("y", y, figure.add_hline) if x is None else ("x", x, figure.add_vline)
    log = figure.layout[f"{axis}axis"].type == "log"  # where a text has its logarithm as place, and a line has not
    text_at = {f"annotation_{axis}": math.log10(at) if log else at}
    line = {"color": FAINT, "dash": "dash", "width": 1.5}
    text_at |= {"annotation_font_color": FAINT, "annotation_bgcolor": "rgba(255,255,255,0.8)"}
    return add(at, line=line, annotation_text=text, **text_at, **place)


def regions(figure: go.Figure, named: Mapping[str, tuple[float, float]]) -> go.Figure:
    """Shade parts of the x axis in every panel, from left to right, with their names at the top and ticks at their
    ends. The x axis spans the parts."""
    ends = sorted({end for part in named.values() for end in part})
    for i, (name, (low, high)) in enumerate(named.items()):
        where = {0: "top left", len(named) - 1: "top right"}.get(i, "top")
        text = {"annotation_text": name, "annotation_position": where, "annotation_font_size": 12}
        figure.add_vrect(low, high, fillcolor=FAINT, opacity=0.12, line_width=0, **text)
    return figure.update_xaxes(range=[ends[0], ends[-1]], tickvals=ends[1:-1])


def _prepared(
    frame: pd.DataFrame, x: str, y: str, series: str | None, others: list[str | None], canvas: Canvas
) -> tuple[go.Figure, Parts]:
    columns = {column for column in (x, y, series, canvas.get("panel"), *others) if column not in (None, SHARE)}
    log_columns = [column for axis, column in (("x", x), ("y", y)) if axis in canvas.get("log", "") and column != SHARE]
    check(frame, columns, log_columns)
    return blank(frame, x, y, series, **canvas)
