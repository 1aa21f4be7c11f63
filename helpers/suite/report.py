"""How far a run of the notebooks is, how long it will still take, and what became of it.

    time left = what is left of the current notebook + all later ones

where a notebook is expected to take its minutes in the committed run of the same subject and scale, times the pace of
this machine so far (ours / recorded); without such a record, the mean of those that have run.
"""

import json
import sys
import time
from pathlib import Path

from helpers.base.storage import RESULTS
from helpers.suite.execution import Outcome

QUIET_S = 20  # seconds between progress lines where there is no terminal to rewrite


def number_of(path: Path) -> str:
    """The two digits that a notebook's name starts with; its results file is named by them."""
    return path.name[:2]


def name_of(path: Path) -> str:
    """The notebook's name for people and for its executed copy: `02_relu_against_topk`, `solutions/02_...`."""
    return f"solutions/{path.stem}" if path.parent.name == "solutions" else path.stem


def folder_of(parameters: dict) -> str:
    """Folder name of a run, in out/ and in the results: `embedded-laptop`."""
    return f"{parameters['subject']}-{parameters['scale']}"


def recorded_minutes(path: Path, parameters: dict, results: Path = RESULTS) -> float | None:
    """Minutes that the notebook took in the committed run of this subject and scale, or None if there is none."""
    file = results / folder_of(parameters) / f"{number_of(path)}.json"
    if path.parent.name == "solutions" or not file.exists():
        return None
    return json.loads(file.read_text(encoding="utf-8")).get("minutes")


def seconds_left(todo: list[Path], elapsed: float, outcomes: list[Outcome], recorded: dict) -> float | None:
    """Seconds until `todo` is done, the first of them being `elapsed` seconds old; None if nothing is known yet.

    recorded: path -> minutes of the committed run or None.
    """
    ran = [(outcome.minutes, recorded[outcome.path]) for outcome in outcomes if not outcome.error]
    pairs = [(ours, theirs) for ours, theirs in ran if theirs]
    pace = sum(ours for ours, _ in pairs) / sum(theirs for _, theirs in pairs) if pairs else 1.0
    typical = sum(ours for ours, _ in ran) / len(ran) if ran else None
    expected = [recorded[path] * pace if recorded[path] else typical for path in todo]
    if not todo or None in expected:
        return None
    return max(60 * expected[0] - elapsed, 0) + 60 * sum(expected[1:])


class Report:
    """Prints one line per notebook: rewritten at every cell on a terminal, now and then into a file."""

    def __init__(self, paths: list[Path], parameters: dict):
        self.paths, self.outcomes = paths, []
        self.recorded = {path: recorded_minutes(path, parameters) for path in paths}
        self.terminal, self.printed = sys.stdout.isatty(), 0.0
        what = f"subject {parameters['subject']} · scale {parameters['scale']}"
        print(f"{_count(paths)} · {what}{self._left(paths)}", flush=True)

    def begin(self, path: Path) -> None:
        self.path, self.begun = path, time.monotonic()
        self._print("starts")

    def cell(self, number: int, count: int) -> None:
        if self.terminal or time.monotonic() - self.printed > QUIET_S:
            self._print(f"cell {number} of {count}")

    def end(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self._print(_state(outcome), last=True)

    def interrupted(self) -> None:
        self.end(Outcome(self.path, self._elapsed() / 60, "KeyboardInterrupt: interrupted"))

    def _elapsed(self) -> float:
        return time.monotonic() - self.begun

    def _left(self, todo: list[Path], elapsed: float = 0.0) -> str:
        left = seconds_left(todo, elapsed, self.outcomes, self.recorded)
        return "" if left is None else f" · about {_clock(left)} left"

    def _print(self, state: str, last: bool = False) -> None:
        self.printed = time.monotonic()
        place = f"[{self.paths.index(self.path) + 1}/{len(self.paths)}] {name_of(self.path)}"
        left = self._left(self.paths[len(self.outcomes) :], 0 if last else self._elapsed())
        line = f"{place} · {state} · {_clock(self._elapsed())}{left}"
        start, end = ("\r\x1b[K", "\n" if last else "") if self.terminal else ("", "\n")
        print(f"{start}{line}", end=end, flush=True)


def summary(outcomes: list[Outcome], paths: list[Path]) -> str:
    """How many ran, and a line for each that did not: notebook, cell, error."""
    failures = [outcome for outcome in outcomes if outcome.error]
    time_taken = _clock(60 * sum(outcome.minutes for outcome in outcomes))
    lines = [f"{len(outcomes) - len(failures)} of {_count(paths)} ran to the end, in {time_taken}."]
    lines += [describe(outcome) for outcome in failures]
    if failures:
        lines += ["Below, the claims of such a notebook are those it reached, or those of an earlier run."]
    return "\n".join(lines)


def describe(outcome: Outcome) -> str:
    """A failure in one line: notebook, cell number and its first line, error name and message."""
    where = f", cell {outcome.cell} `{outcome.source}`" if outcome.cell else ""
    return f"✘ {name_of(outcome.path)}{where}: {outcome.error}"


def _state(outcome: Outcome) -> str:
    if outcome.cell:
        return f"failed in cell {outcome.cell}"
    return outcome.error.partition(":")[0] or "done"


def _count(paths: list[Path]) -> str:
    return "1 notebook" if len(paths) == 1 else f"{len(paths)} notebooks"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
