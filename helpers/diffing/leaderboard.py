"""Recovery of planted differences: one number scale for every method that compares two models, and these methods.

    planted      share of the directions planted in chat alone (pair "injected") that one of the top m candidates points
                 along, by `recovery.COSINE`
    behaviours   share of the chat-only behaviours that chat learnt (pair "chat") that one of the top m detects over the
                 answer: F1 of "it is on" and "this token belongs to the behaviour" above a cut
    kl           share of the gap between base and chat that the top m close when written into base (`patching`)
    false        of the live candidates on a pair where nothing is chat's, the share that the method calls chat-only

m is 10, 50 and 200. A method ranks its candidates by a score of its own and calls chat-only by a cut of its own. No
label is used for either. A candidate that never fires on held-out tokens is not live, and is left out everywhere.

    score_method(Method("mine", fit), pairs)    a row for each seed, where fit(pairs, "chat", seed) returns a `Found`

Dictionaries are those of notebooks 09 to 12, as sparse as the L1 crosscoder of the pair. On "self" they read a sixth of
the tokens, as in notebook 09.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.activations.views import ViewedStream, view_of
from helpers.base.checks import require_finite
from helpers.base.stats import known_interval, percent_table
from helpers.dictionaries.autoencoders import SparseAutoencoder
from helpers.dictionaries.crosscoders import Crosscoder
from helpers.dictionaries.pair_collection import TrainedPairs
from helpers.dictionaries.sweeps import Cell, CrosscoderCell
from helpers.diffing.effects import gap_closed
from helpers.diffing.latent_scaling import NU_RANGE, SAE_SPECIFIC, sae_table
from helpers.diffing.norms import classes, delta_norm
from helpers.diffing.patching import Difference, difference_of, patch_kl, written
from helpers.diffing.recovery import F1, f1_scores, larger_rows, match_planted
from helpers.subjects.behaviours import planted_behaviours
from helpers.text.dialogues import BEHAVIOURS

TOPS = (10, 50, 200)
NULLS = ("self", "longer")
SAMPLE = 2**16  # tokens that the mean difference is taken over; hundreds of directions need no more
BATCH = 4096  # tokens encoded at a time
SHORT = 6  # on "self" a dictionary reads 1 / SHORT of the tokens


class Found(NamedTuple):
    """What a method found on one pair: as many candidates as the difference has latents."""

    difference: Difference  # what they write into base, and when each is on
    scores: np.ndarray | None = None  # (m,), the highest first; NaN is never taken; by default the size of what it adds
    called: np.ndarray | None = None  # (m,) bool, chat-only by the method's own cut; by default all
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
    calls: str = "all it has"


def score_method(method: Method, pairs: TrainedPairs, n_dialogues: int = 64) -> pd.DataFrame:
    """A row for each of the collection's seeds: method, seed, planted_10 ..., behaviours_10 ..., kl_10 ...,
    false_self, false_longer.

    The first `n_dialogues` held-out dialogues are patched. Pairs that the subject does not have are left out, and
    behaviours are NaN where no token is labelled. Raises ValueError for a code that does not fit the candidates.
    """
    return pd.DataFrame([_row(method, pairs, seed, n_dialogues) for seed in pairs.seeds])


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


def _row(method: Method, pairs: TrainedPairs, seed: int, n_dialogues: int) -> dict:
    row = {"method": method.name, "seed": seed}
    for name in ("injected", "chat", *(null for null in NULLS if null in pairs.pairs)):
        found, x = method.fit(pairs, name, seed), pairs.heldout(name).x
        live, order = ranked(found, x)
        if name == "injected":
            row |= _planted(found, order, pairs)
        elif name == "chat":
            row |= _behaviours(found, order, pairs) | _closed(found, order, pairs, n_dialogues)
        else:
            called = np.ones(len(live), bool) if found.called is None else found.called
            row[f"false_{name}"] = called[live].mean() if live.any() else 0.0  # of nothing, nothing is called
    return row


@torch.no_grad()
def ranked(found: Found, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Which candidates fire on pairs x (n, 2, d_model), (m,) bool; and the numbers of those that do, the best first.

    Those without a score are not among the latter. Raises ValueError for a code that does not fit the candidates.
    """
    fired, squares = torch.zeros(2, len(found.directions), dtype=torch.float64)
    for part in x.split(BATCH):
        latents = found.difference.latents(part)
        fired += (latents > 0).sum(0).cpu()
        squares += latents.square().sum(0).cpu()
    live = (fired > 0).numpy()
    size = (squares * found.directions.square().sum(-1).cpu()).numpy()
    scores = np.asarray(size if found.scores is None else found.scores, dtype=float)
    order = np.argsort(-scores, kind="stable")
    return live, order[live[order] & ~np.isnan(scores[order])]


def _planted(found: Found, order: np.ndarray, pairs: TrainedPairs) -> dict:
    truth = pairs.stream("injected")
    match = match_planted(found.directions[order], truth)
    of = match.planted.where(match.kind == "chat-only")
    return {f"planted_{m}": of[:m].nunique() / truth.labels.count("chat-only") for m in TOPS}  # `Plan` plants some


@torch.no_grad()
def _behaviours(found: Found, order: np.ndarray, pairs: TrainedPairs) -> dict:
    heldout, best = pairs.heldout("chat"), torch.from_numpy(order[: max(TOPS)])
    if (heldout.behaviours < 0).all():
        return {f"behaviours_{m}": float("nan") for m in TOPS}
    latents = torch.cat([found.difference.latents(part)[:, best] for part in heldout.x.split(BATCH)])
    wanted = np.isin(list(BEHAVIOURS), planted_behaviours("chat-only"))
    detected = f1_scores(latents, heldout.behaviours, len(BEHAVIOURS))[wanted] > F1  # (behaviours, candidates)
    return {f"behaviours_{m}": detected[:, :m].any(1).mean() for m in TOPS}


def _closed(found: Found, order: np.ndarray, pairs: TrainedPairs, n: int) -> dict:
    """Over all positions that predict an answer, without a bias."""
    conditions = {f"kl_{m}": written(found.difference, order[:m].copy()) for m in TOPS}
    return gap_closed(patch_kl(pairs.pair("chat"), pairs.dialogues()[:n], conditions))[list(conditions)].to_dict()


# ---- what the methods find


def of_crosscoder(crosscoder: Crosscoder) -> Found:
    """Ranked by Delta_norm, which calls chat-only from 0.9 on."""
    delta = delta_norm(crosscoder)
    called = classes(delta) == "chat-only"
    return Found(difference_of(crosscoder), delta.numpy(), called, larger_rows(crosscoder))


def of_sae(sae: SparseAutoencoder, view: str, x: Tensor | None = None) -> Found:
    """An autoencoder of the difference or of chat. With pairs x (n, 2, d_model) to scale on, the latents that base has
    least of come first, and below a ratio of `SAE_SPECIFIC` they are called chat-only."""
    found = Found(difference_of(sae, view))
    if x is None:
        return found
    ratio = sae_table(sae, view, x).nu_activation
    size = ratio.where(ratio.between(*NU_RANGE)).abs().to_numpy()
    return found._replace(scores=-size, called=size < SAE_SPECIFIC)


def of_directions(rows: Tensor, scores: np.ndarray | None = None, called: np.ndarray | None = None) -> Found:
    """Directions (m, d_model) of any length: each is on by as much as chat - base points its way, and writes that."""
    units = F.normalize(rows, dim=-1)

    def encode(x: Tensor) -> Tensor:
        return (view_of(x, "difference") @ units.to(x).T).relu()

    return Found(Difference(encode, units, None, len(units)), scores, called)


# ---- the methods


def dictionaries(
    name: str, kind: str = "BatchTopK", view: str | None = None, scaling: bool = False, **changes
) -> Method:
    """A "ReLU" or "BatchTopK" crosscoder, or an autoencoder of a view, "difference" or "chat"; with `scaling`, Latent
    Scaling chooses among its latents. `changes` are of its cell, by default the plan's at the L0 of L1."""

    def fit(pairs: TrainedPairs, pair: str, seed: int) -> Found:
        x = pairs.heldout(pair).x
        if view and not view_of(x, view).any():  # of a model and itself: there is nothing to train on
            return of_directions(x.new_zeros(1, x.shape[-1]))
        given = (_matched(pairs, pair) if kind == "BatchTopK" else {}) | _short(pairs, pair) | changes
        cells = pairs.cells(kind, kind=Cell if view else CrosscoderCell, **given)
        (made,) = pairs.train(pair, [cell for cell in cells if cell.seed == seed], view).saes.values()
        return of_sae(made, view, x if scaling else None) if view else of_crosscoder(made)

    if view is None:
        return Method(name, fit, "Δ_norm", "Δ_norm ≥ 0.9")
    return Method(name, fit, "|ν|, least first", f"|ν| < {SAE_SPECIFIC}") if scaling else Method(name, fit)


def mean_difference(pairs: TrainedPairs, pair: str, seed: int) -> Found:
    """The mean of chat - base, then the principal components of what is left of it, both ways along each.

    A direction and its opposite together write all that the difference has along it. There is no seed in it.
    """
    n, total, moment = 0, 0.0, 0.0
    for x in ViewedStream(pairs.stream(pair), "difference").batches(min(SAMPLE, pairs.plan.tokens)):
        require_finite(x, "activations of a batch", "check the subject and its dtype")
        n, total, moment = n + len(x), total + x.sum(0).double(), moment + (x.T @ x).double()
    mean = F.normalize(total / n, dim=0)
    left = torch.eye(len(mean)).to(mean) - mean.outer(mean)
    components = torch.linalg.eigh(left @ (moment / n) @ left).eigenvectors.T.flip(0)  # the largest first
    rows = torch.cat([mean[None], torch.stack([components, -components], 1).flatten(0, 1)]).float()
    return of_directions(rows, scores=-np.arange(len(rows)))


STANDARD = [
    dictionaries("L1", "ReLU"),
    dictionaries("BatchTopK"),
    dictionaries("decoupled", decoupled=True),
    dictionaries("diff-SAE", view="difference"),
    dictionaries("diff-SAE + Latent Scaling", view="difference", scaling=True),
    dictionaries("chat-SAE + Latent Scaling", view="chat", scaling=True),
    Method("mean difference", mean_difference, "mean first, then principal components"),
]


def _matched(pairs: TrainedPairs, pair: str) -> dict:
    """What makes BatchTopK as sparse as the L1 crosscoders of the pair, or of "chat" for a model and itself."""
    l1 = pairs.train("chat" if pair == "self" else pair, pairs.cells("ReLU"))
    return {"sparsity": pairs.matched_k(l1.frame.l0.mean())}


def _short(pairs: TrainedPairs, pair: str) -> dict:
    """Rows that start equal stay equal from the first step on: base against itself needs few tokens."""
    return {"tokens": pairs.plan.tokens // SHORT} if pair == "self" else {}
