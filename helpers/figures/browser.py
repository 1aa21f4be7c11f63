"""The latent browser: what one latent answers to, as coloured text. Records in, HTML out.

`page` draws one latent as HTML that needs neither style sheet nor script: code-hosting sites drop both, so colours are
inline, and a page stays readable when they are gone. `LatentBrowser` holds many. Its one output is the first pages as
they are, and all pages packed beside a script (`browser.js`), which puts a list with search, sort and scatter in their
place wherever scripts run: in a live notebook, in nbconvert's HTML and in the file of `export_html`, offline and
without a kernel. A page is drawn here only, so it looks the same everywhere.
"""

import base64
import gzip
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path

import numpy as np
import scipy.sparse
from IPython.display import display
from transformers import PreTrainedTokenizerBase

from helpers.base.storage import write_atomic
from helpers.dictionaries.pair_collection import Heldout
from helpers.diffing.reading import side_by_side
from helpers.figures.records import Direction, LatentRecord, Window, checked_latents, latent_record
from helpers.figures.tokens import in_line, token_text, visible
from helpers.text.documents import TURNS

HUE = (230, 159, 0)  # orange of Okabe and Ito: black text on it stays readable
NO_MATHS = "mathjax_ignore tex2jax_ignore"  # else two dollar signs of a text become a formula
BLOCKS = "▁▂▃▄▅▆▇█"  # of a histogram
INK = "color:#1a1a1a;background:#ffffff"  # both, everywhere: a dark theme brings its own
MONO = "font-family:Menlo,Consolas,'DejaVu Sans Mono',monospace"
CARD = (
    f"{INK};border:1px solid #cccccc;border-radius:6px;padding:8px 16px 12px;max-width:900px;"
    "font-family:Arial,Helvetica,sans-serif;font-size:14px;line-height:1.45"
)
QUARTERS = ("weakest quarter", "second quarter", "third quarter", "strongest quarter")
SCRIPT = Path(__file__).with_name("browser.js").read_text(encoding="utf-8")
PER_PACK = 64  # pages that are unpacked at once
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src '{hash}'">
</head><body><main><h1 style="font:bold 20px Arial,Helvetica,sans-serif">{title}</h1>
"""  # nothing is fetched, and no script runs but ours


def page(record: LatentRecord) -> str:
    """One latent as HTML that needs neither style sheet nor script."""
    parts = [_heading(2, f"Latent {record.latent}", "font-size:17px;margin:4px 0"), *_statistics(record)]
    parts += _directions(record.directions)
    parts += section("Random positive activations", record.random, record.maximum)
    parts += section("Top activations", record.top, record.maximum)
    if any(record.quarters):
        quarters = zip(QUARTERS, record.quarters, strict=True)
        inner = [part for name, windows in quarters for part in section(f"From the {name}", windows, record.maximum)]
        summary = f'<summary style="{INK};margin:12px 0 4px"><b>By quarter of its activations</b></summary>'
        parts.append(f"<details>{summary}{''.join(inner)}</details>")
    return card(parts)


def card(parts: Iterable[str]) -> str:
    """Pieces of HTML in a frame, as a page is."""
    return f'<div class="{NO_MATHS}" style="{CARD}">{"".join(parts)}</div>'


class LatentBrowser:
    """Pages of several latents with a list to search and sort; without scripts, the first `n_static` pages.

    scatter   names of two facts that are numbers, x and y, to choose latents from a scatter of them; "density" and
              "maximum" are known of each

    Raises ValueError for no records, and for a scatter of what no record knows as a number.
    """

    def __init__(self, records: Iterable[LatentRecord], n_static: int = 3, scatter: Sequence[str] = ()):
        self.records, self.n_static, self.scatter = list(records), n_static, list(scatter)
        if not self.records:
            raise ValueError("The latent browser got no records: pass at least one latent_record(...).")
        for name in self.scatter:
            if not any(isinstance(_numbers(record).get(name), float) for record in self.records):
                raise ValueError(f"No record has a number {name!r} among its facts: it cannot be an axis.")

    def __repr__(self) -> str:
        return f"LatentBrowser of {len(self.records):,} latents"

    def show(self) -> None:
        """Display the browser."""
        display(self)

    def export_html(self, path: str | Path) -> Path:
        """Write the browser as one file that opens offline."""
        digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
        head = HEAD.format(title=self, hash=f"sha256-{digest}")
        write_atomic(Path(path), f"{head}{self._repr_html_()}\n</main></body></html>\n")
        return Path(path)

    def static(self) -> str:
        """The first pages as plain HTML, all but the first folded."""
        first, *rest = self.records[: self.n_static]
        folded = [f"<details><summary>Latent {record.latent}</summary>{page(record)}</details>" for record in rest]
        note = (
            f"{1 + len(rest)} of {len(self.records)} latents. Where scripts run, as in JupyterLab, all can be browsed."
        )
        return "".join([page(first), *folded, f"<p><small>{note}</small></p>"])

    def _repr_html_(self) -> str:
        pages = [page(record) for record in self.records]
        packs = [pages[first : first + PER_PACK] for first in range(0, len(pages), PER_PACK)]
        index = {"scatter": self.scatter, "per_pack": PER_PACK, "latents": [_entry(record) for record in self.records]}
        packed = [f'<script type="text/plain">{_packed(data)}</script>' for data in (index, *packs)]
        live = "".join([*packed[:2], f"<script>{SCRIPT}</script>", *packed[2:]])  # it starts before the rest is there
        return f'<div class="latent-browser {NO_MATHS}"><div>{self.static()}</div>{live}</div>'


def _packed(data: object) -> str:
    """JSON, zipped, in characters that mean nothing in HTML."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def _entry(record: LatentRecord) -> dict:
    """What list, search and scatter know of a latent; `words` are the tokens on which it is active or that it moves."""
    shown = (*record.random, *record.top, *(window for quarter in record.quarters for window in quarter))
    words = [
        token for window in shown for token, value in zip(window.tokens, window.activations, strict=True) if value > 0
    ]
    words += [token for row in record.directions for token in (*row.promoted, *row.suppressed)]
    words += [value for value in record.facts.values() if isinstance(value, str)]
    return {
        "numbers": _numbers(record),
        "words": " ".join(dict.fromkeys(map(visible, words))),
        "at": visible(record.top[0].tokens[record.top[0].at]) if record.top else "",
    }


def _numbers(record: LatentRecord) -> dict[str, float | str | None]:
    """What latents can be sorted by; None where there is no value, as JSON has no NaN."""
    known = {"density": record.density, "maximum": record.maximum, **record.facts}
    return {"latent": record.latent} | {name: _sortable(value) for name, value in known.items()}


def _sortable(value: object) -> float | str | None:
    if isinstance(value, int | float | np.number):
        return float(value) if math.isfinite(value) else None
    return value if isinstance(value, str) else None


def _statistics(record: LatentRecord) -> list[str]:
    lines = [
        f"Active on {record.density:.3%} of {record.n_tokens:,} tokens; when active: mean {record.mean:.3g}, "
        f"maximum {record.maximum:.3g}.",
        f"Activations 0 {_code(_sparkline(record.histogram), 'font-size:18px')} {record.maximum:.3g} (log count).",
    ]
    if crowd := record.crowd:
        bars = _code(_sparkline(crowd.histogram, crowd.bin), "font-size:18px")
        lines.append(f"Denser than {crowd.denser_than:.0%} of all latents: {crowd.lowest:.1g} {bars} 1 (log scales).")
    if record.facts:
        lines.append(
            " · ".join(f"{_plain(name)}: <b>{_plain(value)}</b>" for name, value in record.facts.items()) + "."
        )
    return [f'<p style="{INK};margin:2px 0">{line}</p>' for line in lines]


def _directions(directions: Sequence[Direction]) -> list[str]:
    """A table with a column per model and a row for what is known."""
    rows = {
        "Decoder norm": [f"{row.norm:.3g}" if row.norm is not None else "" for row in directions],
        "Makes likelier": [_listed(row.promoted) for row in directions],
        "Makes less likely": [_listed(row.suppressed) for row in directions],
        "Closest latents": [
            ", ".join(f'<span data-latent="{j}">{j}</span> ({cosine:.2f})' for j, cosine in row.neighbours)
            for row in directions
        ],
    }
    cell = f"{INK};padding:2px 14px 2px 0;text-align:left;vertical-align:top"
    head = "".join(f'<th scope="col" style="{cell}">{_plain(row.model)}</th>' for row in directions)
    body = [
        f'<tr style="{INK}"><th scope="row" style="{cell};white-space:nowrap;font-weight:normal">{name}</th>'
        + "".join(f'<td style="{cell}">{value}</td>' for value in values)
        + "</tr>"
        for name, values in rows.items()
        if any(values)
    ]
    if any(row.model for row in directions):
        body.insert(0, f'<tr style="{INK}"><td style="{cell}"></td>{head}</tr>')
    return [f'<table style="{INK};border-collapse:collapse;margin:4px 0">{"".join(body)}</table>'] if body else []


def _listed(tokens: Sequence[str]) -> str:
    return ", ".join(_code(_visible(token)) for token in tokens)


def _plain(value: object) -> str:
    return escape(f"{value:.3g}" if isinstance(value, float | np.floating) else str(value))


def _sparkline(counts: Sequence[int], own: int | None = None) -> str:
    """A histogram in characters, which survive where styles, scripts and images are stripped; bin `own` is marked."""
    heights = np.log1p(counts) / np.log1p(max(*counts, 1)) * (len(BLOCKS) - 1)
    bars = [BLOCKS[round(height)] if count else "\u00a0" for height, count in zip(heights, counts, strict=True)]
    if own is not None:
        bars[own] = f'<mark style="background:#ffffff;color:#b35900" title="this latent"><u>{bars[own]}</u></mark>'
    return "".join(bars)


def section(title: str, windows: Sequence[Window], maximum: float) -> list[str]:
    """A heading and windows below it, coloured up to `maximum`."""
    texts = [coloured(window, maximum) for window in windows] or ["none"]
    return [
        _heading(3, title, "margin:12px 0 4px"),
        *(f'<p style="{INK};{MONO};font-size:13px;overflow-wrap:anywhere;margin:0 0 8px">{text}</p>' for text in texts),
    ]


def _heading(level: int, text: str, style: str) -> str:
    """A paragraph to the eye, as notebooks style headings their own way, and a heading to a screen reader."""
    return f'<p role="heading" aria-level="{level}" style="{INK};{style}"><b>{text}</b></p>'


def coloured(window: Window, maximum: float) -> str:
    """The tokens of a window, the active ones marked; their activation and effect are in the tooltip."""
    cells = []
    effects = window.effects or [None] * len(window.tokens)
    for i, (token, value, effect) in enumerate(zip(window.tokens, window.activations, effects, strict=True)):
        text = f"<b><u>{_visible(token)}</u></b>" if i == window.at else _visible(token)
        cells.append(_mark(text, value, maximum, effect))
    return "<wbr>".join(cells) + _largest_effect(window)


def _mark(text: str, value: float, maximum: float, effect: float | None) -> str:
    """A token, coloured where the latent is active; the tooltip has what is known of it."""
    title = f"{value:.3g}" + ("" if effect is None else f", loss without it {effect:+.3g} nats")
    if value <= 0:
        return f'<span title="{title}">{text}</span>' if effect else text
    share = 0.15 + 0.85 * value / maximum  # the faintest is still seen
    color = "#" + "".join(f"{round(255 + share * (part - 255)):02x}" for part in HUE)
    return f'<mark style="background:{color};color:#1a1a1a" title="{title}">{text}</mark>'


def _largest_effect(window: Window) -> str:
    if not window.effects:
        return ""
    i = int(np.abs(window.effects).argmax())
    return f" <small>(largest effect: {window.effects[i]:+.3g} nats at {_visible(window.tokens[i])})</small>"


def _code(text: str, style: str = "font-size:13px") -> str:
    return f'<code style="{INK};{MONO};{style}">{text}</code>'


@lru_cache(1 << 16)
def _visible(token: str) -> str:
    return in_line([escape(visible(token))], "")


def dialogue_pages(
    code: scipy.sparse.csr_array,
    reading: Heldout,
    chosen: Iterable[int],
    tokenizer: PreTrainedTokenizerBase,
    n: int = 400,
    seed: int = 0,
) -> list[LatentRecord]:
    """A page for each chosen latent of a code (tokens, n_latents), from the first n dialogues."""
    chosen, records = checked_latents(chosen, code.shape[1]), []
    text = {"decode": lambda token: "" if token < 0 else token_text(tokenizer, token), "seed": seed}
    known = {"n_tokens": int((reading.dialogue < n).sum()), "densities": (code[reading.dialogue < n] > 0).mean(0)}
    for j in chosen:
        values, tokens = side_by_side(code[:, [j]].toarray()[:, 0], reading, n)
        records.append(latent_record(j, values, tokens, **text, **known, n_random=2, n_top=4, n_quarter=1, context=24))
    return records


def dialogue_page(tokens: np.ndarray, values: np.ndarray, tokenizer: PreTrainedTokenizerBase, title: str) -> str:
    """One dialogue as HTML, a line for each turn, its tokens coloured by `values` (tokens,) where positive."""
    texts = np.array([token_text(tokenizer, token) for token in tokens], dtype=object)
    turns = [turn for turn in np.split(np.arange(len(texts)), np.flatnonzero(texts == TURNS[0])) if len(turn)]
    lines = [Window(tuple(texts[turn]), tuple(values[turn].tolist()), int(values[turn].argmax())) for turn in turns]
    return card(section(title, lines, values.max(initial=0)))
