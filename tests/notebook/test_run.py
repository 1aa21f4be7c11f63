"""The run of a notebook: what it refuses, what it judges, and the file it leaves."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.base.clock import SECONDS
from helpers.base.stats import interval, ratio_interval
from helpers.notebook import run as runs
from helpers.notebook.run import SUBJECTS, Run, plain


def new_run(notebook="02"):
    return Run(notebook, scale="smoke", subject="embedded", seed=7)


def stored(run):
    return json.loads(run.path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "changed, names",
    [
        ({"scale": "tiny"}, "smoke or laptop or paper"),
        ({"subject": "gpt2"}, "embedded or hub"),
        ({"notebook": "2"}, "two digits"),
        ({"seed": -1}, "a whole number from 0 to 2147483647, not -1"),
        ({"seed": 2**31}, "whole number"),
        ({"seed": True}, "whole number"),
        ({"seed": 1.5}, "whole number"),
        ({"seed": "1"}, "whole number"),
        ({"reference": "false"}, "True or False, not 'false'"),
        ({"reference": 1}, "True or False"),
    ],
)
def test_an_unknown_dial_is_refused_by_name(changed, names):
    dials = {"notebook": "02", "scale": "smoke", "subject": "embedded"} | changed
    with pytest.raises(ValueError, match=names):
        Run(dials.pop("notebook"), **dials)


@pytest.mark.parametrize("scale, tokens", [("smoke", 1), ("laptop", 2), ("paper", 3)])
def test_pick_gives_the_value_of_the_scale_and_files_named_ones(scale, tokens):
    run = Run("02", scale=scale, subject="hub")
    assert run.pick("tokens", smoke=1, laptop=2, paper=3) == tokens
    run.pick(smoke=4, laptop=5, paper=6)
    run.save()
    assert stored(run)["settings"] == {"tokens": tokens}


def test_budget_marks_this_scale(capsys):
    new_run().budget(smoke="20 s", laptop="5 minutes", paper="3 hours")
    marked = [line for line in capsys.readouterr().out.splitlines() if "▶" in line]
    assert len(marked) == 1 and "20 s" in marked[0]


def test_a_check_is_judged_printed_and_saved_at_once(results_folder, capsys):
    verdict = new_run().check("G2", slope=(0.3, torch.tensor(0.1), np.float32(0.5)), seeds=3, n=12, why="no gap")
    row = json.loads((results_folder / "embedded-smoke" / "02.json").read_text())["claims"]["G2"]
    assert verdict == row["verdict"] == "reproduced"
    assert row["measured"] == {"slope": 0.3} and row["interval"]["slope"] == pytest.approx([0.1, 0.5])
    assert (row["seeds"], row["n"], row["scale"], row["subject"]) == (3, 12, "smoke", "embedded")
    assert row["why"] == ""
    assert "✔ G2 reproduced" in (printed := capsys.readouterr().out) and "slope 0.3 [0.1, 0.5]" in printed


def test_a_miss_keeps_its_reason_and_says_when_there_is_none():
    run = new_run()
    assert run.check("G2", slope=(0.3, -0.1, 0.5), seeds=3, why="Three sizes are few.") == "partly"
    assert run.claims["G2"]["why"] == "Three sizes are few."
    assert run.check("G2", slope=(-0.3, -0.4, -0.2), seeds=3) == "not reproduced"
    assert run.claims["G2"]["why"] == "no explanation was given"


@pytest.mark.parametrize("slope", [interval([0.3]), (math.inf, 1, math.inf), (torch.tensor(math.nan), 0, 1)])
def test_a_number_that_is_none_leaves_the_claim_not_run(slope):
    run = new_run()
    assert run.check("G2", slope=slope, seeds=1, why="not this") == "not run"
    assert stored(run)["claims"]["G2"]["why"].endswith("is not a finite number")


@pytest.mark.parametrize(
    "claim, measured, sentence",
    [
        ("G99", {"slope": 1}, "no claim 'G99'"),
        ("G4", {"dead": 0}, "G4 belongs to notebook 03, not 02"),
        ("G2", {"slope": 0.3}, "G2 needs slope_low"),
        ("G2", {"slope": (0.3, 0.1)}, "slope must be a number or"),
        ("G2", {"slope": "steep"}, "slope must be a number or"),
        ("G2", {"slope": torch.zeros(3)}, "slope must be a number or"),
    ],
)
def test_a_wrong_check_is_refused_in_one_sentence(claim, measured, sentence):
    with pytest.raises(ValueError, match=sentence):
        new_run().check(claim, seeds=3, **measured)


def test_results_on_gemma_say_which_one(monkeypatch):
    monkeypatch.setenv("SUITE_GEMMA", "google/gemma-3-270m")
    found = {subject: json.loads(Run("02", scale="smoke", subject=subject).save().read_text()) for subject in SUBJECTS}
    assert {subject: result.get("model") for subject, result in found.items()} == {
        **{"embedded": None, "hub": None, "gemma": "google/gemma-3-270m"}
    }


ONLY = "behaviours were planted in the embedded models alone"


@pytest.mark.parametrize("subject", ["hub", "gemma"])
def test_a_notebook_that_reads_the_embedded_models_judges_no_claim_about_another(subject, capsys):
    run = Run("02", scale="smoke", subject=subject, embedded_only=ONLY)
    run.budget(smoke="20 s", laptop="5 minutes", paper="3 hours")
    assert run.check("G2", slope=(0.3, 0.1, 0.5), seeds=3, n=12, why="no gap") == "not run"
    printed, found = capsys.readouterr().out, stored(run)
    row = found["claims"]["G2"]
    assert (row["verdict"], row["why"], row["measured"], row["interval"], row["seeds"]) == ("not run", ONLY, {}, {}, 0)
    assert f"No claim is judged for subject {subject!r}: {ONLY}. The embedded models are read." in printed
    assert "○ G2 not run" in printed and "measured" not in printed
    assert (found["subject"], found["read"], found["why"]) == (subject, "embedded", ONLY) and "model" not in found


def test_on_its_own_subject_it_judges_as_any_other(capsys):
    run = Run("02", scale="smoke", subject="embedded", embedded_only=ONLY)
    run.budget(smoke="20 s", laptop="5 minutes", paper="3 hours")
    assert run.check("G2", slope=(0.3, 0.1, 0.5), seeds=3) == "reproduced"
    assert "read" not in stored(run) and ONLY not in capsys.readouterr().out


def test_a_question_is_filed_as_measured_and_not_judged(capsys):
    run = new_run("12")
    assert run.check("C27", l1_nu_error=(0.3, 0.1, 0.5), seeds=3) == "measured, not judged"
    assert stored(run)["claims"]["C27"]["why"] == "" and "◇ C27 measured, not judged" in capsys.readouterr().out


def test_the_file_says_where_the_numbers_come_from():
    run = new_run()
    run.record(nmse=torch.tensor([0.5, math.nan]), shape=(np.int64(2), 3))
    content = json.loads(run.save().read_text())
    assert content["recorded"] == {"nmse": [0.5, None], "shape": [2, 3]}
    assert (content["notebook"], content["scale"], content["subject"], content["seed"]) == (
        "02",
        "smoke",
        "embedded",
        7,
    )
    assert content["torch"] == torch.__version__ and " core" in content["hardware"]
    assert content["minutes"] >= 0 and content["started"][:2] == "20"
    assert all(content[key] for key in ("commit", "python"))


def test_peak_memory_is_in_gigabytes():
    assert 0.05 < runs.peak_memory_gb() < 50  # torch alone takes more, the tests less


def test_peak_memory_is_known_on_windows_too(monkeypatch):
    """There is no /proc and no module `resource`, and psutil counts the peak in bytes."""
    monkeypatch.setattr(runs, "_search", lambda *_: "")
    monkeypatch.setattr(runs.psutil.Process, "memory_info", lambda _: SimpleNamespace(peak_wset=3 * 2**29))
    monkeypatch.setitem(sys.modules, "resource", None)
    assert runs.peak_memory_gb() == 1.5


def test_the_commit_is_marked_when_the_code_differs_from_it(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    assert runs.commit(tmp_path) == "unknown"
    git("init", "-q")
    assert runs.commit(tmp_path) == "unknown"
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "first")
    clean = runs.commit(tmp_path)
    (tmp_path / "data" / "results").mkdir(parents=True)
    (tmp_path / "data" / "results" / "02.json").write_text("{}")
    assert len(clean) >= 7 and runs.commit(tmp_path) == clean
    (tmp_path / "code.py").write_text("2")
    assert runs.commit(tmp_path) == f"{clean}+changes"


def test_the_commit_is_unknown_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert runs.commit() == "unknown"


def test_interval_by_hand():
    assert interval([1, 2, 3]) == pytest.approx((2, 2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), abs=1e-5)
    assert interval([5, 5]) == (5, 5, 5)
    assert interval([4])[0] == 4 and all(map(math.isnan, interval([4])[1:]))
    with pytest.raises(ValueError, match="at least one value"):
        interval([])


def test_interval_of_three_seeds_covers_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(1.0, 2.0, size=(1000, 3))
    covered = [low <= 1.0 <= high for _, low, high in map(interval, draws)]
    assert 0.93 < np.mean(covered) < 0.97
    covered = [low <= 1.0 <= high for _, low, high in (interval(row, confidence=0.5) for row in draws[:400])]
    assert 0.44 < np.mean(covered) < 0.56


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=6))
def test_ratio_interval_turned_over_is_that_of_the_inverse(ratios):
    mean, low, high = ratio_interval(ratios)
    assert mean == pytest.approx(math.prod(ratios) ** (1 / len(ratios)))
    assert ratio_interval(1 / ratio for ratio in ratios) == pytest.approx((1 / mean, 1 / high, 1 / low))


def test_ratio_interval_needs_positive_ratios():
    with pytest.raises(ValueError, match="positive, finite ratios"):
        ratio_interval([1.0, 0.0])


json_values = st.recursive(st.none() | st.booleans() | st.integers(), st.lists, max_leaves=8)


@given(json_values)
def test_plain_leaves_plain_values_alone(value):
    assert plain(value) == value


def test_plain_turns_arrays_into_json():
    nest = {1: torch.ones(2, dtype=torch.bfloat16), "x": [np.float64("inf"), np.arange(2)], "b": np.bool_(True)}
    assert json.loads(json.dumps(plain(nest))) == {"1": [1.0, 1.0], "x": [None, [0, 1]], "b": True}


def long_run(**options):
    return Run("04", scale="laptop", subject="embedded", seed=3, **options)


def measured(shift=0.0):
    frame = pd.DataFrame(
        {"nmse": [0.51234 + shift, math.nan], "apart": [math.nan] * 2, "seed": [0, 1], "tied": [True, False]}
    )
    return {"sweep": frame.assign(method=["TopK", "ReLU"]), "by_pair": {"chat": frame[["nmse"]]}, "n": 64, "ks": [1, 2]}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """What runs leave behind is at once what the repository stores."""
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path))
    return tmp_path


def test_a_run_without_stored_numbers_judges_its_own(repository):
    run = long_run()
    judged = run.kept_or(**measured())
    assert run.stored is None and judged.origin == "trained in this run" and judged.n == 64
    assert judged.hardware == runs.hardware()
    pd.testing.assert_frame_equal(judged.sweep, measured()["sweep"])
    assert list(repository.iterdir()) == []


def test_what_a_reference_run_filed_is_judged_by_later_ones(repository):
    long_run(reference=True).kept_or(**measured())
    run = long_run()
    run.stored["hardware"] = "another machine"
    judged = run.kept_or(**measured(shift=1.0) | {"n": 2, "by_pair": {"other": pd.DataFrame()}})
    assert judged.origin == f"stored reference run, {run.stored['commit']}" and run.stored["seed"] == 3
    assert judged.hardware == "another machine"
    pd.testing.assert_frame_equal(judged.sweep, measured()["sweep"])  # gaps, whole numbers, truths, words
    pd.testing.assert_frame_equal(judged.by_pair["chat"], measured()["by_pair"]["chat"])
    assert (judged.n, judged.ks) == (64, [1, 2]) and list(judged.by_pair) == ["chat"]


def test_what_has_become_known_of_a_stored_run_is_said_wherever_it_is_named(repository, capsys):
    long_run(reference=True).kept_or(n=1)
    run = long_run()
    run.stored["caveats"] = ["the clock was wrong"]
    assert run.kept_or(n=2).origin == f"stored reference run, {run.stored['commit']}, the clock was wrong"
    run.budget(smoke="a", laptop="b", paper="c")
    assert capsys.readouterr().out.endswith("\nKnown of that run: the clock was wrong.\n")


def test_what_is_filed_later_stands_beside_what_was_filed_before(repository):
    run = long_run(reference=True)
    run.kept_or(sweep=[1], board=[2])
    run.kept_or(board=[3])
    assert long_run().stored["values"] == {"sweep": [1], "board": [3]}


def test_what_a_stored_run_did_not_measure_yet_is_judged_live(repository):
    long_run(reference=True).kept_or(sweep=[1], board=[2])
    run = long_run()
    judged = run.kept_or(marks=[3])
    assert (judged.marks, judged.origin, judged.hardware) == ([3], "trained in this run", runs.hardware())
    assert run.keeps("sweep", "board") and not run.keeps("marks") and not long_run(reference=True).keeps("sweep")
    with pytest.raises(ValueError, match="embedded-reference/04.json lacks marks: repeat that run"):
        run.kept_or(sweep=[1], marks=[3])


def test_what_the_embedded_models_gave_is_kept_and_read_as_theirs_whatever_the_subject(repository):
    elsewhere = {"scale": "laptop", "subject": "hub", "embedded_only": ONLY}
    Run("04", reference=True, **elsewhere).kept_or(n=1)
    assert Run("04", **elsewhere).kept_or(n=2).n == long_run().kept_or(n=2).n == 1
    assert Run("04", scale="laptop", subject="hub").stored is None


def test_a_reference_run_at_smoke_scale_rehearses_with_smokes_plan():
    plans = [
        Run("04", scale=scale, subject="embedded", reference=reference).plan
        for scale in ("smoke", "laptop", "paper")
        for reference in (False, True)
    ]
    assert plans == ["smoke", "smoke", "laptop", "reference", "paper", "reference"]


def test_only_laptop_runs_read_stored_numbers_and_then_need_one_seed(repository, capsys):
    long_run(reference=True).kept_or(n=1)
    assert long_run().seeds() == [3] and long_run(reference=True).seeds() == [3, 4, 5]
    long_run().budget(smoke="a", laptop="b", paper="c")
    assert "judged on the stored reference run" in capsys.readouterr().out
    smoke = Run("04", scale="smoke", subject="embedded")
    assert smoke.stored is None and smoke.seeds() == [0, 1] and smoke.settings["seeds"] == 2
    assert Run("05", scale="laptop", subject="embedded").stored is None


def test_minutes_say_what_they_were_spent_on(monkeypatch):
    SECONDS["harvest"] += 600  # before this run
    run = Run("02", scale="smoke", subject="embedded")
    SECONDS["training"] += 90
    run._start -= 120
    spent = json.loads(run.save().read_text())["minutes_spent_on"]
    assert spent.pop("set-up") > 0
    assert spent == {"training": 1.5, "evaluation and the rest": pytest.approx(0.5, abs=0.02)}
