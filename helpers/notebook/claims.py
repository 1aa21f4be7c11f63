"""The claims of the papers: declared in data/claims.csv before the run, judged by code, tabulated for the README.

An expectation is a yes/no expression over the numbers a notebook measured; `x_low` and `x_high` are the ends of the
interval of `x`. A claim is *reproduced* where its first expectation holds, *partly* where only its second does:

    G2:  reproduced = slope_low > 0      partly = slope > 0

`python -m helpers.notebook.claims --table` prints what a run found, `--readme` rewrites the README's tables.
"""

import argparse
import ast
import csv
import functools
import json
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path

from helpers.base.stats import percent
from helpers.base.storage import DATA, RESULTS, ROOT, results_dir, write_atomic

CLAIMS = DATA / "claims.csv"
NOTEBOOKS, README = ROOT / "notebooks", ROOT / "README.md"
IDS = [f"G{i}" for i in range(1, 41)] + [f"C{i}" for i in range(1, 53)]
CHECKING_NOTEBOOKS = [f"{i:02d}" for i in range(13)] + ["90"]  # 13 is the ledger, it checks nothing itself
MARKS = {"reproduced": "✔", "partly": "≈", "not reproduced": "✘", "not run": "○"}
NOT_RUN = {"verdict": "not run", "measured": {}, "interval": {}, "seeds": 0, "why": ""}
PAPERS = {"G": "Scaling and evaluating sparse autoencoders", "C": "Crosscoder model diffing"}

ENDS = ("mean", "low", "high")  # of an interval
FUNCTIONS = {"abs": abs, "min": min, "max": max}
LOGIC = (ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.Name, ast.Load)
COMPARISON = (ast.Compare, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq)
ARITHMETIC = (ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.USub)


@dataclass(frozen=True)
class Claim:
    """One row of data/claims.csv; `paper` is empty where no number of the paper is confirmed."""

    id: str
    source: str
    section: str
    claim: str
    paper: str
    measured: str  # what is measured here, with the name of each number in backticks
    notebook: str  # the one that checks it, empty where none does
    reproduced: str  # expectations, both empty for a claim that nothing judges yet
    partly: str


@functools.cache
def load_claims(path: Path = CLAIMS) -> dict[str, Claim]:
    """Read and validate the claims, by id. Raises ValueError naming the claim and the cell that is wrong."""
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    expected = [field.name for field in fields(Claim)]
    if header != expected or any(len(row) != len(expected) for row in rows):
        raise ValueError(f"every row of {Path(path).name} must have the cells {', '.join(expected)}")
    claims = {row[0]: Claim(*row) for row in rows}
    if [row[0] for row in rows] != IDS:
        raise ValueError(f"{Path(path).name} must list G1 to G40 and C1 to C52 once each, in this order")
    for claim in claims.values():
        _validate(claim)
    return claims


def _validate(claim: Claim) -> None:
    if not (claim.source and claim.claim and claim.measured):
        raise ValueError(f"{claim.id} needs a source, a claim and what is measured")
    if claim.notebook not in ["", *CHECKING_NOTEBOOKS]:
        raise ValueError(f"{claim.id} names notebook {claim.notebook!r}: use 00 to 12, 90, or leave it empty")
    if bool(claim.reproduced) != bool(claim.partly):
        raise ValueError(f"{claim.id} needs both expectations, `reproduced` and `partly`, or neither")
    for expression in filter(None, (claim.reproduced, claim.partly)):
        _parse(expression)


def judge(claim: Claim, measured: dict, interval: dict) -> tuple[str, str]:
    """Verdict on a claim, and the reason if it could not be judged (else "").

    measured: name -> number; interval: name -> (low, high). None, nan and inf mean that there is no number.
    Raises ValueError if the claim has no expectation, or the expectation needs a number that was not passed.
    """
    if not claim.reproduced:
        raise ValueError(f"{claim.id} has no expectation: declare one in {CLAIMS.name} before the run")
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
    """Truth of an expectation: names, numbers, comparisons, and/or/not, + - * /, abs, min and max; else ValueError."""
    code = compile(_parse(expression), "<expectation>", "eval")
    try:
        return bool(eval(code, {"__builtins__": {}}, values | FUNCTIONS))
    except (NameError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"the expectation {expression!r} cannot be evaluated: {error}") from error


def names(expression: str) -> set[str]:
    """The measured numbers that an expectation speaks of."""
    return {node.id for node in ast.walk(_parse(expression)) if isinstance(node, ast.Name)} - FUNCTIONS.keys()


def _parse(expression: str) -> ast.Expression:
    try:
        tree = ast.parse(expression, mode="eval")
    except SyntaxError as error:
        raise ValueError(f"the expectation {expression!r} is not an expression: {error.msg}") from error
    if refused := [node for node in ast.walk(tree) if not _is_allowed(node)]:
        raise ValueError(f"the expectation {expression!r} uses {type(refused[0]).__name__}, which is not allowed")
    if not _is_test(tree.body):
        raise ValueError(f"the expectation {expression!r} must be a yes/no expression, such as 'ratio_low > 1'")
    return tree


def _is_allowed(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, float)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS
    return isinstance(node, LOGIC + COMPARISON + ARITHMETIC)


def _is_test(node: ast.expr) -> bool:
    if isinstance(node, ast.BoolOp):
        return all(map(_is_test, node.values))
    return isinstance(node, ast.Compare) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not))


def table(results: Path = RESULTS, subject: str = "embedded", scale: str = "laptop") -> list[dict]:
    """All 92 claims in order, each with the row its notebook left in `results`, or verdict "not run"."""
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
    lines += [f"    measured  {numbers(row)}"]
    return "\n".join(lines + ([f"    why       {row['why']}"] if row["why"] else []))


def numbers(row: dict) -> str:
    """The measured numbers of a row with their intervals: `ratio 1.32 [1.21, 1.44], l0_error 0.01`."""
    ends = {name: f" [{_number(low)}, {_number(high)}]" for name, (low, high) in row["interval"].items()}
    return ", ".join(f"{name} {_number(x)}{ends.get(name, '')}" for name, x in row["measured"].items())


def counts(rows: list[dict]) -> str:
    """How many claims got each verdict, in one line."""
    found = [row["verdict"] for row in rows]
    return " · ".join(f"{mark} {found.count(verdict)} {verdict}" for verdict, mark in MARKS.items())


def to_markdown(rows: list[dict]) -> str:
    """The claims table of the README, a part per paper."""
    parts = [f"{counts(rows)}, of {len(rows)} claims."]
    for letter, paper in PAPERS.items():
        cells = [_claim_cells(row) for row in rows if row["claim"].id.startswith(letter)]
        header = ["id", "claim", "paper", "measured here", "seeds", "verdict"]
        parts += [f"### {paper}", _markdown_table(header, cells)]
    return "\n\n".join(parts)


def notebook_table(results: Path = RESULTS, notebooks: Path = NOTEBOOKS) -> str:
    """The notebook table of the README: question, claims, and what the reference run took."""
    rows = []
    for path in sorted(notebooks.glob("[0-9][0-9]_*.ipynb")):
        run_file = Path(results) / "embedded-laptop" / f"{path.name[:2]}.json"
        run = json.loads(run_file.read_text(encoding="utf-8")) if run_file.exists() else {}
        claims = [claim.id for claim in load_claims().values() if claim.notebook == path.name[:2]]
        cost = [_number(run[key]) if key in run else "" for key in ("minutes", "peak_memory_gb")]
        rows.append([f"[{path.name[:2]}](notebooks/{path.name})", _question(path), " ".join(claims), *cost])
    return _markdown_table(["notebook", "question", "claims", "minutes", "peak memory (GB)"], rows)


def leaderboard(results: Path = RESULTS) -> str:
    """The table of recovered planted differences that a notebook recorded (`leaderboard.summary`), per cent."""
    for path in sorted((Path(results) / "embedded-laptop").glob("[0-9][0-9].json")):
        if board := json.loads(path.read_text(encoding="utf-8")).get("recorded", {}).get("leaderboard"):
            cells = {(row["method"], row["measure"]): percent(*map(row.get, ENDS)) for row in board["rows"]}
            methods, measures = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
            rows = [[method, *(cells.get((method, name), "n/a") for name in measures)] for method in methods]
            header = ["method", *(name.replace("_", " ") for name in measures)]
            return f"{board['about']}\n\n{_markdown_table(header, rows)}"
    return "Not run yet."


def readme(text: str, results: Path = RESULTS, notebooks: Path = NOTEBOOKS) -> str:
    """`text` with the parts between its `claims`, `leaderboard` and `notebooks` markers generated anew."""
    text = fill(fill(text, "claims", to_markdown(table(results))), "leaderboard", leaderboard(results))
    return fill(text, "notebooks", notebook_table(results, notebooks))


def _claim_cells(row: dict) -> list[str]:
    claim = row["claim"]
    where = ", ".join(filter(None, (claim.source, claim.section)))
    reason = row["why"] or ("" if claim.reproduced else claim.measured)
    verdict = f"{MARKS[row['verdict']]} {row['verdict']}" + (f": {reason}" if reason else "")
    return [claim.id, f"{claim.claim} ({where})", claim.paper, numbers(row), str(row["seeds"] or ""), verdict]


def _question(path: Path) -> str:
    """The first question of a notebook's first text cell, or else its heading, without the number."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    lines = [re.sub(r"^[#*_> ]*(\d\d · )?|[*_ ]*$", "", line) for line in text.strip().splitlines()]
    return next((line for line in lines if line.endswith("?")), lines[0])


def _markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill(text: str, name: str, body: str) -> str:
    """`text` with `body` between its `name` markers. Raises ValueError where the markers are missing."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"README.md needs the line {begin} once and after it the line {end} once")
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{body}\n{end}", text, flags=re.DOTALL)


def _number(x: float | None) -> str:
    return "n/a" if x is None else f"{x:.3g}"


def main(arguments: list[str] | None = None) -> None:
    """The command line: print the table of a run, or rewrite README.md from the committed results."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.notebook.claims", description="The claims and what became of them."
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--table", action="store_true", help="print the claims that a run checked")
    action.add_argument("--readme", action="store_true", help="rewrite the tables of README.md from data/results")
    parser.add_argument("--results", type=Path, default=results_dir(), help="results folder for --table")
    parser.add_argument("--subject", default="embedded")
    parser.add_argument("--scale", default="laptop")
    options = parser.parse_args(arguments)
    if options.table:
        print(to_text(table(options.results, options.subject, options.scale)))
    else:
        write_atomic(README, readme(README.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
