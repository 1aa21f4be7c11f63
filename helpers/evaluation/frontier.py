"""ReLU against TopK over two decades of latents: a table that grows (notebooks 02, 04 and 05).

Training all of it takes hours. So what is measured of an autoencoder is a line of a file that the repository keeps, and
`grow` trains what the file has no line for: it may be stopped at any time, and goes on there or on another machine.
A line counts for what its key says, a hash of all that the weights depend on: settings, tokens, activations, products.

    size by size    ReLU and TopK at five sparsities, over seeds; the smallest two sizes also Gated, JumpReLU, BatchTopK
    half as long    both at the middle sparsity for half of the tokens: does doubling them still change the error?
    other rates     both there at half and at twice the learning rate, at those sizes: has either been given a bad one?
"""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from helpers.base.storage import RESULTS, write_atomic
from helpers.dictionaries.collection import TrainedSAEs
from helpers.dictionaries.sweeps import Cell, stored_cell, sweep
from helpers.evaluation.downstream import downstream

SPARSITIES = {  # from loose to strict, so that the L0 of all methods span 12 to 80 at every size
    "TopK": (8, 16, 32, 64, 128),
    "ReLU": (0.5, 0.3, 0.18, 0.1, 0.06),
    "BatchTopK": (8, 16, 32, 64, 128),
    "Gated": (0.7, 0.5, 0.3, 0.2, 0.12),
    "JumpReLU": (0.02, 0.01, 0.005, 0.0025, 0.00125),
}
EVERY_SIZE = ("TopK", "ReLU")
GRID, HALF, RATES = "size by size", "half as long", "other rates"  # parts of the table
CURVE = ["tokens", "loss", "nmse", "l0", "dead"]  # of training
ROWS = 3  # one in so many rows of held-out text is spliced
DIGITS = 6  # that a line keeps


class Measured(NamedTuple):
    """What the lines of the file say."""

    frame: (
        pd.DataFrame
    )  # a row for each cell: its part, fields, `sweep`'s and `downstream`'s columns, subject, commit, hardware
    curves: pd.DataFrame  # about 50 rows for each: its fields, `budget` its tokens; `CURVE`


def ledger(subject: str) -> Path:
    """The file of a notebook's dial."""
    return RESULTS / f"{subject}-reference" / "frontier.jsonl"


def frontier_cells(shelf: TrainedSAEs) -> dict[Cell, str]:
    """All cells of the table, smaller sizes first, and the part that each belongs to."""
    plan, found = shelf.plan, {}
    for n in plan.sizes:
        for method, values in SPARSITIES.items():
            if method in EVERY_SIZE or n in plan.sizes[:2]:
                found |= {shelf.cell(method, n, value, seed): GRID for seed in shelf.seeds for value in values}
    middle = {method: values[len(values) // 2] for method, values in SPARSITIES.items()}
    middles = [shelf.cell(m, n, middle[m], shelf.seeds[0]) for n in plan.sizes for m in EVERY_SIZE]
    found |= {dataclasses.replace(cell, tokens=cell.tokens // 2): HALF for cell in middles}
    small = [cell for cell in middles if cell.n_latents in plan.sizes[:2]]
    return found | {dataclasses.replace(cell, lr=cell.lr * times): RATES for cell in small for times in (0.5, 2)}


def stored(subject: str) -> Measured:
    """All that the file has; empty frames where there is none, as for a subject that nobody has trained it on."""
    return _table(list(_read(ledger(subject)).values()))


def grow(shelf: TrainedSAEs, cells: dict[Cell, str], path: Path, about: dict) -> Measured:
    """Train and measure the cells that `path` has no line for, add their lines, and give those of all `cells`.

    `cells`: some of `frontier_cells`, each with its part. `about` says commit and hardware, for the new lines. Lines
    are added whenever one method is done at one size and seed. Raises ValueError for a file that cannot be read.
    """
    keys = {cell: stored_cell(cell, shelf.stream.batches, shelf.heldout, 0, shelf.folder).path.stem for cell in cells}
    known = _read(path)
    missing = [cell for cell in keys if keys[cell] not in known]
    for _, part in itertools.groupby(missing, lambda cell: (cell.method, cell.n_latents, cell.seed)):
        lines = _measured(shelf, {cell: cells[cell] for cell in part}, keys, about)
        known = _read(path) | lines  # another process may have added some
        write_atomic(path, "".join(f"{json.dumps({'key': key} | line)}\n" for key, line in sorted(known.items())))
    return _table([known[key] for key in keys.values()])


def _measured(shelf: TrainedSAEs, cells: dict[Cell, str], keys: dict[Cell, str], about: dict) -> dict[str, dict]:
    frame, curves, saes = sweep([*cells], shelf.stream.batches, shelf.heldout, 0, shelf.folder)
    costs = downstream(shelf.model, shelf.heldout_rows()[::ROWS], list(saes.values()), shelf.heldout.mean(0))
    rows = _rounded(frame.join(costs).assign(part=list(cells.values()))).to_dict("records")
    paths = [_rounded(curve[CURVE]).to_dict("list") for _, curve in curves.groupby(_position(curves))]
    origin = {"subject": shelf.model.name} | {name: about[name] for name in ("commit", "hardware")}
    return {keys[c]: {"row": row | origin, "curve": p} for c, row, p in zip(saes, rows, paths, strict=True)}


def _position(curves: pd.DataFrame) -> pd.Series:
    """Which curve a row belongs to, counted from 0: tokens fall where a new one begins."""
    return (curves.tokens.diff() < 0).cumsum()


def _rounded(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.map(lambda value: float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value)


def _read(path: Path) -> dict[str, dict]:
    """Line by key."""
    lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []
    try:
        found = [json.loads(line) for line in lines]
        return {line.pop("key"): line for line in found}
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{path} is no table of lines of JSON ({error}): restore it, or move it away") from error


def _table(lines: list[dict]) -> Measured:
    curves = [pd.DataFrame(line["curve"]).assign(**_fields(line["row"])) for line in lines]
    return Measured(pd.DataFrame(line["row"] for line in lines), pd.concat([pd.DataFrame(), *curves]))


def _fields(row: dict) -> dict:
    return {name: row[name] for name in ("method", "n_latents", "sparsity", "seed")} | {"budget": row["tokens"]}
