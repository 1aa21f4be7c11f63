"""Run the suite's notebooks top to bottom, and store what the repository shows of them.

    python -m helpers.suite.run run --scale laptop --subject embedded     executed copies and results under out/
    python -m helpers.suite.run store                                     the last laptop run, into the repository
    python -m helpers.suite.run lint                                      what breaks the contract of a notebook

A notebook that fails does not stop the others. The summary names its cell and error, and the exit code tells: 0 all
ran, 1 some failed, 2 nothing was started because of a wrong argument, 130 interrupted.
"""

import argparse
import ast
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import nbformat

from helpers.base.storage import OUT, RESULTS, ROOT, results_dir, write_atomic
from helpers.notebook import claims
from helpers.notebook.run import SCALES, SUBJECTS
from helpers.suite.execution import Outcome, execute, refuse_unknown_parameters
from helpers.suite.lint import lint
from helpers.suite.report import Report, folder_of, name_of, number_of, summary
from helpers.suite.store import is_stale, read_storable, store

NOTEBOOKS = ROOT / "notebooks"
LIMIT_MINUTES = {"smoke": 30, "laptop": 120, "paper": 72 * 60}  # for one notebook; many times its budget
REFERENCE = {"scale": "laptop", "subject": "embedded"}  # the run whose outputs the repository shows


def find(only: str = "", solutions: bool = False) -> list[Path]:
    """The notebooks in reading order, then their solutions if asked for.

    only: numbers to choose, as in "01 02". Raises ValueError if there is no such notebook.
    """
    paths = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
    paths += sorted(NOTEBOOKS.glob("solutions/[0-9]*.ipynb")) if solutions else []
    numbers = {number_of(path) for path in paths}
    chosen = {number.zfill(2) for number in only.replace(",", " ").split()} or numbers
    if unknown := sorted(chosen - numbers):
        there = ", ".join(sorted(numbers)) or "none"
        raise ValueError(f"there is no notebook {', '.join(unknown)}; choose from {there}.")
    return [path for path in paths if number_of(path) in chosen]


def run(paths: list[Path], parameters: dict, out: Path, limit_minutes: float | None = None) -> list[Outcome]:
    """Run notebooks one after another; executed copies go to out/<subject>-<scale>/.

    Raises ValueError, before anything is run, for an unknown scale, subject or parameter. An interruption leaves what
    was finished and ends the list early.
    """
    refuse_unknown_values(parameters)
    for path in paths:
        refuse_unknown_parameters(path, parameters)
    limit_s = 60 * (limit_minutes or LIMIT_MINUTES[parameters["scale"]])
    report = Report(paths, parameters)
    for path in paths:
        report.begin(path)
        try:
            report.end(execute(path, parameters, executed_copy(path, parameters, out), limit_s, report.cell))
        except KeyboardInterrupt:
            report.interrupted()
            break
    return report.outcomes


def refuse_unknown_values(parameters: dict) -> None:
    """Raise ValueError unless scale and subject are among those that exist and the seed is a whole number."""
    for name, values in {"scale": SCALES, "subject": SUBJECTS}.items():
        if parameters[name] not in values:
            raise ValueError(f"{name} {parameters[name]!r} is unknown; choose {' or '.join(values)}.")
    if not isinstance(parameters["seed"], int):
        raise ValueError(f"seed {parameters['seed']!r} is not a whole number.")


def executed_copy(path: Path, parameters: dict, out: Path) -> Path:
    """Where the executed copy of a notebook lies."""
    return out / folder_of(parameters) / f"{name_of(path)}.ipynb"


def store_all(paths: list[Path], out: Path, results: Path) -> None:
    """Take outputs and results of the last reference run into the repository.

    Raises ValueError, and changes nothing, if one of them is missing, failed, or older than its source.
    """
    copies = {path: executed_copy(path, REFERENCE, out) for path in paths}
    measured = {path: _fresh_results(path, read_storable(copy, path)) for path, copy in copies.items()}
    for path, copy in copies.items():
        store(copy, path)
        if measured[path]:
            write_atomic(results / folder_of(REFERENCE) / measured[path].name, measured[path].read_bytes())
    for kept in results_dir().glob("*-reference/*.json"):  # of long runs
        if kept.stem in map(number_of, copies):
            write_atomic(results / kept.parent.name / kept.name, kept.read_bytes())


def _fresh_results(path: Path, executed: nbformat.NotebookNode) -> Path | None:
    """The results file of the run that made `executed`, or None if that notebook measures nothing."""
    file = results_dir() / folder_of(REFERENCE) / f"{number_of(path)}.json"
    if path.parent.name == "solutions" or not file.exists():
        return None
    if file.stat().st_mtime < datetime.fromisoformat(executed.metadata.papermill.start_time).timestamp():
        raise ValueError(f"the results of {path.name} are older than its executed copy; run it again, then store it.")
    return file


def problems(paths: list[Path]) -> list[str]:
    """What the lint finds, and which notebooks show outputs of an older source, one sentence each."""
    stale = [path for path in paths if is_stale(nbformat.read(path, as_version=4))]
    older = [f"{path.parent.name}/{path.name}: its outputs are older than its source." for path in stale]
    return [problem for path in paths for problem in lint(path)] + older


# ---- the command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run_command(options: argparse.Namespace) -> int:
    parameters = {"scale": options.scale, "subject": options.subject, "seed": options.seed, **dict(options.set)}
    paths = find(options.only, options.solutions)
    outcomes = run(paths, parameters, OUT, options.limit)
    print(f"\n{summary(outcomes, paths)}\nExecuted copies in {_shown(OUT)}, results in {_shown(results_dir())}.\n")
    print(claims.to_text(claims.table(results_dir(), options.subject, options.scale)))
    errors = [outcome.error for outcome in outcomes if outcome.error]
    return 130 if any(error.startswith("KeyboardInterrupt") for error in errors) else int(bool(errors))


def _store_command(options: argparse.Namespace) -> int:
    store_all(find(options.only, solutions=True), OUT, RESULTS)
    return 0


def _lint_command(options: argparse.Namespace) -> int:
    found = problems(find(options.only, solutions=True))
    print("\n".join(found or ["Every notebook keeps the contract."]))
    return int(bool(found))


def _shown(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def _setting(text: str) -> tuple[str, object]:
    """A parameter from the command line: `train=True` is a literal, `name=some words` is text."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m helpers.suite.run", description="Run and store the notebooks.")
    commands = parser.add_subparsers(required=True)
    for name, command in {"run": _run_command, "store": _store_command, "lint": _lint_command}.items():
        sub = commands.add_parser(name)
        sub.set_defaults(command=command)
        sub.add_argument("--only", default="", help='numbers to choose, such as "01 02"')
        if name == "run":
            _add_run_options(sub)
    return parser


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scale", default="laptop", help=" or ".join(SCALES))
    parser.add_argument("--subject", default="embedded", help=" or ".join(SUBJECTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], type=_setting, metavar="NAME=VALUE", help="a parameter")
    parser.add_argument("--limit", type=float, metavar="MINUTES", help="stop a notebook after this time")
    parser.add_argument("--solutions", action="store_true", help="run the solutions of the exercises too")


if __name__ == "__main__":
    sys.exit(main())
