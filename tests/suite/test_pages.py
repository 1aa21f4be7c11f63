"""CLAIMS.md, the README's tables and its pictures are those that the committed results and notebooks give."""

import base64
import dataclasses
import io
import json
import re

import nbformat
import pytest
from nbformat import v4
from PIL import Image

from helpers.base.storage import ROOT
from helpers.notebook.claims import load_claims
from helpers.suite import pages
from helpers.suite import run as notebooks
from helpers.suite.pages import (
    HEADLINES,
    PICTURES,
    THUMBNAIL,
    costs,
    fill,
    filled,
    headlines,
    leaderboard,
    ledger,
    subjects,
    thumbnails,
)

MAKE = "run `make pages` and commit what it changed"
FRAME = """top
<!-- results:begin -->
STALE
<!-- results:end -->
middle
<!-- costs:begin -->
<!-- costs:end -->
<!-- subjects:begin -->
<!-- subjects:end -->
<!-- notebooks:begin -->
<!-- notebooks:end -->
end"""
ROW = {
    "verdict": "partly",
    "measured": {"slope": 0.31},
    "interval": {"slope": [-0.1, None]},
    "seeds": 3,
    "why": "a | b",
}


def test_the_pages_are_current():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == filled(readme), MAKE
    assert (ROOT / "CLAIMS.md").read_text(encoding="utf-8") == ledger(), MAKE


def test_the_pictures_are_current():
    stored = {path.stem: path.read_bytes() for path in PICTURES.glob("[0-9]*.png")}
    assert stored == thumbnails(), MAKE


def results(folder, number="02", recorded=None, **claims):
    (folder / "embedded-laptop").mkdir(parents=True, exist_ok=True)
    run = {"claims": claims, "minutes": 4.25, "peak_memory_gb": 1.5, "recorded": recorded or {}}
    (folder / "embedded-laptop" / f"{number}.json").write_text(json.dumps(run))
    return folder


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Writes a notebook of one text and one tagged figure in place of the suite's; returns its results folder."""
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path / "notebooks")
    (tmp_path / "notebooks").mkdir()

    def write(text, tagged=True):
        Image.new("RGB", (840, 420), (213, 94, 0)).save(png := io.BytesIO(), "PNG")
        data = {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": "TopK wins"}
        shown = v4.new_code_cell(outputs=[v4.new_output("display_data", data)])
        shown.metadata["tags"] = ["gallery"] if tagged else []
        cells = [v4.new_code_cell("x = 1  # why?"), v4.new_markdown_cell(text), shown]
        nbformat.write(v4.new_notebook(cells=cells), tmp_path / "notebooks" / "02_relu_against_topk.ipynb")
        return results(tmp_path / "results")

    return write


def test_a_notebook_is_a_thumbnail_a_question_and_what_it_took(suite):
    found = pages.notebooks(suite("# 02 · ReLU against TopK\n\n**Which is better?**\nText.")).splitlines()
    assert found[:2] == ["| | |", "| --- | --- |"] and len(found) == 3
    assert '<img src="data/gallery/02.png"' in found[2] and found[2].endswith(" |  |")
    assert "(notebooks/02_relu_against_topk.ipynb) Which is better? <small>4.25 min · 1.5 GB</small>" in found[2]


def test_a_notebook_without_question_or_figure_shows_its_heading(suite):
    found = pages.notebooks(suite("# 02 · ReLU against TopK\nText.", tagged=False))
    assert ") ReLU against TopK <small>" in found and "img" not in found and thumbnails() == {}


def test_a_thumbnail_is_small_and_keeps_its_colours(suite):
    suite("# Which?")
    picture = Image.open(io.BytesIO(thumbnails()["02"]))
    assert picture.size == (THUMBNAIL, THUMBNAIL // 2) and picture.mode == "P"
    assert picture.convert("RGB").getpixel((9, 9)) == (213, 94, 0)


def test_only_what_is_between_the_markers_changes(suite):
    folder = suite("# Which?")
    text = filled(FRAME, folder)
    assert text.startswith("top\n<!-- results:begin -->\n✔ 0 reproduced") and text.endswith("notebooks:end -->\nend")
    assert "STALE" not in text and "\nmiddle\n" in text and filled(text, folder) == text


def test_headlines_show_the_chosen_claims_in_their_order(tmp_path):
    text = headlines(results(tmp_path, C15=ROW | {"verdict": "not reproduced"}, G1=ROW))
    n = len(load_claims())
    totals = f"✔ 0 reproduced · ≈ 1 partly · ✘ 1 not reproduced · ◇ 0 measured, not judged · ○ {n - 2} not run"
    totals += f", of {n} claims."
    assert text.splitlines()[0] == totals
    assert [line[2] for line in text.splitlines()[4:]] == ["≈", "○", "○", "○", "✘"] and len(HEADLINES) == 5


def test_the_ledger_has_a_row_per_claim_under_its_paper(tmp_path):
    scaling, diffing = ledger(results(tmp_path, G2=ROW)).split("## Crosscoder model diffing")
    found = re.findall(r"^\| ([GC]\d+) \|.*$", scaling + diffing, re.MULTILINE)
    lines = {line.split(" | ")[0].strip("| "): line for line in (scaling + diffing).splitlines()}
    assert found == list(load_claims()) and "\n| C" not in scaling and "\n| G" not in diffing
    assert "| slope 0.31 [-0.1, n/a]<br><small>`slope`: change of log" in lines["G2"]
    assert lines["G2"].endswith("</small> | 3 | ≈ partly: a \\| b |")
    assert "rated by the reader, so no number" in lines["G40"]
    assert lines["C1"].endswith("○ not run |")


def test_the_ledger_sets_what_is_measured_and_not_judged_apart(tmp_path):
    row = ROW | {"verdict": "measured, not judged", "measured": {"l1_nu_error": 0.4}, "interval": {}, "why": ""}
    text = ledger(results(tmp_path, "12", C27=row))
    [line] = [line for line in text.splitlines() if line.startswith("| C27 ")]
    assert "| l1_nu_error 0.4<br><small>rank correlation of each ν" in line
    assert line.endswith("| 3 | ◇ measured, not judged |")
    assert f"◇ 1 measured, not judged · ○ {len(load_claims()) - 1} not run" in text


def test_the_ledger_says_what_was_declared_anew_and_why(tmp_path, monkeypatch):
    anew = dataclasses.replace(load_claims()["C25"], redeclared="the mean | it hid the best")
    monkeypatch.setattr("helpers.notebook.claims.load_claims", lambda: load_claims() | {"C25": anew})
    lines = {line.split(" | ")[0].strip("| "): line for line in ledger(tmp_path).splitlines()}
    assert "<br><small>**Declared anew:** the mean \\| it hid the best</small> |" in lines["C25"]
    assert "anew" not in lines["C24"]


def test_costs_are_those_of_a_fresh_clone(tmp_path):
    assert "not measured" in costs(tmp_path)
    row = {"command": "make test", "minutes": 7.25, "disk_gb": 2.0, "memory_gb": 3.14}
    (tmp_path / "commands.json").write_text(json.dumps({"hardware": "2 cores", "commands": [row]}))
    assert costs(tmp_path).splitlines()[2] == "| `make test` | 7.2 | 2.0 | 3.1 |"


def test_what_the_hubs_models_take_is_as_measured(tmp_path):
    assert "not measured" in subjects(tmp_path)
    row = {"layer": 8, "dtype": "float32", "memory_gb": 1.25, "tokens_a_second": {"32 bits": 1234}}
    found = {"hardware": "A processor", "note": "As inferred.", "subjects": {"owner/model": row}}
    (tmp_path / "full_size.json").write_text(json.dumps(found))
    assert subjects(tmp_path).splitlines()[2:] == [
        "| owner/model | 8 | float32 | 1.2 | – | 1,234 |",
        "",
        "As inferred.",
    ]


def board(folder, *rows):
    names = ("method", "measure", "mean", "low", "high")
    found = [dict(zip(names, row, strict=True)) for row in rows]
    return results(folder, "13", {"leaderboard": {"about": "3 seeds", "rows": found}} if rows else {})


def test_leaderboard_by_hand(tmp_path):
    assert leaderboard(tmp_path) == leaderboard(board(tmp_path)) == "Not run yet."
    rows = [("L1", "planted_10", 0.125, 0.1, 0.15), ("L1", "false_self", 0.0, None, None)]
    assert leaderboard(board(tmp_path, *rows, ("mean", "planted_10", None, None, None))).splitlines() == [
        "3 seeds",
        "",
        "| method | planted 10 | false self |",
        "| --- | --- | --- |",
        "| L1 | 12.5 ± 2.5 | 0.0 |",
        "| mean | n/a | n/a |",
    ]


BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
SWAPPED = FRAME.replace(BEGIN, "X").replace(END, BEGIN).replace("X", END)


@pytest.mark.parametrize(
    "text", ["", FRAME.replace(BEGIN, ""), FRAME.replace(END, ""), FRAME + BEGIN, FRAME + END, SWAPPED]
)
def test_missing_doubled_or_swapped_markers_are_refused(text):
    with pytest.raises(ValueError, match="README.md needs the line"):
        fill(text, "results", "new")
