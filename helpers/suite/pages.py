"""The pages made of the stored runs: CLAIMS.md, and the tables and pictures of README.md.

    CLAIMS.md   every claim with the paper's value, ours and the verdict; and the leaderboard of methods
    README.md   between `<!-- name:begin -->` and `<!-- name:end -->`: the ledger's totals with the results that matter
                most (`results`), the notebooks with a thumbnail each (`notebooks`), what the commands took (`costs`),
                and what the hub's models take (`subjects`)

A notebook marks the figure that carries its message by the cell tag `gallery`.
"""

import base64
import io
import json
import re
from pathlib import Path

import nbformat
import pandas as pd
import plotly.graph_objects as go
from PIL import Image

from helpers.base.stats import percent_table
from helpers.base.storage import DATA, RESULTS, ROOT, write_atomic
from helpers.figures import plots
from helpers.notebook.claims import MARKS, counts, number, numbers, table
from helpers.suite.run import find, number_of
from helpers.suite.store import in_palette, pngs

PICTURES = DATA / "gallery"
THUMBNAIL = 400  # pixels wide
PAPERS = {"G": "Scaling and evaluating sparse autoencoders", "C": "Crosscoder model diffing"}
HEADLINES = ("G1", "G4", "G18", "C28", "C15")  # what the README shows, misses included
INTRODUCTION = """# What came out

Each claim of the two papers, and of the work they build on, is declared in [data/claims.csv](data/claims.csv) before it
is run: the claim in our words, the paper's value, what is measured here, and the expectation as code. A notebook passes
its numbers to `run.check`, which judges them by that expectation and files the verdict with its seeds and interval.

A miss stays in the table, with one sentence on why. A question, or a claim whose direction the paper leaves open, is
measured and not judged. Brackets hold 95 % intervals over seeds. The numbers come from the
stored run at laptop scale on the embedded subjects. Where a claim needs more training than a laptop has minutes for,
that run judges a stored reference run. Where an expectation turned out to miss its claim, it was *declared
anew* before the next run; what was changed and why stands beside it. An empty cell in the paper's column means that the
paper states no number, or none that we could confirm; a section marked *unconfirmed* means that we know the claim only
second-hand.

This page is made by `make pages`; a test compares it with the stored results."""
LEGEND = """How much of what was planted does each method find? Each ranks its candidates, latents or directions,
by a score of its own; the first 10, 50 and 200 are looked at. In per cent, with half the width of the 95 % interval
over seeds, which is Student's and may reach beyond 0 and 100:

- *planted*: of the directions planted in chat alone, those that a candidate points along;
- *prompt*, *decision*: of the behaviours that chat alone has learnt, those that a candidate tells at the end of the
  prompt or at the last token before the answer, chosen on one half of the dialogues and scored on the other;
- *kl*: of the gap between base and chat, what writing the candidates into base closes that add most, one rule for all;
  *kl-own*: the same for the method's own first. What is fitted to the difference itself, the *mean difference* with its
  principal components, says what can be closed;
- *false self*, *false longer*: on pairs where nothing is chat's (base against itself, and against itself trained on),
  the candidates that the method calls chat-only all the same. Lower is better; a method without a cut calls none.

Directions fitted to the labels say what can be found, and random ones what luck gives."""


def write_pages() -> None:
    """Make all of it anew from the stored notebooks and results."""
    for name, png in {**thumbnails(), "question": question()}.items():
        write_atomic(PICTURES / f"{name}.png", png)
    readme = ROOT / "README.md"
    write_atomic(readme, filled(readme.read_text(encoding="utf-8")))
    write_atomic(ROOT / "CLAIMS.md", ledger())


def filled(readme: str, results: Path = RESULTS) -> str:
    """The README's text with what is between its markers made anew."""
    parts = {"results": headlines(results), "notebooks": notebooks(results), "costs": costs(results)}
    return fill_all(readme, parts | {"subjects": subjects(results)})


def fill_all(text: str, parts: dict[str, str], page: str = "README.md") -> str:
    """`text` with each body of `parts` between the markers of its name."""
    for name, body in parts.items():
        text = fill(text, name, body, page)
    return text


def fill(text: str, name: str, body: str, page: str = "README.md") -> str:
    """`text` of `page` with `body` between its `name` markers. Raises ValueError where the markers are missing."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{page} needs the line {begin} once and after it the line {end} once")
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{body}\n{end}", text, flags=re.DOTALL)


# ---- claims


def ledger(results: Path = RESULTS) -> str:
    """CLAIMS.md: the totals, a table per paper, and the leaderboard."""
    rows = table(results)
    parts = [INTRODUCTION, f"{counts(rows)}, of {len(rows)} claims."]
    for letter, paper in PAPERS.items():
        cells = [_claim_cells(row) for row in rows if row["claim"].id.startswith(letter)]
        header = ["id", "claim", "paper", "measured here", "seeds", "verdict"]
        parts += [f"## {paper}", markdown_table(header, cells)]
    return "\n\n".join([*parts, "## Recovery of planted differences", LEGEND, leaderboard(results)]) + "\n"


def headlines(results: Path = RESULTS) -> str:
    """The totals of the ledger, and a line for each of the results that matter most."""
    rows = table(results)
    chosen = [row for row in rows if row["claim"].id in HEADLINES]
    chosen.sort(key=lambda row: HEADLINES.index(row["claim"].id))
    cells = [[MARKS[row["verdict"]], row["claim"].claim, row["claim"].paper, _measured(row)] for row in chosen]
    return f"{counts(rows)}, of {len(rows)} claims.\n\n" + markdown_table(["", "claim", "paper", "here"], cells)


def leaderboard(results: Path = RESULTS) -> str:
    """The table of recovered planted differences that a notebook recorded (`leaderboard.summary`), per cent."""
    for path in sorted((Path(results) / "embedded-laptop").glob("[0-9][0-9].json")):
        if board := json.loads(path.read_text(encoding="utf-8")).get("recorded", {}).get("leaderboard"):
            cells = percent_table(pd.DataFrame(board["rows"]), "method", "measure")
            header = ["method", *(name.replace("_", " ") for name in cells)]
            return f"{board['about']}\n\n{markdown_table(header, cells.reset_index().to_numpy().tolist())}"
    return "Not run yet."


def _claim_cells(row: dict) -> list[str]:
    claim = row["claim"]
    where = ", ".join(filter(None, (claim.source, claim.section)))
    judged = f"{MARKS[row['verdict']]} {row['verdict']}" + (f": {row['why']}" if row["why"] else "")
    return [claim.id, f"{claim.claim} ({where})", claim.paper, _measured(row), str(row["seeds"] or ""), judged]


def _measured(row: dict) -> str:
    """Ours, and in small print what the names stand for, and what was declared anew."""
    claim = row["claim"]
    anew = f"<small>**Declared anew:** {claim.redeclared}</small>" if claim.redeclared else ""
    return "<br>".join(filter(None, (numbers(row), f"<small>{claim.measured}</small>", anew)))


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown of cells that hold text."""
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- notebooks and pictures


def notebooks(results: Path = RESULTS) -> str:
    """The notebooks in two columns: a thumbnail, the question, and what the stored run took."""
    cards = [_card(path, results) for path in find()]
    pairs = [cards[i : i + 2] for i in range(0, len(cards), 2)]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {' | '.join((*pair, '')[:2])} |" for pair in pairs)])


def _card(path: Path, results: Path) -> str:
    file, link = Path(results) / "embedded-laptop" / f"{number_of(path)}.json", f"notebooks/{path.name}"
    run = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    cost = [f"{number(run[key])} {unit}" for key, unit in (("minutes", "min"), ("peak_memory_gb", "GB")) if key in run]
    picture = f'<a href="{link}"><img src="data/gallery/{number_of(path)}.png" width="{THUMBNAIL}" alt=""></a><br>'
    shown = picture if _picture(path) else ""
    return f"{shown}[**{number_of(path)}**]({link}) {question_of(path)} <small>{' · '.join(cost)}</small>"


def costs(results: Path = RESULTS) -> str:
    """What the README's commands took in a fresh clone, as `tests/benchmarks/fresh_clone.py` measured it."""
    file = Path(results) / "commands.json"
    found = (
        json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"hardware": "not measured", "commands": []}
    )
    keys = ("minutes", "disk_gb", "memory_gb")
    cells = [[f"`{row['command']}`", *(f"{row[key]:.1f}" for key in keys)] for row in found["commands"]]
    return markdown_table([f"on {found['hardware']}", "minutes", "GB on disk after it", "GB of memory"], cells)


def subjects(results: Path = RESULTS) -> str:
    """What the hub's models take at full size, as `tests/benchmarks/full_size.py` measured it."""
    file = Path(results) / "full_size.json"
    found = (
        json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"hardware": "not measured", "subjects": {}}
    )
    speeds = ("16 bits", "32 bits")  # of the processor's products
    cells = [
        [name, str(row["layer"]), row["dtype"], f"{row['memory_gb']:.1f}"]
        + [f"{row['tokens_a_second'][bits]:,}" if bits in row["tokens_a_second"] else "–" for bits in speeds]
        for name, row in found["subjects"].items()
    ]
    header = [f"one core of {found['hardware']}", "harvested after block", "dtype", "GB of memory, to load"]
    table = markdown_table([*header, *(f"tokens a second, products in {bits}" for bits in speeds)], cells)
    return "\n\n".join(filter(None, (table, found.get("note"))))


def question_of(path: Path) -> str:
    """The first question of a notebook's first text cell, or else its heading, without the number."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    lines = [re.sub(r"^[#*_> ]*(\d\d · )?|[*_ ]*$", "", line) for line in text.strip().splitlines()]
    return next((line for line in lines if line.endswith("?")), lines[0])


def thumbnails() -> dict[str, bytes]:
    """Number -> a small PNG of the notebook's figure that is tagged `gallery`; notebooks without one are left out."""
    return {number_of(path): _small(png) for path in find() if (png := _picture(path))}


def _picture(path: Path) -> bytes | None:
    tagged = [cell for cell in nbformat.read(path, as_version=4).cells if "gallery" in cell.metadata.get("tags", [])]
    data = [output.get("data", {}) for cell in tagged for output in cell.outputs]
    return next((base64.b64decode(each["image/png"]) for each in data if "image/png" in each), None)


def _small(png: bytes) -> bytes:
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    picture.save(file := io.BytesIO(), "PNG")
    return in_palette(file.getvalue())


def question(results: Path = RESULTS) -> bytes:
    """The README's one figure: notebook 02's result without its vocabulary."""
    sweep = pd.DataFrame(
        json.loads((results / "embedded-laptop" / "02.json").read_text(encoding="utf-8"))["recorded"]["sweep"]
    )
    return in_palette(pngs([json.loads(plain_frontier(sweep).to_json())])[0])


def plain_frontier(sweep: pd.DataFrame) -> go.Figure:
    """Error against size of the code, for the two ways to be sparse, each at its best learning rate."""
    sweep = sweep[sweep.method.isin(["ReLU", "TopK"]) & (sweep.n_latents == sweep.n_latents.max())]
    best = sweep.loc[sweep.groupby(["method", "sparsity", "seed"]).nmse.idxmin()]
    labels = {"l0": "numbers used for each word piece", "nmse": "error (1 = always the average)"}
    title = "Two ways to describe what a language model thinks with few numbers: one is more exact at every size"
    note = f"lower is better · laptop scale · docs-gpt2 · n = {best.n_latents.max():,} · seeds {sorted(set(best.seed))}"
    figure = plots.frontier(best, panel=None, title=title, subtitle=note, labels=labels)
    words = {"ReLU": "the older way: a price on each number (ReLU)", "TopK": "the newer way: keep the largest (TopK)"}
    return figure.for_each_trace(lambda trace: trace.update(name=words[trace.name]))
