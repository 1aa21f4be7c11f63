"""How figures look: one light template, one look per method throughout the suite, titles that wrap.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; symbol, dash and pattern differ too, so that
colour is never the only cue. Grey and dashed is always the paper. Importing this makes the template plotly's default.
"""

import textwrap
from collections.abc import Iterable
from itertools import cycle
from typing import NamedTuple

import numpy as np
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
    "Gated": Look("#56B4E9", "triangle-up", "8px,4px", "/"),
    "JumpReLU": Look("#009E73", "triangle-down", "dot", "x"),
    "TopK": Look("#D55E00", "circle", "solid", ""),
    "BatchTopK": Look("#E69F00", "square", "5px,2px", "\\"),
    "MultiTopK": Look("#CC79A7", "star", "8px,3px,2px,3px", "."),
    "AuxK": Look("#000000", "x", "12px,3px,3px,3px", "+"),
    "none": Look("#5F5F5F", "circle-open", "solid", "-"),
    "paper": Look("#8C8C8C", "line-ew-open", "dash", "|"),
}
GREYS = ("none", "paper")  # never lent to other series
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
ALONE = Look("#44617B", "circle", "solid", "")  # where there is one series and no method
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
        "colorway": [look.color for look in METHODS.values()],
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


def looks(names: Iterable) -> dict:
    """A look per series: methods keep theirs, numbers run through a sequential scale, others get what is left over.

    Raises ValueError for more series than there are looks.
    """
    names = list(dict.fromkeys(names))
    if names and all(isinstance(name, int | float | np.number) for name in names):
        return _looks_of_numbers(sorted(names))
    spare = [look for method, look in METHODS.items() if method not in (*names, *GREYS)]
    if sum(name not in METHODS for name in names) > len(spare):
        raise ValueError(f"{len(names)} series are too many to tell apart: show fewer, or spread them over panels.")
    return {name: METHODS[name] if name in METHODS else spare.pop(0) for name in names}


def headline(title: str, subtitle: str = "") -> tuple[str, float]:
    """Title in bold and subtitle below it, wrapped to the width of a figure, and the pixels they take."""
    lines = [f"<b>{line}</b>" for line in _wrapped(title, TITLE_SIZE)]
    style = f"font-size:{SUBTITLE_SIZE}px;color:{FAINT}"
    lines += [f'<span style="{style}">{line}</span>' for line in _wrapped(subtitle, SUBTITLE_SIZE)]
    return "<br>".join(lines), TITLE_TOP + LINE_SPACING * TITLE_SIZE * len(lines)


def faded(color: str, share: float = 0.18) -> str:
    """The colour "#rrggbb" at an opacity of `share`, for bands."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{share})"


def _looks_of_numbers(numbers: list) -> dict:
    colors = sample_colorscale("Viridis", np.linspace(0, 0.85, len(numbers)).tolist(), colortype="tuple")
    shapes = [look for method, look in METHODS.items() if method not in GREYS]
    colors = ["#" + "".join(f"{round(255 * part):02x}" for part in color) for color in colors]
    return {n: shape._replace(color=color) for n, shape, color in zip(numbers, cycle(shapes), colors, strict=False)}


def _wrapped(text: str, size: float) -> list[str]:
    text = text.replace(" = ", "\u00a0=\u00a0").replace(" %", "\u00a0%")  # stay on one line
    return textwrap.wrap(text, int((WIDTH - 30) / (0.55 * size)))  # a character is about half as wide as high
