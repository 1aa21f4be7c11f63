"""The declared claims, the judge, and the committed verdicts."""

import csv
import dataclasses
import json
import math
import random
import re

import pytest

from helpers.base.storage import RESULTS, ROOT
from helpers.notebook import claims
from helpers.notebook.claims import CLAIMS, MARKS, UNJUDGED, describe, evaluate, judge, load_claims, names, table

ALL = load_claims()
JUDGED = [claim for claim in ALL.values() if claim.reproduced]
LEVELS = (-1, -0.5, -0.1, 0, 0.005, 0.04, 0.2, 0.6, 0.95, 0.995, 1, 1.05, 1.6, 3)


def split(**measured):
    """(value, low, high) triples and numbers as the judge takes them."""
    numbers = {name: x[0] if isinstance(x, tuple) else x for name, x in measured.items()}
    return numbers, {name: x[1:] for name, x in measured.items() if isinstance(x, tuple)}


def test_no_claim_has_been_taken_away():
    assert {f"G{i}" for i in range(1, 41)} | {f"C{i}" for i in range(1, 53)} <= ALL.keys()


def test_claims_are_numbered_by_paper_and_named_once():
    with CLAIMS.open(newline="", encoding="utf-8") as file:
        found = [row["id"] for row in csv.DictReader(file)]
    g = sum(name.startswith("G") for name in found)
    assert found == [f"G{i}" for i in range(1, g + 1)] + [f"C{i}" for i in range(1, len(found) - g + 1)]


@pytest.mark.parametrize("claim", ALL.values(), ids=lambda claim: claim.id)
def test_a_claim_says_what_it_is_and_where_it_is_judged(claim):
    assert all(isinstance(cell, str) for cell in dataclasses.astuple(claim))  # as many cells as the header has
    assert claim.source and claim.claim and claim.measured
    assert any((ROOT / "notebooks").glob(f"{claim.notebook}_*.ipynb"))
    assert bool(claim.reproduced) == bool(claim.partly)


def described(claim):
    return set(re.findall(r"`(\w+)`", claim.measured))


@pytest.mark.parametrize("claim", JUDGED, ids=lambda claim: claim.id)
def test_every_number_an_expectation_needs_is_described(claim):
    assert {re.sub(r"_(low|high)$", "", name) for name in names(claim.reproduced) | names(claim.partly)} <= described(
        claim
    )


def test_what_nothing_judges_names_a_number_only_where_a_notebook_measures_it():
    left = [claim for claim in ALL.values() if claim not in JUDGED]
    assert [claim.id for claim in left] == "G40 C26 C27".split()
    assert [claim.id for claim in left if described(claim)] == ["C26", "C27"]


def drawn(claim, draw):
    """Consistent made-up measurements of a claim: every number inside its interval."""
    for name in sorted(described(claim)):
        x, half = draw.choice(LEVELS), draw.choice((0, 0.01, 0.2))
        yield from {name: x, f"{name}_low": x - half, f"{name}_high": x + half}.items()


@pytest.mark.parametrize("claim", JUDGED, ids=lambda claim: claim.id)
def test_every_verdict_can_come_out_and_reproduced_is_never_less_than_partly(claim):
    draw, seen = random.Random(0), set()
    for number in range(5000):
        values = dict(drawn(claim, draw))
        seen.add((evaluate(claim.reproduced, values), evaluate(claim.partly, values)))
        if number >= 150 and len(seen) >= 3:
            break
    assert seen == {(True, True), (False, True), (False, False)}


def test_the_seven_claims_of_the_first_notebooks():
    homes = {claim_id: ALL[claim_id].notebook for claim_id in ("G1", "G2", "G3", "G31", "G32", "G36", "C45")}
    assert homes == {"G1": "02", "G2": "02", "G3": "02", "G31": "01", "G32": "01", "G36": "02", "C45": "02"}


@pytest.mark.parametrize(
    "expression, truth",
    [
        ("x > 1", True),
        ("x > y", False),
        ("0 < x < y and not y == x", True),
        ("x + 2 * y == 8 or x != 2", True),
        ("abs(-x) / 4 >= min(x, y, 1)", False),
        ("max(x, y) - 1 <= x", True),
    ],
)
def test_evaluate_by_hand(expression, truth):
    assert evaluate(expression, {"x": 2, "y": 3}) is truth


@pytest.mark.parametrize(
    ("expression", "sentence"),
    [
        ("x + 1", "must be a yes/no expression"),
        ("x and y", "must be a yes/no expression"),
        ("x >", "is not an expression"),
        ("x > 1; y", "is not an expression"),
        ("", "is not an expression"),
        ("x > z", "cannot be evaluated: name 'z'"),
        ("x / 0 > 1", "cannot be evaluated: float division by zero"),
        ("x > 'a'", "cannot be evaluated"),
        ("__import__('os').getcwd() > x", "cannot be evaluated: name '__import__'"),
    ],
)
def test_what_is_no_expectation_is_refused_in_one_sentence(expression, sentence):
    with pytest.raises(ValueError, match=sentence):
        evaluate(expression, {"x": 2.0, "y": 3.0})


R, P, N = "reproduced", "partly", "not reproduced"


@pytest.mark.parametrize(
    "claim, measured, verdict",
    [
        ("G1", {"ratio": (1.3, 1.2, 1.4), "gated_ratio": (1.0, 0.95, 1.05)}, R),
        ("G1", {"ratio": (1.3, 1.2, 1.4), "gated_ratio": (1.2, 1.15, 1.25)}, P),
        ("G1", {"ratio": (1.3, 1.2, 1.4), "gated_ratio": (1.0, 0.85, 1.15)}, P),
        ("G1", {"ratio": (1.3, 0.9, 1.7), "gated_ratio": (1.0, 0.95, 1.05)}, N),
        ("G2", {"slope": (0.2, 0.1, 0.3)}, R),
        ("G2", {"slope": (0.2, -0.1, 0.5)}, P),
        ("G2", {"slope": (-0.2, -0.5, 0.1)}, N),
        ("G3", {"above": 0, "excess": 0.002}, R),
        ("G3", {"above": 0, "excess": 0.02}, P),
        ("G3", {"above": 0.01, "excess": 0.002}, N),
        ("G31", {"relu_shift": (0.2, 0.18, 0.22), "topk_shift": (0.03, 0.02, 0.04)}, R),
        ("G31", {"relu_shift": (0.2, 0.18, 0.22), "topk_shift": (0.1, -0.01, 0.17)}, R),
        ("G31", {"relu_shift": (0.2, 0.18, 0.22), "topk_shift": (0.15, 0.14, 0.16)}, P),
        ("G31", {"relu_shift": (0.2, 0.18, 0.22), "topk_shift": (0.3, -0.1, 0.7)}, N),
        ("G31", {"relu_shift": (0.2, -0.1, 0.5), "topk_shift": (0.0, -0.1, 0.1)}, N),
        ("G32", {"relu_gain": (0.1, 0.05, 0.2), "topk_gain": (0.02, 0.01, 0.03), "gap_closed": (0.5, 0.3, 0.7)}, R),
        ("G32", {"relu_gain": (0.1, 0.05, 0.2), "topk_gain": (0.02, 0.01, 0.03), "gap_closed": (0.9, 0.7, 1.1)}, P),
        ("G32", {"relu_gain": (0.1, 0.05, 0.2), "topk_gain": (0.02, 0.01, 0.03), "gap_closed": (-2, -3, -1)}, P),
        ("G32", {"relu_gain": (0.1, 0.05, 0.2), "topk_gain": (0.0, -0.01, 0.01), "gap_closed": (0.5, 0.3, 0.7)}, N),
        ("G36", {"ratio": (1.02, 1.01, 1.03)}, R),
        ("G36", {"ratio": (1.0, 0.99, 1.01)}, P),
        ("G36", {"ratio": (1.2, 1.1, 1.3)}, N),
        ("G36", {"ratio": (0.9, 0.8, 1.0)}, N),
    ],
)
def test_verdicts_by_hand(claim, measured, verdict):
    assert judge(ALL[claim], *split(**measured)) == (verdict, "")


@pytest.mark.parametrize(
    "changed, verdict",
    [
        ({}, R),
        ({"topk_ratio": (1.05, 0.98, 1.12)}, N),
        ({"ce_ratio": (1.05, 0.98, 1.12)}, P),
        ({"jumprelu_ratio": (1.2, 1.15, 1.25)}, P),
        ({"jumprelu_ratio": (0.7, 0.65, 0.75)}, P),
        ({"l0_error": 0.2}, N),
    ],
)
def test_batchtopk_must_hold_in_each_part(changed, verdict):
    good = {"topk_ratio": (1.05, 1.03, 1.07), "ce_ratio": (1.1, 1.05, 1.15), "jumprelu_ratio": (1.0, 0.95, 1.05)}
    assert judge(ALL["C45"], *split(**good | {"l0_error": 0.01} | changed))[0] == verdict


@pytest.mark.parametrize("low", [math.nan, -math.inf, None])
def test_a_number_that_is_none_is_not_run(low):
    assert judge(ALL["G2"], {"slope": 0.1}, {"slope": (low, 0.2)}) == ("not run", "slope_low is not a finite number")


def test_a_question_is_measured_and_not_judged():
    assert judge(ALL["C27"], {"one": 0.3, "other": math.nan}, {"one": (0.1, 0.5)}) == ("measured, not judged", "")
    assert judge(ALL["C27"], {"one": math.nan, "other": None}, {})[0] == "not run"


def test_a_number_no_expectation_needs_may_be_anything():
    assert judge(ALL["G2"], {"slope": 0.1, "other": math.nan}, {"slope": (0.05, 0.2)}) == ("reproduced", "")


ROW = {
    "verdict": "partly",
    "measured": {"slope": 0.31},
    "interval": {"slope": [-0.1, None]},
    "seeds": 3,
    "why": "a | b",
}


def written(folder, **claim_rows):
    (folder / "embedded-laptop").mkdir(parents=True)
    (folder / "embedded-laptop" / "02.json").write_text(json.dumps({"claims": claim_rows}))
    (folder / "embedded-laptop" / "sweep.json").write_text("[]")  # a stored sweep is not a notebook's result
    return folder


def test_table_has_all_claims_and_the_rows_that_were_left(tmp_path):
    rows = table(written(tmp_path, G2=ROW))
    assert [row["claim"].id for row in rows] == list(ALL)
    assert [row["claim"].id for row in rows if row["verdict"] != "not run"] == ["G2"]
    assert all(row["verdict"] == "not run" for row in table(tmp_path, scale="smoke"))


def test_text_shows_what_was_checked_and_counts_the_rest(tmp_path):
    text = claims.to_text(table(written(tmp_path, G2=ROW)))
    assert "≈ G2 partly (seeds: 3)" in text and "slope 0.31 [-0.1, n/a]" in text and "a | b" in text
    assert "G4" not in text and f"○ {len(ALL) - 1} not run" in text


def test_a_checked_claim_reads_in_a_few_lines():
    lines = describe({**ROW, "claim": ALL["G8"]}).splitlines()
    assert lines[0].startswith("≈ G8 partly (seeds: 3): The best learning rate")
    assert [line.split()[0] for line in lines[1:]] == ["paper", "measured", "why"]


def faults(results):
    """What is wrong with the verdicts stored under `results`: wrong by today's expectation, or a miss unexplained."""
    found = []
    for path in sorted(results.glob("*/[0-9][0-9].json")):
        if path.parent.name.endswith("-reference"):  # a long run keeps values and judges nothing
            continue
        for claim_id, row in json.loads(path.read_text(encoding="utf-8"))["claims"].items():
            try:
                verdict, _ = judge(ALL[claim_id], row["measured"], row["interval"])
            except ValueError:  # it is declared anew, over numbers that this run did not measure
                verdict = None
            if (row["verdict"], row["paper"]) != (verdict, ALL[claim_id].paper) or ALL[claim_id].notebook != path.stem:
                found.append(f"{path}: {claim_id} is stale, run the notebook again")
            if row["verdict"] not in ("reproduced", UNJUDGED) and row["why"] in ("", "no explanation was given"):
                found.append(f"{path}: {claim_id} is {row['verdict']} and has no explanation")
    return found


def test_committed_verdicts_are_current_and_every_miss_is_explained():
    assert faults(RESULTS) == []


def test_a_stale_and_an_unexplained_verdict_are_noticed(tmp_path):
    row = ROW | {"interval": {"slope": [-0.1, 1]}, "paper": ""}
    assert faults(written(tmp_path / "good", G2=row)) == []
    stale = faults(written(tmp_path / "stale", G2=row | {"verdict": "not reproduced"}))
    assert len(stale) == 1 and "stale" in stale[0]
    other = faults(written(tmp_path / "other", G2=row | {"measured": {"ratio": 1}, "interval": {}}))
    assert len(other) == 1 and "stale" in other[0]
    unexplained = faults(written(tmp_path / "unexplained", G2=row | {"why": "no explanation was given"}))
    assert len(unexplained) == 1 and "no explanation" in unexplained[0]


def test_marks_are_the_five_verdicts():
    assert list(MARKS) == ["reproduced", "partly", "not reproduced", "measured, not judged", "not run"]
    assert "".join(MARKS.values()) == "✔≈✘◇○"
