"""Draw an N2G trie: patterns read from left to right, and those that end alike share their last tokens at the right.

Tokens that do not branch are written as one run. ∗ is any token, ⊢ the start of a row; a number is the activation
that a pattern predicts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from itertools import count
from typing import NamedTuple

import plotly.graph_objects as go

from helpers.evaluation.trie import ANY, START, Trie
from helpers.figures.style import INK, METHODS, TEXT_SIZE, TITLE_TOP, WIDTH, headline
from helpers.figures.tokens import in_line, visible

SIGNS = {ANY: "∗", START: "⊢"}
VALUE = 8  # characters that a number takes
GAP = 4  # characters between a run and the next
LONGEST = 44  # characters of a run; more are cut at the left
LINE, PIXELS = 26, WIDTH - 40  # height of a pattern, width of all, in pixels
WIDE = 0.602  # width of a character over its size
MONO = "DejaVu Sans Mono, Menlo, Consolas, monospace"


class Branch(NamedTuple):
    """A run of keys in reading order, the value if a pattern starts here, and the branches to its left."""

    keys: tuple[int, ...]
    value: float | None
    below: list["Branch"]


class Run(NamedTuple):
    """A branch on the figure: its text from `left` to `right` in characters, 0 at the end of all patterns; line `y`."""

    text: str
    left: float
    right: float
    y: float
    value: float | None
    below: list["Run"]

    @property
    def edge(self) -> float:
        """Where what stands to its left may begin."""
        return self.left if self.value is None else self.left - VALUE


def draw(trie: Trie, decode: Callable[[int], str], *, title: str, subtitle: str = "") -> go.Figure:
    """A figure of the trie; `decode` gives the text of a token id. Raises ValueError for a trie without patterns."""
    if not trie.n_patterns:
        raise ValueError("there is nothing to draw: the trie has no patterns")
    lines = count()
    runs = list(_flat([_placed(branch, decode, 0.0, lines) for branch in branches(trie.patterns())]))
    widest, n_lines = 1 - min(run.edge for run in runs), next(lines)
    size = min(TEXT_SIZE, PIXELS / (WIDE * widest))
    figure, (text, top) = go.Figure(), headline(title, subtitle)
    _add_links(figure, runs)
    _add_texts(figure, runs, {"family": MONO, "size": size})
    height = round(top + LINE * n_lines + 30)
    figure.update_layout(title={"text": text, "y": 1 - TITLE_TOP / height}, width=WIDTH, height=height)
    figure.update_layout(margin={"l": 20, "r": 20, "t": top, "b": 20}, showlegend=False)
    figure.update_xaxes(visible=False, range=[1 - PIXELS / (WIDE * size), 1], fixedrange=True)
    return figure.update_yaxes(visible=False, range=[n_lines - 0.5, -0.5], fixedrange=True)


def branches(patterns: Sequence[tuple[tuple[int, ...], float]]) -> list[Branch]:
    """The trie of patterns in reading order, with unbranched tokens joined; the strongest pattern's branch first."""
    groups: dict[int, list] = {}
    for keys, value in sorted(patterns, key=lambda pattern: -pattern[1]):
        groups.setdefault(keys[-1], []).append((keys[:-1], value))
    return [_branch((key,), rest) for key, rest in groups.items()]


def _branch(keys: tuple[int, ...], rest: list[tuple[tuple[int, ...], float]]) -> Branch:
    longer = [(left, value) for left, value in rest if left]
    if len(longer) == len(rest) and len({left[-1] for left, _ in rest}) == 1:
        return _branch((rest[0][0][-1], *keys), [(left[:-1], value) for left, value in rest])
    return Branch(keys, next((value for left, value in rest if not left), None), branches(longer))


def _placed(branch: Branch, decode: Callable[[int], str], right: float, lines: Iterator[int]) -> Run:
    text = _text(branch.keys, decode)
    run = Run(text, right - len(text), right, 0.0, branch.value, [])
    run.below.extend(_placed(child, decode, run.edge - GAP, lines) for child in branch.below)
    return run._replace(y=(run.below[0].y + run.below[-1].y) / 2 if run.below else float(next(lines)))


def _flat(runs: Iterable[Run]) -> Iterator[Run]:
    for run in runs:
        yield run
        yield from _flat(run.below)


def _add_links(figure: go.Figure, runs: list[Run]) -> None:
    """A curve from each run to those on its left."""
    for run in runs:
        for child in run.below:
            start, end, middle = run.edge - 0.5, child.right + 0.5, (run.edge + child.right) / 2
            path = f"M {start},{run.y} C {middle},{run.y} {middle},{child.y} {end},{child.y}"
            figure.add_shape(type="path", path=path, line={"color": METHODS["paper"].color, "width": 1.5})


def _add_texts(figure: go.Figure, runs: list[Run], font: dict) -> None:
    places = {"mode": "text", "hoverinfo": "skip"}
    x, y, text = [run.right for run in runs], [run.y for run in runs], [escape(run.text, quote=False) for run in runs]
    figure.add_scatter(x=x, y=y, text=text, textposition="middle left", textfont={**font, "color": INK}, **places)
    ends = [run for run in runs if run.value is not None]
    x, y, text = [run.left - 1 for run in ends], [run.y for run in ends], [f"{run.value:.2g}" for run in ends]
    color = METHODS["TopK"].color
    figure.add_scatter(x=x, y=y, text=text, textposition="middle left", textfont={**font, "color": color}, **places)


def _text(keys: Sequence[int], decode: Callable[[int], str]) -> str:
    text = in_line((SIGNS.get(key) or visible(decode(key)) for key in keys), " ")
    return text if len(text) <= LONGEST else "…" + text[1 - LONGEST :]
