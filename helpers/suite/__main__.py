"""The command line of the suite; see `python -m helpers.suite --help`.

A notebook that fails does not stop the others. The summary names its cell and error, and the exit code tells: 0 all
ran, 1 some failed, 2 nothing was started because of a wrong argument, 130 interrupted.
"""

import argparse
import ast
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import nbformat

from helpers.base.storage import OUT, RESULTS, ROOT, results_dir, write_atomic
from helpers.notebook import claims
from helpers.suite.run import INTERRUPTED, executed_copy, find, folder_of, number_of, run, summary
from helpers.suite.store import read_storable, store, store_exercises

REFERENCE = {"scale": "laptop", "subject": "embedded", "seed": 0}  # the run whose outputs the repository shows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the exit code."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without ✔ is no reason to stop
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except KeyboardInterrupt:
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    parameters = {"scale": options.scale, "subject": options.subject, "seed": options.seed, **dict(options.set)}
    paths = find(options.only, options.solutions)
    begun = time.monotonic()
    outcomes = run(paths, parameters, OUT, options.limit)
    print("", summary(outcomes, paths, (time.monotonic() - begun) / 60), sep="\n")
    print(f"Executed copies in {_shown(OUT)}, results in {_shown(results_dir())}.\n")
    print(claims.to_text(claims.table(results_dir(), parameters["subject"], parameters["scale"])))
    errors = [outcome.error for outcome in outcomes if outcome.error]
    return 130 if INTERRUPTED in errors else int(bool(errors))


def _store(options: argparse.Namespace) -> int:
    store_all(find(options.only, solutions=True), OUT, RESULTS)
    return 0


def _exercises(options: argparse.Namespace) -> int:
    """At smoke scale, which changes nothing in an exercise."""
    paths, smoke, begun = find(options.only, solutions=True), REFERENCE | {"scale": "smoke"}, time.monotonic()
    outcomes = run(paths, smoke, OUT)
    print("", summary(outcomes, paths, (time.monotonic() - begun) / 60), sep="\n")
    for path in (outcome.path for outcome in outcomes if not outcome.error):
        store_exercises(executed_copy(path, smoke, OUT), path)
    return int(len(outcomes) < len(paths) or any(outcome.error for outcome in outcomes))


def _pages(options: argparse.Namespace) -> int:
    from helpers.suite import needs, workshop
    from helpers.suite.pages import write_pages  # plotly's browser is not needed by the others

    write_pages()
    workshop.write_page()
    needs.write_page()
    return 0


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
    from helpers.suite.workshop import file_sections

    file_sections([copy for path, copy in copies.items() if path.parent.name != "solutions"], results)
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
    parser = argparse.ArgumentParser(prog="python -m helpers.suite", description=__doc__)
    commands = parser.add_subparsers(required=True)
    run_parser = commands.add_parser("run", help="run notebooks; executed copies and results go to out/")
    store_parser = commands.add_parser("store", help="take the last laptop run into the repository")
    exercises_parser = commands.add_parser("exercises", help="run at smoke scale; take the exercises' outputs alone")
    commands.add_parser("pages", help="make CLAIMS.md and the pages' tables anew").set_defaults(command=_pages)
    for sub, command in ((run_parser, _run), (store_parser, _store), (exercises_parser, _exercises)):
        sub.set_defaults(command=command)
        sub.add_argument("--only", default="", help='numbers to choose, such as "01 02"')
    run_parser.add_argument("--scale", default="laptop", help="smoke, laptop or paper")
    run_parser.add_argument("--subject", default="embedded", help="embedded, hub or gemma")
    run_parser.add_argument("--seed", type=int, default=0)
    run_parser.add_argument(
        "--set", action="append", default=[], type=_setting, metavar="NAME=VALUE", help="a parameter"
    )
    run_parser.add_argument("--limit", type=float, metavar="MINUTES", help="stop a notebook after this time")
    run_parser.add_argument("--solutions", action="store_true", help="run the solutions of the exercises too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
