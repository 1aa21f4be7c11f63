"""One run of one notebook: its scale, what it measured, and the JSON file that it leaves behind.

The file is `<results>/<subject>-<scale>/<notebook>.json`. It says where the numbers come from (seed, commit, hardware,
versions, minutes, memory), which settings the scale picked, what was recorded, and the verdict on each claim. Every
check writes it anew, so an interrupted notebook keeps what it had.
"""

import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import psutil
import torch

from helpers.base.clock import SECONDS
from helpers.base.storage import RESULTS, ROOT, results_dir, write_atomic
from helpers.notebook.claims import UNJUDGED, Claim, describe, judge, load_claims

SCALES = ("smoke", "laptop", "paper")
SUBJECTS = ("embedded", "hub", "gemma")
SEEDS = range(2**31)  # what torch and NumPy both take, also with a few added


class Run:
    """What one notebook does at one scale to one subject; see the module's head for the file it writes.

    reference   measure the large collection whose numbers laptop runs read from the repository
    embedded_only   why the notebook reads the embedded models whatever the subject, if it does: then it judges no claim
                about another, and files this reason
    stored      what such a run has filed, with its provenance; None where this run judges its own numbers

    Raises ValueError for a scale, subject, seed or notebook number that does not exist.
    """

    def __init__(
        self,
        notebook: str,
        *,
        scale: str,
        subject: str,
        seed: int = 0,
        reference: bool = False,
        embedded_only: str = "",
    ):
        _one_of("scale", scale, SCALES)
        _one_of("subject", subject, SUBJECTS)
        if type(seed) is not int or seed not in SEEDS:
            raise ValueError(f"seed must be a whole number from 0 to {SEEDS[-1]}, not {seed!r}")
        if type(reference) is not bool:
            raise ValueError(f"reference must be True or False, not {reference!r}")
        if not re.fullmatch(r"\d\d", str(notebook)):
            raise ValueError(f"notebook must be its two digits, such as '02', not {notebook!r}")
        self.notebook, self.scale, self.subject, self.seed = str(notebook), scale, subject, seed
        self.settings: dict[str, Any] = {}
        self.recorded: dict[str, Any] = {}
        self.claims: dict[str, dict] = {}
        self.reference = reference
        self._read = "embedded" if embedded_only else subject
        self._not_judged = embedded_only if self._read != subject else ""
        self.stored = _read_if_there(self._reference_file(RESULTS)) if scale == "laptop" and not reference else None
        self._filed: dict[str, Any] = {}
        self._provenance = provenance()
        self._start, self._before = time.monotonic(), SECONDS.copy()
        self._setup = time.time() - psutil.Process().create_time()

    @property
    def path(self) -> Path:
        """Where the results go: under $SUITE_RESULTS, or out/results."""
        return results_dir() / f"{self.subject}-{self.scale}" / f"{self.notebook}.json"

    def pick(self, name: str | None = None, *, smoke: Any, laptop: Any, paper: Any) -> Any:
        """The value for this run's scale, filed among the settings under `name` if one is given."""
        value = {"smoke": smoke, "laptop": laptop, "paper": paper}[self.scale]
        if name is not None:
            self.settings[name] = plain(value)
        return value

    def budget(self, *, smoke: str, laptop: str, paper: str) -> None:
        """Print the time that each scale takes, this run's marked."""
        for scale, time_needed in {"smoke": smoke, "laptop": laptop, "paper": paper}.items():
            print(f"{'▶' if scale == self.scale else ' '} {scale:<7} {time_needed}")
        if self._not_judged:
            print(f"No claim is judged for subject {self.subject!r}: {self._not_judged}. The embedded models are read.")
        elif self.stored:
            print(f"Claims are judged on the stored reference run: {self.stored['commit']}, {self.stored['hardware']}.")
            for caveat in self.stored.get("caveats", []):
                print(f"Known of that run: {caveat}.")

    @property
    def plan(self) -> str:
        """Whose plan trained collections follow: the scale's, or "reference"; at smoke scale that run is rehearsed."""
        return "reference" if self.reference and self.scale != "smoke" else self.scale

    def seeds(self) -> list[int]:
        """Seeds from this run's on: three, two at smoke scale, one where stored numbers are judged."""
        n = self.pick("seeds", smoke=2, laptop=1 if self.stored else 3, paper=3)
        return [self.seed + i for i in range(3 if self.reference else n)]

    def record(self, **values: Any) -> None:
        """File measured values: numbers, arrays, tensors, and lists and dicts of them."""
        self.recorded |= {name: plain(value) for name, value in values.items()}

    def check(self, claim_id: str, *, seeds: int, why: str = "", n: int | None = None, **measured: Any) -> str:
        """Judge a claim by the measured numbers; print, file and save the verdict, and return it.

        measured: each a number or (value, low, high). seeds: how many runs the intervals are over; n: how many values,
        where that differs. why: one sentence on a possible miss, shown only if the claim is not reproduced.
        Raises ValueError for an unknown claim, one of another notebook, or a missing number.
        """
        claim = self._own(claim_id)
        numbers, interval = _split(measured)
        verdict, reason = judge(claim, numbers, interval)
        if self._not_judged:  # these numbers are another subject's
            numbers, interval, verdict, reason, seeds, n = {}, {}, "not run", self._not_judged, 0, None
        missed = verdict not in ("reproduced", UNJUDGED)
        why = (reason or why.strip() or "no explanation was given") if missed else ""
        row = {"verdict": verdict, "measured": numbers, "interval": interval, "paper": claim.paper, "seeds": seeds}
        row |= {"why": why, "n": n, "scale": self.scale, "subject": self.subject}
        self.claims[claim_id] = row
        self.save()
        print(describe(row | {"claim": claim}))
        return verdict

    def kept_or(self, **live: Any) -> SimpleNamespace:
        """What the claims are judged on: what a reference run has filed under these names, else `live` itself.

        A stored run that has filed none of them is older than what is asked, so that `live` is judged.

        live: data frames, numbers, lists, and dicts of them. A reference run files them for later ones. The result has
        `live`'s names, `origin`, which says in words where they come from, and `hardware`, what measured them. What has
        become known of a stored run since stands in its file as `caveats`, sentences that `origin` repeats. Raises
        ValueError for a stored run that has filed some of the names and not the others.
        """
        if self.reference:
            self._file(live)
        if not self.keeps(*live):
            return SimpleNamespace(**live, origin="trained in this run", hardware=self._provenance["hardware"])
        values = {name: _like(value, self.stored["values"][name]) for name, value in live.items()}
        origin = ", ".join(["stored reference run", self.stored["commit"], *self.stored.get("caveats", [])])
        return SimpleNamespace(**values, origin=origin, hardware=self.stored["hardware"])

    def keeps(self, *names: str) -> bool:
        """Whether a stored run that this one judges has filed all of these; ValueError where it has only some."""
        missing = [name for name in names if name not in (self.stored or {"values": {}})["values"]]
        if missing and len(missing) < len(names):
            file = f"{self._read}-reference/{self.notebook}.json"
            raise ValueError(f"{file} lacks {', '.join(missing)}: repeat that run, or keep these apart from the others")
        return not missing

    def _file(self, live: dict[str, Any]) -> None:
        self._filed |= plain(live)
        minutes = {"minutes": round((time.monotonic() - self._start) / 60, 2)}
        content = {"notebook": self.notebook, "subject": self._read, "seed": self.seed} | self._provenance | minutes
        text = json.dumps(content | {"values": self._filed}, allow_nan=False, default=str)
        write_atomic(self._reference_file(results_dir()), text)

    def _reference_file(self, results: Path) -> Path:
        return results / f"{self._read}-reference" / f"{self.notebook}.json"

    def save(self) -> Path:
        """Write the results file in one step; call it as often as you like."""
        identity = {key: getattr(self, key) for key in ("notebook", "scale", "subject", "seed")}
        if self._not_judged:
            identity |= {"read": self._read, "why": self._not_judged}
        elif self.subject == "gemma":
            identity["model"] = _gemma()
        minutes = (time.monotonic() - self._start) / 60
        cost = {"minutes": round(minutes, 2), "peak_memory_gb": round(peak_memory_gb(), 2)}
        cost |= {"minutes_spent_on": self._spent_on(minutes), "threads": torch.get_num_threads()}
        found = {key: getattr(self, key) for key in ("settings", "recorded", "claims")}
        content = identity | self._provenance | cost | found
        return write_atomic(self.path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False, default=str))

    def _spent_on(self, minutes: float) -> dict[str, float]:
        """Where the time went; imports and what else came before the run are not among its `minutes`."""
        parts = {kind: seconds / 60 for kind, seconds in (SECONDS - self._before).items()}
        rest = {"evaluation and the rest": minutes - sum(parts.values())}
        return {kind: round(part, 2) for kind, part in ({"set-up": self._setup / 60} | parts | rest).items()}

    def _own(self, claim_id: str) -> Claim:
        claims = load_claims()
        if claim_id not in claims:
            raise ValueError(f"there is no claim {claim_id!r}: data/claims.csv declares G1 to G40 and C1 to C52")
        if (home := claims[claim_id].notebook) != self.notebook:
            raise ValueError(f"{claim_id} belongs to notebook {home}, not {self.notebook}: see data/claims.csv")
        return claims[claim_id]


def _gemma() -> str:
    """Which Gemma was studied: the packaged one, or what $SUITE_GEMMA names."""
    from helpers.subjects.subject import subject_for  # slow to import, and every notebook has done it

    return subject_for("gemma")


def provenance() -> dict[str, str]:
    """Commit, hardware, versions and start time of a run; nothing that tells whose machine it is."""
    return {
        "commit": commit(),
        "hardware": hardware(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit(root: Path = ROOT) -> str:
    """Short hash of the checked-out commit, "+changes" if the code differs from it, "unknown" outside git.

    A run writes notebooks, results and the README, so those do not count; a notebook's source has a hash of its own.
    """
    if not (short := _git(root, "rev-parse", "--short", "HEAD")):
        return "unknown"
    changed = _git(root, "status", "--porcelain", "--", ".", ":!notebooks", ":!data/results", ":!README.md")
    return f"{short}+changes" if changed else short


def hardware() -> str:
    """Name of the processor, the number of cores open to this process, and the GPU if there is one."""
    processor = _search(r"model name\s*: (.*)", "/proc/cpuinfo") or platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor}, {cores} core{'' if cores == 1 else 's'}{gpu}"


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far, in GB (2^30 bytes)."""
    if found := _search(r"VmHWM:\s*(\d+)", "/proc/self/status"):
        return int(found) / 2**20  # KiB; on Linux getrusage starts from the peak of the launching process
    if windows := getattr(psutil.Process().memory_info(), "peak_wset", 0):
        return windows / 2**30
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS


def plain(value: Any) -> Any:
    """Plain Python for JSON: arrays and tensors become lists or numbers, frames dicts of columns, nan and inf None."""
    if isinstance(value, pd.DataFrame):
        value = value.to_dict("list")
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _split(measured: dict[str, Any]) -> tuple[dict, dict]:
    """Numbers and intervals of what was passed to check: name -> value, and name -> [low, high]."""
    numbers, intervals = {}, {}
    for name, value in measured.items():
        triple = plain(value) if isinstance(value, Sequence) else [plain(value)]
        if len(triple) not in (1, 3) or not all(x is None or isinstance(x, int | float) for x in triple):
            raise ValueError(f"{name} must be a number or (value, low, high), not {value!r}")
        numbers[name] = triple[0]
        if len(triple) == 3:
            intervals[name] = triple[1:]
    return numbers, intervals


def _like(live: Any, stored: Any) -> Any:
    """Stored JSON as `live` is: columns as a frame, where None is a missing number; a dict of frames likewise."""
    if isinstance(live, dict) and live and all(isinstance(item, pd.DataFrame) for item in live.values()):
        return {key: _like(pd.DataFrame(), item) for key, item in stored.items()}
    if not isinstance(live, pd.DataFrame):
        return stored
    frame = pd.DataFrame(stored)
    gaps = [name for name in frame if frame[name].map(lambda x: x is None or type(x) in (int, float)).all()]
    return frame.astype({name: float for name in gaps if frame[name].dtype == object})


def _read_if_there(path: Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _one_of(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} must be {' or '.join(allowed)}, not {value!r}")


def _git(root: Path, *arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        return ""


def _search(pattern: str, path: str) -> str:
    found = re.search(pattern, Path(path).read_text(encoding="utf-8")) if Path(path).exists() else None
    return found[1] if found else ""
