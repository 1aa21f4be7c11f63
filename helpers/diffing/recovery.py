"""What was found of what was planted: exact on an injected pair, by labels of tokens on a fine-tuned one.

    injected     a row is of planted direction v_i if its cosine with v_i is above a cut
    F1           of "latent j is on" against "this token has the label"   2 hits / (tokens on + tokens of the label)
    AUROC        share of pairs (token of the label, other token) in which the latent is higher on the first, ties half

A method that calls some latents chat-only is then right or wrong about each:

    precision    of the latents that it calls chat-only, the share that are
    recall       of what is chat's alone, the share that at least one of these latents is about

A planted direction is chat's alone if its exact Delta_norm (`InjectedPair.delta`) is in the class chat-only, as rho of
0 and of 0.1 are: what a rule by norm should call so if it made no mistake.

The best of 1,024 latents looks good by luck. So the latent and its cut are chosen on one half of the dialogues, and
scored on the other. Every other token is a token of the same kind: decisions are told from decisions, tokens of answers
from tokens of answers. A latent that is on wherever an answer begins would else pass as a detector of each behaviour.

Codes are (tokens, n_latents), at least zero, dense or sparse; labels (tokens,), -1 for none.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.activations.injected import InjectedPair
from helpers.base.checks import require_finite
from helpers.dictionaries.autoencoders import SparseAutoencoder
from helpers.dictionaries.crosscoders import Crosscoder
from helpers.diffing.norms import classes

F1 = 0.3  # a latent with a higher one detects a behaviour
COSINE = 0.7  # two random directions in 256 dimensions stay below 0.25


class Score(NamedTuple):
    precision: float  # nan if nothing was called chat-only
    recall: float  # nan if nothing is chat's alone


# ---- planted directions


def planted_of(crosscoder: Crosscoder, pair: InjectedPair, cosine: float = COSINE) -> pd.DataFrame:
    """`match_planted` of each latent's larger decoder row."""
    return match_planted(larger_rows(crosscoder), pair, cosine)


def match_planted(rows: Tensor, pair: InjectedPair, cosine: float = COSINE) -> pd.DataFrame:
    """A row for each of `rows` (m, d_model): the planted direction it is of (-1 for none), its kind and rho, and the
    cosine."""
    require_finite(rows, "directions", "check the dictionary's weights")
    nearest, index = (each.cpu() for each in (F.normalize(rows, dim=-1) @ pair.directions.T).max(1))
    found = (nearest > cosine).numpy()
    kinds = np.where(found, np.array(pair.labels, dtype=object)[index.numpy()], "background")
    rho = np.where(found, pair.rho[index].numpy(), np.nan)
    return pd.DataFrame(
        {"planted": np.where(found, index.numpy(), -1), "kind": kinds, "rho": rho, "match": nearest.numpy()}
    )


def larger_rows(crosscoder: Crosscoder) -> Tensor:
    """The longer of the two decoder rows of each latent, chat's if they are equal: (n_latents, d_model)."""
    base, chat = crosscoder.decoders.detach()
    return torch.where((chat.norm(dim=-1) >= base.norm(dim=-1)).unsqueeze(-1), chat, base)


def score_planted(called: np.ndarray, planted: np.ndarray, delta: Tensor) -> Score:
    """Of latents called chat-only, (n_latents,) bool, against the directions that are.

    `planted` (n_latents,): the direction that each is of, as `planted_of` gives it; `delta`: the exact Delta_norm of
    each planted direction.
    """
    chats = np.append(classes(delta) == "chat-only", False)  # the last for -1, none
    right = called & chats[planted]
    return Score(_share(right.sum(), called.sum()), _share(len(set(planted[right])), chats.sum()))


def directions(dictionary: SparseAutoencoder) -> Tensor:
    """Directions that a dictionary's latents stand for, (m, d_model): a crosscoder's are of base, of chat and of their
    difference, which points back where base alone has the direction; an autoencoder's are its decoder rows."""
    if not isinstance(dictionary, Crosscoder):
        return dictionary.W_dec.detach()
    base, chat = dictionary.decoders.detach()
    return torch.cat([base, chat, chat - base, base - chat])


def recalls(rows: Tensor, pair: InjectedPair, cosine: float = COSINE) -> pd.Series:
    """Share of the planted directions of each kind that one of some rows (m, d_model) points along; and of those that
    are one model's alone, "exclusive"."""
    require_finite(rows, "directions", "check the dictionary's weights")
    near = F.normalize(rows, dim=-1) @ pair.directions.T
    nearest = torch.cat([near, near.new_full((1, near.shape[1]), -1.0)]).amax(0).cpu()  # of no rows, none
    found = pd.Series((nearest > cosine).numpy(), index=pair.labels).astype(float)
    alone = found[found.index.isin(["chat-only", "base-only"])].mean()
    return pd.concat([found.groupby(level=0, sort=False).mean(), pd.Series({"exclusive": alone})])


# ---- labels of tokens


def f1_scores(codes: Tensor | np.ndarray | scipy.sparse.sparray, labels: np.ndarray, n_labels: int) -> np.ndarray:
    """F1 of each latent, on where above zero, as a detector of each label, (n_labels, n_latents); 0 where a label never
    occurs."""
    codes = scipy.sparse.csr_array(codes.cpu().numpy() if isinstance(codes, Tensor) else codes)
    _require_finite(codes)
    _check(codes, labels, n_labels)
    on = (codes > 0).astype(np.float64)
    labelled = scipy.sparse.csr_array(labels[:, None] == np.arange(n_labels)).astype(np.float64)
    hits = (labelled.T @ on).toarray()
    return 2 * hits / np.maximum(on.sum(0) + labelled.sum(0)[:, None], 1)


def score_behaviours(called: np.ndarray, about: np.ndarray, f1: np.ndarray, wanted: np.ndarray) -> Score:
    """Of latents called chat-only, (n_latents,) bool, against behaviours that are: wanted (n_labels,) bool.

    A latent is about the behaviour that it detects best, `about` (n_latents,), if its F1 for that is above `F1`.
    """
    right = called & (f1 > F1) & wanted[about]
    return Score(_share(right.sum(), called.sum()), _share(len(set(about[right])), wanted.sum()))


def auroc_scores(codes: scipy.sparse.sparray | np.ndarray, labels: np.ndarray, n_labels: int) -> np.ndarray:
    """AUROC of each latent for each label, (n_labels, n_latents); NaN where no token or every token has the label.

    labels (tokens,), -1 for none. Exact, in one sort of what is above zero: zeros share one rank.
    """
    columns = _columns(codes)
    _check(columns, labels, n_labels)
    n, m = columns.shape
    latents = _latents(columns)
    zeros = n - np.diff(columns.indptr)
    ranks = (
        pd.Series(columns.data).groupby(latents).rank().to_numpy() + zeros[latents]
    )  # among all tokens of its latent
    label = labels[columns.indices].astype(np.int64)
    flat = (label * m + latents)[label >= 0]
    sums = np.bincount(flat, ranks[label >= 0], n_labels * m).reshape(n_labels, m)
    above = np.bincount(flat, minlength=n_labels * m).reshape(n_labels, m)
    there = np.bincount(labels[labels >= 0], minlength=n_labels)[:, None]
    sums = sums + (there - above) * (zeros + 1) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums - there * (there + 1) / 2) / (there * (n - there))


def cut_scores(
    codes: scipy.sparse.sparray | np.ndarray, labels: np.ndarray, n_labels: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best F1 of each latent for each label, and the cut from which upwards it counts as on: (n_labels, n_latents).

    A latent that never fires, and a label that no token has, give 0 and an infinite cut.
    """
    columns = _columns(codes)
    _check(columns, labels, n_labels)
    m, latents = columns.shape[1], _latents(columns)
    order = np.lexsort((-columns.data, latents))
    values, label, latents = columns.data[order], labels[columns.indices[order]], latents[order]
    on = np.arange(len(values)) - columns.indptr[latents] + 1  # tokens from this one upwards
    last = np.r_[(np.diff(values) != 0) | (np.diff(latents) != 0), True][: len(values)]  # of those of one value
    alive = np.flatnonzero(np.diff(columns.indptr))
    best, cuts = np.zeros((n_labels, m)), np.full((n_labels, m), np.inf)
    for i, there in enumerate(np.bincount(labels[labels >= 0], minlength=n_labels)):
        if not there or not alive.size:
            continue
        hits = np.cumsum(np.r_[0, label == i])
        hits = hits[1:] - hits[columns.indptr[latents]]
        f1 = np.where(last, 2 * hits / (on + there), 0.0)
        best[i, alive] = np.maximum.reduceat(f1, columns.indptr[alive])
        places = np.flatnonzero((f1 == best[i, latents]) & (f1 > 0))[::-1]  # the first of equals is written last
        cuts[i, latents[places]] = values[places]
    return best, cuts


def behaviour_table(
    codes: scipy.sparse.csr_array,
    labels: np.ndarray,
    first: np.ndarray,
    names: Sequence[str],
    among: np.ndarray | bool = True,
) -> pd.DataFrame:
    """The best latent for each label, chosen where `first` (tokens,) bool is true and scored where it is not.

    Only tokens that have a label count, as this or as another. `among`: latents to choose from, (n_latents,) bool, or
    (n_labels, n_latents) for each label its own. Columns: behaviour, n (its tokens in the half that scores); by AUROC
    latent, auroc, auroc_chosen (on the half that chose); by F1 f1_latent, cut, f1, f1_chosen. A label that is missing
    in a half has NaN, and -1 for its latents.
    """
    halves = [(codes[some], labels[some]) for some in (first & (labels >= 0), ~first & (labels >= 0))]
    (codes_a, labels_a), (codes_b, labels_b) = halves
    n, rows = len(names), np.arange(len(names))
    counts = np.stack([np.bincount(each, minlength=n) for each in (labels_a, labels_b)])
    usable = ((counts > 0) & (counts < counts.sum(1, keepdims=True))).all(0)
    aurocs, (f1s, cuts) = auroc_scores(codes_a, labels_a, n), cut_scores(codes_a, labels_a, n)
    allowed = np.broadcast_to(among, aurocs.shape)
    latent, f1_latent = (np.where(allowed, np.nan_to_num(s), -1).argmax(1) for s in (aurocs, f1s))
    cut = cuts[rows, f1_latent]
    on = codes_b[:, f1_latent].toarray() >= cut
    scores = {
        "auroc": auroc_scores(codes_b[:, latent], labels_b, n)[rows, rows],
        "auroc_chosen": aurocs[rows, latent],
        "f1": f1_scores(on, labels_b, n)[rows, rows],
        "f1_chosen": f1s[rows, f1_latent],
        "cut": cut,
    }
    table = {"behaviour": list(names), "n": counts[1]}
    table |= {"latent": np.where(usable, latent, -1), "f1_latent": np.where(usable, f1_latent, -1)}
    return pd.DataFrame(table | {name: np.where(usable, each, np.nan) for name, each in scores.items()})


def heldout_f1(codes: scipy.sparse.csr_array, labels: np.ndarray, first: np.ndarray, n_labels: int) -> np.ndarray:
    """F1 of each latent for each label where `first` (tokens,) bool is false, on from the cut upwards that is best
    where it is true: (n_labels, n_latents). Only tokens that have a label count, as in `behaviour_table`."""
    (codes_a, labels_a), (codes_b, labels_b) = (
        (codes[some], labels[some]) for some in (first & (labels >= 0), ~first & (labels >= 0))
    )
    cuts, other = cut_scores(codes_a, labels_a, n_labels)[1], codes_b.toarray()
    return np.stack([f1_scores(other >= cuts[i], labels_b, n_labels)[i] for i in range(n_labels)])


def detection_scores(
    codes: scipy.sparse.csr_array, labellings: Mapping[str, np.ndarray], first: np.ndarray
) -> pd.DataFrame:
    """How well the label that fits a latent best says when it is on: a row for each latent, labelling, label, f1.

    The label is chosen where `first` (tokens,) bool is true, of all `labellings` (tokens,), -1 for none; f1 is that of
    the other tokens. All tokens count. A latent that is off in the half that chooses has f1 NaN.
    """
    on = scipy.sparse.csr_array(codes > 0)
    names, scores = [], []
    for name, labels in labellings.items():
        n = max(labels.max(initial=-1) + 1, 1)
        names += [(name, label) for label in range(n)]
        scores.append([f1_scores(on[some], labels[some], n) for some in (first, ~first)])
    chosen, other = (np.concatenate([pair[half] for pair in scores]) for half in (0, 1))
    best = chosen.argmax(0)
    f1 = np.where(on[first].sum(0) > 0, other[best, np.arange(other.shape[1])], np.nan)
    return pd.DataFrame([names[i] for i in best], columns=["labelling", "label"]).assign(f1=f1)


def rank_of(scores: np.ndarray | pd.Series, latent: int, alive: np.ndarray | None = None) -> float:
    """Place of a latent when all are ordered by score, the highest first and as the first: 1, 2, ...

    Equal scores share the mean of their places. Latents without a score, or not in `alive` (bool), are left out; a
    latent that is left out has no rank (NaN).
    """
    scores = pd.Series(np.asarray(scores, dtype=np.float64))
    ranks = scores.where(np.isfinite(scores) & (True if alive is None else alive)).rank(ascending=False)
    return float(ranks[latent]) if latent >= 0 else float("nan")


def _check(codes: scipy.sparse.sparray, labels: np.ndarray, n_labels: int) -> None:
    if len(labels) != codes.shape[0] or labels.max(initial=-1) >= n_labels:
        have, most = f"{len(labels)} labels", labels.max(initial=-1)
        raise ValueError(f"{have} up to {most} for {codes.shape[0]} tokens: one each is expected, below {n_labels}")


def _require_finite(codes: scipy.sparse.sparray) -> None:
    if not np.isfinite(codes.data).all():
        raise ValueError("codes are NaN or infinite: check the activations and the dictionary's weights")


def _columns(codes: scipy.sparse.sparray | np.ndarray) -> scipy.sparse.csc_array:
    columns = scipy.sparse.csc_array(codes)
    columns.eliminate_zeros()
    _require_finite(columns)
    if columns.nnz and not columns.data.min() > 0:
        raise ValueError("codes are at least zero: shift what may be negative, as `along` does")
    return columns


def _latents(columns: scipy.sparse.csc_array) -> np.ndarray:
    """Of each entry, (nnz,)."""
    return np.repeat(np.arange(columns.shape[1]), np.diff(columns.indptr))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
