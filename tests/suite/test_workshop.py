"""WORKSHOP.md shows what was measured, and the cell for Colab does nothing twice."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from helpers.suite import workshop as plans
from helpers.suite.workshop import PAGE, TALK, file_sections, filed, filled_page, sections, tables

TEXT = PAGE.read_text(encoding="utf-8")
CELL = Path(plans.__file__).with_name("colab_cell.py")


def took(seconds: int) -> dict:
    return {"papermill": {"start_time": "2026-01-01T00:00:00", "end_time": f"2026-01-01T00:00:{seconds:02}"}}


@pytest.fixture
def executed(tmp_path):
    """An executed copy with an opening of 100 words, and a section of 300 words, 36 s and two exercises."""
    folded = "<details>\n" + "word " * 999 + "\n</details>"
    tasks = 'exercise(\n    "A",\n    minutes=5,\n)\nexercise(\n    "B",\n    minutes=10,\n)'
    cells = [
        v4.new_markdown_cell("word " * 100),
        v4.new_markdown_cell("\n## Which?\n" + "word " * (300 - 2 - len(tasks.split())) + folded),
        v4.new_code_cell(tasks, metadata=took(36)),
    ]
    path = tmp_path / "00_tour.ipynb"
    nbformat.write(v4.new_notebook(cells=cells), path)
    return path


def test_a_section_by_hand(executed):
    opening, which = sections(nbformat.read(executed, as_version=4))
    assert opening == {"title": "opening", "run": 0.0, "read": 0.5, "solve": 0}
    assert which == {"title": "Which?", "run": 0.6, "read": 1.5, "solve": 15}


def test_a_notebook_that_was_not_run_has_no_minutes_to_run(executed):
    notebook = nbformat.read(executed, as_version=4)
    notebook.cells[2].metadata = {}
    assert sections(notebook)[1]["run"] is None


def test_sections_of_notebooks_that_were_not_run_again_stay(executed, tmp_path):
    (tmp_path / "sections.json").write_text(json.dumps({"00": [], "09": [{"title": "kept"}]}))
    file_sections([executed], tmp_path)
    assert filed(tmp_path)["09"] == [{"title": "kept"}] and len(filed(tmp_path)["00"]) == 2


def test_a_day_by_hand(executed, tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "PLANS", {"half-day": {"Half a day": ("00", "01")}})
    (tmp_path / "embedded-laptop").mkdir()
    stored = json.dumps({"minutes": 3.25, "peak_memory_gb": 1.5})
    (tmp_path / "embedded-laptop" / "00.json").write_text(stored)
    file_sections([executed], tmp_path)
    found = tables(tmp_path)
    assert TALK == 10  # 00 takes max(3.25, 2.0) + 15 + 10 minutes, 01 those for questions alone
    assert found["half-day"].splitlines() == [
        "**Half a day**: 0:38 hours without breaks.",
        "",
        "| at | notebook | run | read | solve | GB |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 0:00 | [00 tour](00_tour.ipynb) | 3.2 | 2.0 | 15 | 1.5 |",
        "| 0:28 | [01 superposition and shrinkage](01_superposition_and_shrinkage.ipynb) | – | 0.0 | 0 | – |",
    ]
    assert found["sections"].splitlines()[2:] == [
        "| 00 · opening | 0.0 | 0.5 | 0 |",
        "| 00 · Which? | 0.6 | 1.5 | 15 |",
    ]


def test_the_page_is_current():
    assert filled_page(TEXT) == TEXT, "run `make pages` and commit what it changed"


def test_files_and_sections_that_it_names_exist():
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert links and [link for link in links if not (PAGE.parent / link).exists()] == []
    skipped = re.search(r"\*\*What to skip\.\*\*(.+?)\n\n", TEXT, re.DOTALL)[1]
    named = re.sub(r"\s+", " ", skipped)
    titles = [part["title"] for parts in filed().values() for part in parts]
    unknown = [name for name in re.findall(r"\*(.+?)\*", named) if not any(t.startswith(name) for t in titles)]
    assert unknown == ["Further work"]  # is part of the exercises' section in some


def test_nothing_measured_is_typed():
    prose = re.sub(r"<!-- (\S+):begin -->.*?<!-- \1:end -->", "", TEXT, flags=re.DOTALL)
    assert re.findall(r"\d+(?:\.\d+)? (?:min|GB|MB|hours?)\b", prose) == []


# ---- Colab


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """`colab()` runs the cell beside a stand-in for git and pip; returns the programs and verbs that it called."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    suite, called, installed = tmp_path / "topk-to-crosscoders", [], []

    def fake(command, check):
        called.append(" ".join(map(str, command)).replace(str(suite), "SUITE").replace(sys.executable, "python"))
        if "clone" in command:
            suite.mkdir()
            (suite / "requirements.txt").write_text("torch==0.1\npackaging==0.1\n")
        installed.extend(command[command.index("install") + 2 :] if "install" in command else [])

    def colab():
        called.clear()
        monkeypatch.setattr("helpers.suite.doctor._version", lambda name: "0.1" if f"{name}==0.1" in installed else "0")
        exec(compile(CELL.read_text(encoding="utf-8"), "cell", "exec"), {})
        return list(called)

    monkeypatch.setattr(subprocess, "run", fake)
    return colab


def test_the_cell_clones_and_installs_once_and_leaves_torch_alone(colab, tmp_path, capsys):
    clone = "git clone --quiet  SUITE"
    assert colab() == [clone, "python -m pip install --quiet packaging==0.1"]
    assert colab() == ["git -C SUITE pull --quiet --ff-only"]
    assert sys.path.count(str(tmp_path / "topk-to-crosscoders")) == 1
    assert capsys.readouterr().out.count("Installed.") == 1 and Path.cwd() == tmp_path / "topk-to-crosscoders"


def test_the_page_shows_the_cell_as_it_is_tested():
    assert f"```python\n{CELL.read_text(encoding='utf-8')}```" in TEXT
