"""Recovery of planted differences: one number scale for every method that compares two models.

    planted      share of the directions planted in chat alone (pair "injected") that one of the top m candidates points
                 along, by `recovery.COSINE`
    prompt,      share of the chat-only behaviours that chat learnt (pair "chat") that one of the top m detects at the
    decision     user's <end_of_turn>, or at the last token before the answer: F1 above `DETECTS`
    kl           share of the gap between base and chat that the m candidates close that add most: one rule for all
    kl-own       the same for the top m
    false        of the live candidates on a pair where nothing is chat's, the share that the method calls chat-only

m is 10, 50 and 200. A method ranks its candidates by a score of its own and calls chat-only by a cut of its own; no
label is used for either. A candidate that never fires on held-out tokens is not live, and is left out everywhere. Which
candidate tells a behaviour, and from which value upwards, is chosen on every second dialogue and scored on the others,
among tokens of one kind (`recovery.behaviour_table`).

    score_method(Method("mine", fit), pairs)    a row for each seed, where fit(pairs, "chat", seed) returns a `Found`

`methods` holds the methods, and beside them what a number is worth: directions fitted to the labels, which a column
must reward, and directions drawn at random.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.base.stats import known_interval, percent_table
from helpers.dictionaries.pair_collection import Heldout, TrainedPairs
from helpers.diffing.effects import gap_closed
from helpers.diffing.patching import Difference, patch_kl, written
from helpers.diffing.reading import read_dialogues, sparse_codes
from helpers.diffing.recovery import behaviour_table, match_planted
from helpers.text.dialogues import BEHAVIOURS

TOPS = (10, 50, 200)
NULLS = ("self", "longer")
PLACES = ("prompt", "decision")  # where behaviours are told
DETECTS = 0.5  # a candidate with a higher F1 on the half that did not choose it detects a behaviour
READ = 3  # times the held-out dialogues, to tell behaviours in: a probe needs so many, and luck has less of a chance
BATCH = 4096  # tokens encoded at a time


class Found(NamedTuple):
    """What a method found on one pair: as many candidates as the difference has latents."""

    difference: Difference  # what they write into base, and when each is on
    scores: np.ndarray | None = None  # (m,), the highest first; NaN is never taken; by default the size of what it adds
    called: np.ndarray | None = None  # (m,) bool, chat-only by the method's own cut; None for a method without one
    points: Tensor | None = None  # (m, d_model): where each points; by default along what it writes

    @property
    def directions(self) -> Tensor:
        return self.difference.rows if self.points is None else self.points


@dataclasses.dataclass(frozen=True)
class Method:
    """A name, what fits it to a pair, and in words how it ranks and what it calls chat-only."""

    name: str
    fit: Callable[[TrainedPairs, str, int], Found]  # of the collection, the pair's name and a seed
    ranks: str = "size of what it adds"
    calls: str = "no cut"


def score_method(
    method: Method, pairs: TrainedPairs, n_dialogues: int = 64, on: Sequence[str] | None = None
) -> pd.DataFrame:
    """A row for each of the collection's seeds: method, seed, planted_10 ..., prompt_10 ..., decision_10 ...,
    kl_10 ..., kl-own_10 ..., false_self, false_longer; or what is measured `on` some of these pairs.

    The first `n_dialogues` held-out dialogues are patched. Pairs that the subject does not have are left out.
    Behaviours are NaN where no token is labelled, and so is what a method without a cut calls. Raises ValueError for a
    pair on which nothing is measured, and for a code that does not fit the candidates.
    """
    known = ("injected", "chat", *NULLS)
    if unknown := [name for name in on or () if name not in known]:
        raise ValueError(f"nothing is measured on the pair {unknown[0]!r}: choose of {', '.join(known)}")
    return pd.DataFrame([_row(method, pairs, seed, n_dialogues, on or known) for seed in pairs.seeds])


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of `score_method`, also of several methods -> method, measure, mean, low, high (over seeds), seeds."""
    found = []
    for method, part in rows.groupby("method", sort=False):
        for measure in rows.columns.drop(["method", "seed"]):
            mean, low, high = known_interval(part[measure])
            ends = {"mean": mean, "low": low, "high": high, "seeds": int(part[measure].count())}
            found.append({"method": method, "measure": measure} | ends)
    return pd.DataFrame(found)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of `score_method`, to be printed: per cent with half the width of the interval; a row for each method."""
    return percent_table(summary(rows), "method", "measure")


def _row(method: Method, pairs: TrainedPairs, seed: int, n_dialogues: int, on: Sequence[str]) -> dict:
    row = {"method": method.name, "seed": seed}
    for name in (pair for pair in on if pair in pairs.pairs):
        found = method.fit(pairs, name, seed)
        live, sizes = sized(found, pairs.heldout(name).x)
        order = ranked(sizes if found.scores is None else found.scores, live)
        if name == "injected":
            row |= _planted(found, order, pairs)
        elif name == "chat":
            row |= _behaviours(found, order, pairs)
            row |= _closed(found, {"kl": ranked(sizes, live), "kl-own": order}, pairs, n_dialogues)
        else:
            row[f"false_{name}"] = _called(found, live)
    return row


@torch.no_grad()
def sized(found: Found, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Which candidates fire on pairs x (n, 2, d_model), (m,) bool; and how much each adds, its mean squared length.

    Raises ValueError for a code that does not fit the candidates.
    """
    difference = found.difference
    fired, squares = torch.zeros(difference.n_latents), torch.zeros(len(difference.rows), dtype=torch.float64)
    for part in x.split(BATCH):
        fired += (difference.latents(part) > 0).sum(0).cpu()
        squares += difference.encode(part).double().square().sum(0).cpu()
    sizes = squares * difference.rows.double().square().sum(-1).cpu() / len(x)
    return (fired > 0).numpy(), sizes.view(-1, difference.n_latents).sum(0).numpy()


def ranked(scores: np.ndarray, live: np.ndarray) -> np.ndarray:
    """The numbers of the live candidates that have a score, the highest first."""
    order = np.argsort(-np.asarray(scores, dtype=float), kind="stable")
    return order[live[order] & ~np.isnan(scores[order])]


@lru_cache(maxsize=1)
def labelled(pairs: TrainedPairs) -> Heldout:
    """Held-out dialogues of the pair "chat", each read from its own beginning, with their labels."""
    return read_dialogues(pairs.pair("chat"), pairs.dialogues(times=READ))


def _planted(found: Found, order: np.ndarray, pairs: TrainedPairs) -> dict:
    truth = pairs.stream("injected")
    match = match_planted(found.directions[order], truth)
    of = match.planted.where(match.kind == "chat-only")
    return {f"planted_{m}": of[:m].nunique() / truth.labels.count("chat-only") for m in TOPS}  # `Plan` plants some


def _behaviours(found: Found, order: np.ndarray, pairs: TrainedPairs) -> dict:
    reading, best = labelled(pairs), torch.from_numpy(order[: max(TOPS)])
    silent = (0, 1)  # one more, that is never on: where there is no candidate, it tells nothing
    code = sparse_codes(lambda x: F.pad(found.difference.latents(x)[:, best], silent), reading.x)
    names, row = list(BEHAVIOURS), {}
    wanted = np.isin(names, pairs.planted_behaviours("chat-only"))
    for place in PLACES:
        for m in TOPS:
            f1 = behaviour_table(code[:, :m], reading.labels(place), reading.first, names).f1[wanted].dropna()
            row[f"{place}_{m}"] = (f1 > DETECTS).mean()  # NaN where none is labelled in both halves
    return row


def _closed(found: Found, orders: dict[str, np.ndarray], pairs: TrainedPairs, n: int) -> dict:
    """Over all positions that predict an answer, without a bias."""
    firsts = {f"{name}_{m}": order[:m].copy() for name, order in orders.items() for m in TOPS}
    conditions = {name: written(found.difference, first) for name, first in firsts.items()}
    return gap_closed(patch_kl(pairs.pair("chat"), pairs.dialogues()[:n], conditions))[list(conditions)].to_dict()


def _called(found: Found, live: np.ndarray) -> float:
    if found.called is None:
        return float("nan")
    return found.called[live].mean() if live.any() else 0.0  # of nothing, nothing is called
