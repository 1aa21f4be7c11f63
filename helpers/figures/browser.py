"""The latent browser: what one latent answers to, as coloured text. Arrays in, HTML or an ipywidgets box out.

`latent_record` reads one latent's activations on N windows of T tokens; `LatentBrowser` shows a list of records in a
live kernel, and carries the first pages as plain HTML for whoever opens the notebook without one. A page follows the
viewer of Gao et al. (2024): statistics, then windows drawn at random among the positive ones, and only then the
strongest, so that the typical case is judged before the flattering one. Code-hosting sites drop styles and scripts:
colours are inline, and a page stays readable when they are gone.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import ipywidgets
import numpy as np
import scipy.sparse
from IPython.display import display
from transformers import PreTrainedTokenizerBase

from helpers.dictionaries.pair_collection import Heldout
from helpers.diffing.reading import side_by_side
from helpers.figures.tokens import in_line, token_text, visible

HUE = (230, 159, 0)  # orange of Okabe and Ito: black text on it stays readable
NO_MATHS = "mathjax_ignore tex2jax_ignore"  # else two dollar signs of a text become a formula
BLOCKS, BINS = "▁▂▃▄▅▆▇█", 40  # of a histogram
INK = "color:#1a1a1a;background:#ffffff"  # both, everywhere: a dark theme brings its own
MONO = "font-family:Menlo,Consolas,'DejaVu Sans Mono',monospace"
CARD = (
    f"{INK};border:1px solid #cccccc;border-radius:6px;padding:8px 16px 12px;max-width:900px;"
    "font-family:Arial,Helvetica,sans-serif;font-size:14px;line-height:1.45"
)


@dataclass(frozen=True)
class Window:
    """A piece of text around the token `at`, with the latent's activation on each token."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    at: int


@dataclass(frozen=True)
class LatentRecord:
    """What a page shows of one latent; mean and histogram are over the tokens on which it is active."""

    latent: int
    n_tokens: int
    density: float  # share of tokens on which it is active
    mean: float
    maximum: float
    histogram: tuple[int, ...]  # tokens per bin, bins of equal width from 0 to the maximum
    random: tuple[Window, ...]
    top: tuple[Window, ...]
    promoted: tuple[str, ...]  # tokens its decoder direction makes likelier, if the caller gave them


def latent_record(
    latent: int,
    activations: np.ndarray,
    tokens: np.ndarray,
    decode: Callable[[Any], str] = str,
    *,
    n_random: int = 5,
    n_top: int = 5,
    context: int = 20,
    promoted: Sequence[str] = (),
    seed: int = 0,
) -> LatentRecord:
    """Summarise one latent from its activations (N, T) on tokens (N, T): strings, or ids for `decode`.

    Top windows are those with the highest maximum. Random ones are drawn by token, so a window that fires often is
    likelier. Both show `context` tokens on each side of the token they were picked for, and no window twice.
    """
    activations, tokens = np.asarray(activations), np.asarray(tokens)
    _check(activations, tokens)
    positive = activations[activations > 0]
    order = np.argsort(-activations.max(1), kind="stable")[:n_top]
    strongest = [(row, activations[row].argmax()) for row in order if activations[row].max() > 0]
    drawn = _random_positions(activations, n_random, np.random.default_rng((seed, latent)))
    cut = [[_window(activations[row], tokens[row], at, context, decode) for row, at in at] for at in (drawn, strongest)]
    return LatentRecord(
        latent=latent,
        n_tokens=activations.size,
        density=positive.size / activations.size,
        mean=float(positive.mean()) if positive.size else 0.0,
        maximum=float(positive.max()) if positive.size else 0.0,
        histogram=tuple(np.histogram(positive, BINS, (0, positive.max() if positive.size else 1))[0].tolist()),
        random=tuple(cut[0]),
        top=tuple(cut[1]),
        promoted=tuple(promoted),
    )


def page(record: LatentRecord) -> str:
    """One latent as HTML that needs neither style sheet nor script."""
    parts = [f'<p style="{INK};font-size:17px;margin:4px 0"><b>Latent {record.latent}</b></p>', *_statistics(record)]
    parts += _section("Random positive activations", record.random, record.maximum)
    parts += _section("Top activations", record.top, record.maximum)
    return f'<div class="{NO_MATHS}" style="{CARD}">{"".join(parts)}</div>'


class LatentBrowser(ipywidgets.VBox):
    """Pages of several latents with a menu and two buttons; without a kernel, the first `n_static` pages as HTML."""

    def __init__(self, records: Sequence[LatentRecord], n_static: int = 3):
        if not records:
            raise ValueError("The latent browser got no records: pass at least one latent_record(...).")
        self.records, self.n_static = list(records), n_static
        names = [(f"{record.latent} (active on {record.density:.2%})", i) for i, record in enumerate(self.records)]
        self.menu = ipywidgets.Dropdown(options=names, value=0, description="Latent")
        self.back, self.forth = (ipywidgets.Button(description=text) for text in ("◀ previous", "next ▶"))
        self.page = ipywidgets.HTML(page(self.records[0]))
        self.menu.observe(lambda change: setattr(self.page, "value", page(self.records[change.new])), "value")
        self.back.on_click(lambda _: self._turn(-1))
        self.forth.on_click(lambda _: self._turn(1))
        super().__init__([ipywidgets.HBox([self.back, self.menu, self.forth]), self.page])

    def show(self) -> None:
        """Display one output that holds the live widget and the static pages; a reader sees one of the two."""
        display(self)

    def static(self) -> str:
        """The first pages as plain HTML, all but the first folded."""
        first, *rest = self.records[: self.n_static]
        folded = [f"<details><summary>Latent {record.latent}</summary>{page(record)}</details>" for record in rest]
        note = f"{1 + len(rest)} of {len(self.records)} latents; run the notebook to browse them all."
        return "".join([page(first), *folded, f"<p><small>{note}</small></p>"])

    def _turn(self, step: int) -> None:
        self.menu.value = (self.menu.value + step) % len(self.records)

    def _repr_mimebundle_(self, **kwargs: Any) -> dict:
        return {**super()._repr_mimebundle_(**kwargs), "text/html": self.static()}


def _check(activations: np.ndarray, tokens: np.ndarray) -> None:
    if activations.ndim != 2 or activations.shape != tokens.shape or not activations.size:
        raise ValueError(
            f"Activations {activations.shape} and tokens {tokens.shape} must both be (windows, tokens) and not empty."
        )
    if not np.isfinite(activations).all():
        raise ValueError("The activations hold NaN or infinite values: look at the autoencoder that made them.")


def _random_positions(activations: np.ndarray, n: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Up to n positions (row, column) of positive activations, in random order, one per row."""
    drawn: dict[int, int] = {}
    for row, column in rng.permutation(np.argwhere(activations > 0)):
        if len(drawn) == n:
            break
        drawn.setdefault(int(row), int(column))
    return list(drawn.items())


def _window(activations: np.ndarray, tokens: np.ndarray, at: int, context: int, decode: Callable) -> Window:
    first = max(0, at - context)
    near = slice(first, at + context + 1)
    return Window(tuple(map(decode, tokens[near].tolist())), tuple(activations[near].tolist()), int(at - first))


def _statistics(record: LatentRecord) -> list[str]:
    lines = [
        f"Active on {record.density:.3%} of {record.n_tokens:,} tokens; when active: mean {record.mean:.3g}, "
        f"maximum {record.maximum:.3g}.",
        f"Activations 0 {_code(_sparkline(record.histogram), 'font-size:22px')} {record.maximum:.3g} (log count).",
    ]
    if record.promoted:
        lines.append(f"Makes likelier: {', '.join(_code(_visible(token)) for token in record.promoted)}.")
    return [f'<p style="{INK};margin:2px 0">{line}</p>' for line in lines]


def _sparkline(counts: Sequence[int]) -> str:
    """A histogram in characters, which survive where styles, scripts and images are stripped."""
    heights = np.log1p(counts) / np.log1p(max(*counts, 1)) * (len(BLOCKS) - 1)
    return "".join(BLOCKS[round(height)] if count else "\u00a0" for height, count in zip(heights, counts, strict=True))


def _section(title: str, windows: Sequence[Window], maximum: float) -> list[str]:
    texts = [_coloured(window, maximum) for window in windows] or ["none"]
    return [
        f'<p style="{INK};margin:12px 0 4px"><b>{title}</b></p>',
        *(f'<p style="{INK};{MONO};font-size:13px;overflow-wrap:anywhere;margin:0 0 8px">{text}</p>' for text in texts),
    ]


def _coloured(window: Window, maximum: float) -> str:
    cells = []
    for i, (token, value) in enumerate(zip(window.tokens, window.activations, strict=True)):
        text = f"<b><u>{_visible(token)}</u></b>" if i == window.at else _visible(token)
        cells.append(_mark(text, value, maximum) if value > 0 else text)
    return in_line(cells, "<wbr>")


def _mark(text: str, value: float, maximum: float) -> str:
    share = 0.15 + 0.85 * value / maximum  # the faintest is still seen
    color = "#" + "".join(f"{round(255 + share * (part - 255)):02x}" for part in HUE)
    return f'<mark style="background:{color};color:#1a1a1a" title="{value:.3g}">{text}</mark>'


def _code(text: str, style: str = "font-size:13px") -> str:
    return f'<code style="{INK};{MONO};{style}">{text}</code>'


def _visible(token: str) -> str:
    return escape(visible(token))


def dialogue_pages(
    code: scipy.sparse.csr_array,
    reading: Heldout,
    chosen: Iterable[int],
    tokenizer: PreTrainedTokenizerBase,
    n: int = 400,
    seed: int = 0,
) -> list[LatentRecord]:
    """A page for each chosen latent of a code (tokens, n_latents), from the first n dialogues."""
    records = []
    for j in map(int, chosen):
        values, tokens = side_by_side(code[:, [j]].toarray()[:, 0], reading, n)
        text = {"decode": lambda token: "" if token < 0 else token_text(tokenizer, token), "seed": seed}
        records.append(latent_record(j, values, tokens, **text, n_random=3, n_top=5, context=24))
    return records
