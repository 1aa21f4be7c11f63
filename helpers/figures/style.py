"""How figures look: one light template, one look per method throughout the suite, titles that wrap.

A method has its look in every notebook, and nothing else ever has it: what is no method has a palette of its own.
Colours of the autoencoders are those of Okabe and Ito, which colour-blind readers tell apart, two of them darkened to
a contrast of 3 to 1 with white (WCAG 2); symbol, dash and pattern differ too, so that colour is never the only cue.
Grey and dashed is always the paper.
Importing this makes the template plotly's default, and keeps dollar signs of tables from becoming formulas.
"""

import re
import textwrap
from collections.abc import Iterable
from html import escape
from itertools import cycle
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from plotly.colors import sample_colorscale


class Look(NamedTuple):
    """How one series is drawn: "#rrggbb", a marker symbol, a line dash, a bar pattern (plotly's names)."""

    color: str
    symbol: str
    dash: str
    pattern: str


METHODS = {
    "ReLU": Look("#0072B2", "diamond", "solid", ""),
    "Gated": Look("#2894FA", "triangle-up", "8px,4px", "/"),
    "JumpReLU": Look("#009E73", "triangle-down", "dot", "x"),
    "TopK": Look("#D55E00", "circle", "solid", ""),
    "BatchTopK": Look("#B88D42", "square", "5px,2px", "\\"),
    "MultiTopK": Look("#CC79A7", "star", "8px,3px,2px,3px", "."),
    "AuxK": Look("#000000", "x", "12px,3px,3px,3px", "+"),
    "decoupled": Look("#7B5EA7", "hexagon", "9px,2px,2px,2px", "x"),
    "diff-SAE": Look("#A6192E", "cross", "solid", "/"),
    "chat-SAE": Look("#00685E", "pentagon", "solid", "."),
    "mean difference": Look("#7A6A00", "diamond-tall", "10px,3px", "+"),
    "linear probe": Look("#3A3A3A", "star-diamond", "2px,2px", "|"),
    "random directions": Look("#8A949E", "circle-open-dot", "1px,3px", "-"),
    "none": Look("#5F5F5F", "circle-open", "solid", "-"),
    "paper": Look("#8C8C8C", "line-ew-open", "dash", "|"),
}
SAME = {  # other names of a method
    "L1": "ReLU",
    "L1 crosscoder": "ReLU",
    "ReLU + L1": "ReLU",
    "Multi-TopK": "MultiTopK",
    "BatchTopK crosscoder": "BatchTopK",
    "random": "random directions",
    "random direction": "random directions",
}
OTHERS = (  # what is no method
    Look("#44617B", "circle", "solid", ""),
    Look("#882255", "diamond", "7px,3px", "/"),
    Look("#999933", "square", "dot", "x"),
    Look("#332288", "triangle-up", "10px,3px,2px,3px", "\\"),
    Look("#8C510A", "triangle-down", "5px,2px", "."),
    Look("#2E8B8B", "star", "3px,3px", "+"),
    Look("#B05FA0", "x", "12px,4px", "-"),
)
LABELS = {  # axis titles with units, so that a quantity has one name in every notebook
    "tokens": "training tokens",
    "nmse": "normalised MSE (1 = always the mean)",
    "l0": "L0 (active latents per token)",
    "loss": "cross-entropy (nats per token)",
    "n_latents": "number of latents n",
    "dead_fraction": "dead latents (share of n)",
}
WIDTH, HEIGHT, PANEL_HEIGHT = 840, 460, 300  # pixels of an exported figure, and of the axes in a row of panels
INK, FAINT = "#222222", "#5F5F5F"
ALONE = OTHERS[0]  # where there is one series
TITLE_SIZE, SUBTITLE_SIZE, TEXT_SIZE = 18, 14, 14
TITLE_TOP, LINE_SPACING = 26, 1.3  # pixels above the first line; plotly's distance of two lines

_AXIS = {
    "showline": True,
    "linecolor": INK,
    "ticks": "outside",
    "gridcolor": "#E3E3E3",
    "zeroline": False,
    "automargin": True,
    "title": {"font": {"size": TEXT_SIZE}, "standoff": 10},
}
pio.templates["suite"] = go.layout.Template(
    layout={
        "font": {"family": "Arial, Helvetica, DejaVu Sans, sans-serif", "size": TEXT_SIZE, "color": INK},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "colorway": [look.color for look in OTHERS],
        "title": {"x": 0, "xref": "container", "yref": "container", "pad": {"l": 12}, "font": {"size": TITLE_SIZE}},
        "xaxis": {**_AXIS, "exponentformat": "SI"},
        "yaxis": {**_AXIS, "exponentformat": "power"},
        "annotationdefaults": {"font": {"size": TEXT_SIZE}},
        "legend": {
            "orientation": "h",
            "yref": "container",
            "y": 0.01,
            "yanchor": "bottom",
            "x": 0,
            "title": {"font": {"size": TEXT_SIZE}},
        },
        "coloraxis": {"colorscale": "Cividis", "colorbar": {"title": {"side": "right", "font": {"size": TEXT_SIZE}}}},
        "hoverlabel": {"font": {"size": TEXT_SIZE}},
    }
)
pio.templates.default = "suite"
pd.options.display.html.use_mathjax = False  # else two dollar signs of a table become a formula


def looks(names: Iterable) -> dict:
    """A look per series: methods have theirs, numbers run through a sequential scale, others take from `OTHERS`.

    Variants of a method ("TopK, refined", "diff-SAE + Latent Scaling") share its colour; a second differs in the rest.

    Raises ValueError for more series than there are looks.
    """
    names = list(dict.fromkeys(names))
    if names and all(isinstance(name, int | float | np.number) for name in names):
        return _looks_of_numbers(sorted(names))
    known = _looks_of_methods(name for name in names if _method(name) in METHODS)
    if len(names) - len(known) > len(OTHERS):
        raise ValueError(f"{len(names)} series are too many to tell apart: show fewer, or spread them over panels.")
    spare = iter(OTHERS)
    return {name: known[name] if name in known else next(spare) for name in names}


def _method(name: str) -> str:
    """The method that a series is, or is a variant of."""
    first = name if name in SAME else re.split(r", | \+ ", name)[0]
    return SAME.get(first, first)


def _looks_of_methods(names: Iterable[str]) -> dict[str, Look]:
    found: dict[str, Look] = {}
    for name in sorted(names, key=lambda name: name not in METHODS):  # the method itself before its variants
        look = METHODS[_method(name)]
        if look in found.values():
            look = look._replace(
                symbol=f"{look.symbol}-open", dash="4px,4px", pattern="." if look.pattern != "." else "x"
            )
        found[name] = look
    return found


def headline(title: str, subtitle: str = "") -> tuple[str, float]:
    """Title in bold and subtitle below it, wrapped to the width of a figure, and the pixels they take.

    They are text: a `<b>` in them is shown, not obeyed.
    """
    lines = [f"<b>{escape(line, quote=False)}</b>" for line in _wrapped(title, TITLE_SIZE)]
    style = f"font-size:{SUBTITLE_SIZE}px;color:{FAINT}"
    lines += [f'<span style="{style}">{escape(line, quote=False)}</span>' for line in _wrapped(subtitle, SUBTITLE_SIZE)]
    return "<br>".join(lines), TITLE_TOP + LINE_SPACING * TITLE_SIZE * len(lines)


def faded(color: str, share: float = 0.18) -> str:
    """The colour "#rrggbb" at an opacity of `share`, for bands."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{share})"


def _looks_of_numbers(numbers: list) -> dict:
    shapes = OTHERS
    colors = sampled("Viridis", np.linspace(0, 0.85, len(numbers)))
    return {n: shape._replace(color=color) for n, shape, color in zip(numbers, cycle(shapes), colors, strict=False)}


def sampled(scale: str, places: Iterable[float]) -> list[str]:
    """Colours "#rrggbb" of a colour scale at places from 0 to 1; a place that rounding puts beyond an end is at it."""
    colors = sample_colorscale(scale, [min(max(float(place), 0.0), 1.0) for place in places], colortype="tuple")
    return ["#" + "".join(f"{round(255 * part):02x}" for part in color) for color in colors]


def _wrapped(text: str, size: float) -> list[str]:
    """Lines no wider than a figure. What stands between two dots stays on one line if it fits."""
    text = text.replace(" = ", "\u00a0=\u00a0").replace(" %", "\u00a0%")
    width = int((WIDTH - 30) / (0.55 * size))  # a character is about half as wide as high
    if len(text) > width:
        parts = text.split(" · ")
        text = "\u00a0· ".join(part.replace(" ", "\u00a0") if len(part) < width - 2 else part for part in parts)
    return textwrap.wrap(text, width, break_on_hyphens=False)


def text_on(color: str) -> str:
    """Black or white, whichever stands out more on "#rrggbb": a contrast of at least 4.5 to 1 (WCAG 2)."""
    return max(("#000000", "#FFFFFF"), key=lambda text: contrast(text, color))


def contrast(one: str, other: str) -> float:
    """Ratio of the relative luminances of two colours "#rrggbb", 1 to 21 (WCAG 2)."""
    low, high = sorted(map(_luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(color: str) -> float:
    parts = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])
