"""The tables of notebooks/WORKSHOP.md: what each section of a notebook takes, and two plans made of that.

A section begins at a heading `##`. Storing a run files three numbers of minutes for it in data/results/sections.json:

    run     of its cells in the run that was stored
    read    of its text and code, at `WORDS` words a minute
    solve   of its exercises, as their headers say

Someone reads while the cells run, so a notebook takes the longer of the two, its exercises, and `TALK` minutes.
"""

import json
import re
from collections.abc import Iterable
from datetime import datetime
from itertools import accumulate
from pathlib import Path

import nbformat

from helpers.base.storage import RESULTS, write_atomic
from helpers.notebook.claims import number
from helpers.suite.pages import fill_all, markdown_table
from helpers.suite.run import NOTEBOOKS, find, number_of
from helpers.suite.store import own_cells

PAGE = NOTEBOOKS / "WORKSHOP.md"
WORDS = 200  # a minute
TALK = 10  # minutes for questions, a notebook
PLANS = {
    "half-day": {"Half a day": ("00", "01", "02", "09")},
    "two-days": {"First day": ("00", "01", "02", "03", "05", "06"), "Second day": ("07", "09", "10", "11", "12", "13")},
}
HEADER = ["run", "read", "solve"]


def sections(notebook: nbformat.NotebookNode) -> list[dict]:
    """A notebook's sections in their order: title, and minutes to run (None if it holds no run), read and solve."""
    found = [{"title": "opening", "cells": []}]
    for cell in own_cells(notebook.cells):
        if cell.cell_type == "markdown" and (heading := re.match(r"\s*## +(.+)", cell.source)):
            found.append({"title": heading[1].strip(), "cells": []})
        found[-1]["cells"].append(cell)
    return [{"title": part["title"], **_minutes(part["cells"])} for part in found]


def _minutes(cells: list[nbformat.NotebookNode]) -> dict[str, float | None]:
    seconds = [_seconds(cell.metadata.get("papermill", {})) for cell in cells if cell.cell_type == "code"]
    words = sum(len(re.sub(r"<details>.*?</details>", "", cell.source, flags=re.DOTALL).split()) for cell in cells)
    solve = sum(int(m) for cell in cells for m in re.findall(r"^ +minutes=(\d+),$", cell.source, re.MULTILINE))
    ran = [value for value in seconds if value is not None]
    return {
        "run": round(sum(ran) / 60, 2) if ran or not seconds else None,
        "read": round(words / WORDS, 1),
        "solve": solve,
    }


def _seconds(papermill: dict) -> float | None:
    ends = [papermill.get(key) for key in ("start_time", "end_time")]
    begin, end = (datetime.fromisoformat(text) if text else None for text in ends)
    return (end - begin).total_seconds() if begin and end else None


def file_sections(copies: Iterable[Path], results: Path = RESULTS) -> None:
    """Put the sections of these executed notebooks into `results`/sections.json; those of others stay."""
    found = filed(results) | {number_of(copy): sections(nbformat.read(copy, as_version=4)) for copy in copies}
    text = json.dumps(found, indent=1, ensure_ascii=False, sort_keys=True)
    write_atomic(Path(results) / "sections.json", text + "\n")


def filed(results: Path = RESULTS) -> dict[str, list[dict]]:
    """Number of a notebook -> its sections, as the last stored run filed them."""
    file = Path(results) / "sections.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def write_page() -> None:
    """Make the tables of WORKSHOP.md anew from what the stored runs filed."""
    write_atomic(PAGE, filled_page(PAGE.read_text(encoding="utf-8")))


def filled_page(text: str) -> str:
    """WORKSHOP.md's text with what is between its markers made anew."""
    return fill_all(text, tables(), PAGE.name)


def tables(results: Path = RESULTS) -> dict[str, str]:
    """What stands between the markers of WORKSHOP.md: name -> Markdown."""
    plans = {name: "\n\n".join(_day(*day, results) for day in days.items()) for name, days in PLANS.items()}
    cell = Path(__file__).with_name("colab_cell.py").read_text(encoding="utf-8")
    by_section = _by_section(PLANS["half-day"]["Half a day"], results)
    return plans | {"sections": by_section, "colab": f"```python\n{cell}```"}


def _day(title: str, numbers: tuple[str, ...], results: Path) -> str:
    """One day: when each notebook begins, and what it takes."""
    rows = [_whole(name, results) for name in numbers]
    *begins, end = [0, *accumulate(round(row["allot"]) for row in rows)]
    facts = zip(begins, numbers, rows, strict=True)
    cells = [[_clock(at), _link(name), *_shown(row), row["gb"]] for at, name, row in facts]
    table = markdown_table(["at", "notebook", *HEADER, "GB"], cells)
    return f"**{title}**: {_clock(end)} hours without breaks.\n\n{table}"


def _whole(name: str, results: Path) -> dict:
    """A notebook's minutes and memory: run and GB as its stored run at laptop scale says, the rest by its sections."""
    file = Path(results) / "embedded-laptop" / f"{name}.json"
    stored = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    parts, run = filed(results).get(name, []), stored.get("minutes")
    read, solve = (sum(part[key] for part in parts) for key in ("read", "solve"))
    gb = number(stored["peak_memory_gb"]) if stored else "–"
    return {"run": run, "read": read, "solve": solve, "gb": gb, "allot": max(run or 0, read) + solve + TALK}


def _by_section(numbers: tuple[str, ...], results: Path) -> str:
    rows = [[f"{name} · {part['title']}", *_shown(part)] for name in numbers for part in filed(results).get(name, [])]
    return markdown_table(["section", *HEADER], rows)


def _link(name: str) -> str:
    [path] = find(name)
    return f"[{path.stem.replace('_', ' ')}]({path.name})"


def _shown(minutes: dict) -> list[str]:
    run, read = ("–" if minutes[key] is None else f"{minutes[key]:.1f}" for key in ("run", "read"))
    return [run, read, f"{minutes['solve']:.0f}"]


def _clock(minutes: int) -> str:
    return f"{minutes // 60}:{minutes % 60:02}"
