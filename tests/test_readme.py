"""The README's tables are those that the committed results and notebooks give."""

import json

import pytest

from helpers.base.stats import percent
from helpers.base.storage import ROOT
from helpers.notebook.claims import leaderboard, notebook_table, readme

FRAME = """top
<!-- notebooks:begin -->
STALE
<!-- notebooks:end -->
<!-- leaderboard:begin -->
<!-- leaderboard:end -->
middle
<!-- claims:begin -->
<!-- claims:end -->
end"""


def test_readme_is_current():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == readme(text), "run `python -m helpers.notebook.claims --readme` and commit README.md"


def made_up_notebook(folder, *first_cell):
    folder.mkdir()
    cells = [{"cell_type": "code", "source": ["x = 1  # why?"]}, {"cell_type": "markdown", "source": list(first_cell)}]
    cells.append({"cell_type": "markdown", "source": ["What was that?"]})
    (folder / "02_relu_against_topk.ipynb").write_text(json.dumps({"cells": cells}))
    return folder


def test_notebook_table_by_hand(tmp_path):
    notebooks = made_up_notebook(
        tmp_path / "notebooks", "# 02 · ReLU against TopK\n", "\n", "**Which is better?**\n", "Text."
    )
    assert notebook_table(tmp_path, notebooks).splitlines()[2] == (
        "| [02](notebooks/02_relu_against_topk.ipynb) | Which is better? | G1 G2 G3 G36 C45 |  |  |"
    )
    (tmp_path / "embedded-laptop").mkdir()
    (tmp_path / "embedded-laptop" / "02.json").write_text('{"claims": {}, "minutes": 4.25, "peak_memory_gb": 1.5}')
    assert notebook_table(tmp_path, notebooks).endswith("| 4.25 | 1.5 |")


def test_a_notebook_without_question_shows_its_heading(tmp_path):
    table = notebook_table(tmp_path, made_up_notebook(tmp_path / "notebooks", "# 02 · ReLU against TopK\n", "Text."))
    assert "| ReLU against TopK |" in table


def test_only_what_is_between_the_markers_changes(tmp_path):
    text = readme(FRAME, tmp_path, tmp_path)
    assert text.startswith("top\n<!-- notebooks:begin -->\n| notebook |") and text.endswith("<!-- claims:end -->\nend")
    assert "STALE" not in text and "\nmiddle\n" in text and "| G1 |" in text
    assert readme(text, tmp_path, tmp_path) == text


def recorded(folder, *rows, about="3 seeds"):
    """A results folder in which a notebook recorded a leaderboard: (method, measure, mean, low, high)."""
    names = ("method", "measure", "mean", "low", "high")
    board = {"about": about, "rows": [dict(zip(names, row, strict=True)) for row in rows]}
    (folder / "embedded-laptop").mkdir(parents=True, exist_ok=True)
    run = {"claims": {}, "minutes": 1.0, "peak_memory_gb": 1.0, "recorded": {"leaderboard": board} if rows else {}}
    (folder / "embedded-laptop" / "12.json").write_text(json.dumps(run))
    return folder


def test_leaderboard_by_hand(tmp_path):
    assert leaderboard(tmp_path) == leaderboard(recorded(tmp_path)) == "Not run yet."
    rows = [("L1", "planted_10", 0.125, 0.1, 0.15), ("L1", "false_self", 0.0, None, None)]
    text = leaderboard(recorded(tmp_path, *rows, ("mean", "planted_10", None, None, None)))
    assert text.splitlines() == [
        "3 seeds",
        "",
        "| method | planted 10 | false self |",
        "| --- | --- | --- |",
        "| L1 | 12.5 ± 2.5 | 0.0 |",
        "| mean | n/a | n/a |",
    ]
    assert percent(float("nan"), 0.0, 1.0) == "n/a" and percent(-0.5, -0.75, -0.25) == "-50.0 ± 25.0"


def test_the_leaderboard_is_stale_as_soon_as_the_results_change(tmp_path):
    before = readme(FRAME, recorded(tmp_path, ("L1", "planted_10", 0.5, 0.4, 0.6)), tmp_path)
    assert "| L1 | 50.0 ± 10.0 |\n<!-- leaderboard:end -->\nmiddle" in before
    assert readme(before, recorded(tmp_path, ("L1", "planted_10", 0.6, 0.5, 0.7)), tmp_path) != before


BEGIN, END = "<!-- claims:begin -->", "<!-- claims:end -->"
SWAPPED = FRAME.replace(BEGIN, "X").replace(END, BEGIN).replace("X", END)


@pytest.mark.parametrize(
    "text", ["", FRAME.replace(BEGIN, ""), FRAME.replace(END, ""), FRAME + BEGIN, FRAME + END, SWAPPED]
)
def test_missing_doubled_or_swapped_markers_are_refused(text, tmp_path):
    with pytest.raises(ValueError, match="README.md needs the line"):
        readme(text, tmp_path, tmp_path)
