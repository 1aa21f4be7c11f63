import json
from pathlib import Path

import pytest

from helpers.suite.execution import Outcome
from helpers.suite.report import Report, describe, name_of, recorded_minutes, seconds_left, summary

A, B, C = (Path(f"notebooks/0{i}_x.ipynb") for i in range(3))


def test_time_left_uses_the_recorded_minutes_at_the_pace_of_this_machine():
    recorded = {A: 1.0, B: 2.0, C: 3.0}
    assert seconds_left([A, B, C], 0, [], recorded) == 360
    assert seconds_left([A, B, C], 45, [], recorded) == 315
    assert seconds_left([A, B, C], 90, [], recorded) == 300  # the first takes longer than expected
    assert seconds_left([B, C], 0, [Outcome(A, 2.0)], recorded) == 600  # twice as slow here
    assert seconds_left([B, C], 0, [Outcome(A, 9.0, "E: x")], recorded) == 300  # a failure says nothing


def test_time_left_without_a_record_is_the_mean_of_what_ran():
    recorded = {A: None, B: None, C: 3.0}
    assert seconds_left([A, B, C], 0, [], recorded) is None
    assert seconds_left([B, C], 0, [Outcome(A, 2.0)], recorded) == 300
    assert seconds_left([], 0, [Outcome(A, 2.0)], recorded) is None


def test_recorded_minutes_are_those_of_the_same_subject_and_scale(tmp_path):
    (tmp_path / "embedded-laptop").mkdir()
    (tmp_path / "embedded-laptop" / "00.json").write_text(json.dumps({"minutes": 4.5}))
    laptop, smoke = ({"subject": "embedded", "scale": scale} for scale in ("laptop", "smoke"))
    assert recorded_minutes(A, laptop, tmp_path) == 4.5
    assert recorded_minutes(A, smoke, tmp_path) is None
    assert recorded_minutes(Path("notebooks/solutions/00_x.ipynb"), laptop, tmp_path) is None


@pytest.fixture
def report(monkeypatch, capsys):
    monkeypatch.setattr("helpers.suite.report.recorded_minutes", lambda path, parameters: 1.0)
    report = Report([A, B], {"subject": "embedded", "scale": "smoke"})
    report.begin(A)
    return report


def test_a_file_gets_a_line_at_the_start_and_the_end_of_each_notebook(report, capsys):
    report.cell(1, 7)
    report.end(Outcome(A, 1.0))
    report.begin(B)
    report.end(Outcome(B, 1.0, "E: x", 3, "f()"))
    assert capsys.readouterr().out.splitlines() == [
        "2 notebooks · subject embedded · scale smoke · about 2 min 00 s left",
        "[1/2] 00_x · starts · 0 s · about 2 min 00 s left",
        "[1/2] 00_x · done · 0 s · about 1 min 00 s left",
        "[2/2] 01_x · starts · 0 s · about 1 min 00 s left",
        "[2/2] 01_x · failed in cell 3 · 0 s",
    ]


def test_a_long_notebook_shows_its_cell_now_and_then(report, capsys):
    report.printed -= 60
    report.cell(5, 7)
    report.cell(6, 7)
    assert capsys.readouterr().out.count("cell ") == 1


def test_a_terminal_line_is_rewritten_at_every_cell(report, capsys):
    report.terminal = True
    report.cell(5, 7)
    report.end(Outcome(A, 1.0))
    printed = capsys.readouterr().out.split("\r\x1b[K")
    assert [line.partition(" · about")[0] for line in printed[1:]] == [
        "[1/2] 00_x · cell 5 of 7 · 0 s",
        "[1/2] 00_x · done · 0 s",
    ]
    assert printed[-1].endswith("\n") and not printed[-2].endswith("\n")


def test_the_summary_names_notebook_cell_and_error():
    text = summary([Outcome(A, 0.5), Outcome(B, 1.0, "ValueError: k is too large", 12, "sae = train()")], [A, B, C])
    assert text.splitlines()[:2] == [
        "1 of 3 notebooks ran to the end, in 1 min 30 s.",
        "✘ 01_x, cell 12 `sae = train()`: ValueError: k is too large",
    ]
    assert describe(Outcome(A, 0.1, "RuntimeError: no kernel")) == "✘ 00_x: RuntimeError: no kernel"


def test_a_solution_has_a_name_of_its_own():
    assert [name_of(A), name_of(Path("notebooks/solutions/00_x.ipynb"))] == ["00_x", "solutions/00_x"]
