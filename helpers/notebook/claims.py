"""The claims of the papers: declared in data/claims.csv before the run, judged by code.

An expectation is a yes/no expression over the numbers a notebook measured; `x_low` and `x_high` are the ends of the
interval of `x`. A claim is *reproduced* where its first expectation holds, *partly* where only its second does:

    G2:  reproduced = slope_low > 0      partly = slope > 0

A claim without expectations is *measured, not judged* once a notebook has numbers for it.
"""

import csv
import functools
import json
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

from helpers.base.storage import DATA, RESULTS

CLAIMS = DATA / "claims.csv"
UNJUDGED = "measured, not judged"  # a question, or a claim whose direction the paper leaves open
MARKS = {"reproduced": "✔", "partly": "≈", "not reproduced": "✘", UNJUDGED: "◇", "not run": "○"}
NOT_RUN = {"verdict": "not run", "measured": {}, "interval": {}, "seeds": 0, "why": ""}

FUNCTIONS = {"abs": abs, "min": min, "max": max}


@dataclass(frozen=True)
class Claim:
    """One row of data/claims.csv; `paper` is empty where no number of the paper is confirmed."""

    id: str
    source: str
    section: str
    claim: str
    paper: str
    measured: str  # what is measured here, with the name of each number in backticks
    notebook: str  # the one that checks it
    reproduced: str  # expectations, both empty for a claim that nothing judges
    partly: str
    redeclared: str  # what was changed after a run had been judged, and why; empty for most


@functools.cache
def load_claims() -> dict[str, Claim]:
    """The claims by id; a test holds the file to its form."""
    with CLAIMS.open(newline="", encoding="utf-8") as file:
        return {row["id"]: Claim(**row) for row in csv.DictReader(file)}


def judge(claim: Claim, measured: dict, interval: dict) -> tuple[str, str]:
    """Verdict on a claim, and the reason if it could not be judged (else "").

    measured: name -> number; interval: name -> (low, high). None, nan and inf mean that there is no number.
    Raises ValueError if an expectation needs a number that was not passed.
    """
    if not claim.reproduced:
        known = any(x is not None and math.isfinite(x) for x in measured.values())
        return (UNJUDGED, "") if known else ("not run", "none of its numbers is finite")
    ends = {f"{name}_{end}": x for name, pair in interval.items() for end, x in zip(("low", "high"), pair, strict=True)}
    values = measured | ends
    needed = names(claim.reproduced) | names(claim.partly)
    if missing := sorted(needed - values.keys()):
        raise ValueError(f"{claim.id} needs {', '.join(missing)}: pass each number to check() as x=(value, low, high)")
    if unknown := sorted(name for name in needed if values[name] is None or not math.isfinite(values[name])):
        return "not run", f"{', '.join(unknown)} is not a finite number"
    if evaluate(claim.reproduced, values):
        return "reproduced", ""
    return ("partly" if evaluate(claim.partly, values) else "not reproduced"), ""


def evaluate(expression: str, values: dict[str, float]) -> bool:
    """Truth of an expectation: Python over the measured numbers, with abs, min and max; else ValueError."""
    names(expression)
    try:
        found = eval(expression, {"__builtins__": {}} | FUNCTIONS, values)
    except (NameError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"the expectation {expression!r} cannot be evaluated: {error}") from error
    if not isinstance(found, bool):
        raise ValueError(f"the expectation {expression!r} must be a yes/no expression, such as 'ratio_low > 1'")
    return found


def names(expression: str) -> set[str]:
    """The measured numbers that an expectation speaks of."""
    try:
        return set(compile(expression, "<expectation>", "eval").co_names) - FUNCTIONS.keys()
    except SyntaxError as error:
        raise ValueError(f"the expectation {expression!r} is not an expression: {error.msg}") from error


def table(results: Path = RESULTS, subject: str = "embedded", scale: str = "laptop") -> list[dict]:
    """All claims in order, each with the row its notebook left in `results`, or verdict "not run"."""
    found = {}
    for path in sorted((Path(results) / f"{subject}-{scale}").glob("[0-9][0-9].json")):
        found |= json.loads(path.read_text(encoding="utf-8"))["claims"]
    return [{**NOT_RUN, **found.get(claim.id, {}), "claim": claim} for claim in load_claims().values()]


def to_text(rows: list[dict]) -> str:
    """What a run found, for the terminal: a line per claim that was checked, and the count of each verdict."""
    return "\n".join([*(describe(row) for row in rows if row["measured"]), counts(rows)])


def describe(row: dict) -> str:
    """A checked claim in a few lines: verdict, claim, the paper's value, the measured numbers, and why if it missed."""
    claim = row["claim"]
    lines = [f"{MARKS[row['verdict']]} {claim.id} {row['verdict']} (seeds: {row['seeds']}): {claim.claim}"]
    lines += [f"    paper     {claim.paper}"] if claim.paper else []
    lines += [f"    measured  {numbers(row)}"] if row["measured"] else []
    lines += [f"    why       {row['why']}"] if row["why"] else []
    return "\n".join(textwrap.fill(line, 112, subsequent_indent=" " * 14, break_on_hyphens=False) for line in lines)


def numbers(row: dict) -> str:
    """The measured numbers of a row with their intervals: `ratio 1.32 [1.21, 1.44], l0_error 0.01`."""
    ends = {name: f" [{number(low)}, {number(high)}]" for name, (low, high) in row["interval"].items()}
    return ", ".join(f"{name} {number(x)}{ends.get(name, '')}" for name, x in row["measured"].items())


def counts(rows: list[dict]) -> str:
    """How many claims got each verdict, in one line."""
    found = [row["verdict"] for row in rows]
    return " · ".join(f"{mark} {found.count(verdict)} {verdict}" for verdict, mark in MARKS.items())


def number(x: float | None) -> str:
    return "n/a" if x is None else f"{x:.3g}"
