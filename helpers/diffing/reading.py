"""What do latents tell about an answer? Labelled dialogues, codes of their tokens, and scores against labels.

    codes      (tokens, n_latents), sparse, at least zero; of a direction, x . d less the least of them
    AUROC      share of pairs (token of the label, other token) in which the latent is higher on the first, ties half
    F1         2 hits / (tokens on + tokens of the label), on from a cut upwards
    template   share of a latent's firings that fall on tokens of the chat template, <bos> left out

The best of 1,024 latents looks good by luck. So the latent and its cut are chosen on one half of the dialogues, and
scored on the other. Every other token is a token of the same kind: decisions are told from decisions, tokens of answers
from tokens of answers. A latent that is on wherever an answer begins would else pass as a detector of each behaviour.

Source: section 2.8 of the facts on Minder, Dumas et al. 2025, for template shares.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse
import torch
from torch import Tensor

from helpers.subjects.pair import SubjectPair
from helpers.text.turns import TEMPLATE, Encoded, rows_of

WHERE = ("decision", "answer")
MEAN, PROBE = "mean difference", "linear probe"  # what knows the labels
MIN_FIRED = 10  # tokens of dialogue: a share of fewer says little
LEANING = 1 / 16  # share of the latents that counts as chat-leaning, as hardly any is chat-only


class Reading(NamedTuple):
    """Activations of labelled dialogues, each without its <bos>, one after the other."""

    x: Tensor  # (tokens, 2, d_model)
    tokens: np.ndarray  # (tokens,) ids
    roles: np.ndarray  # (tokens,) indices into `dialogue_tokens.ROLES`
    behaviours: np.ndarray  # (tokens,) index of the behaviour that an answer's token belongs to, -1 for none
    decisions: np.ndarray  # (tokens,) the same at the last token before the answer
    dialogue: np.ndarray  # (tokens,) which dialogue

    def labels(self, where: str) -> np.ndarray:
        """Behaviours at the "decision" or over the "answer"; raises ValueError for another place."""
        if where not in WHERE:
            raise ValueError(f"behaviours are labelled at the {' and the '.join(WHERE)}, not at {where!r}")
        return self.decisions if where == "decision" else self.behaviours

    @property
    def template(self) -> np.ndarray:
        """(tokens,) bool."""
        return self.roles == TEMPLATE

    @property
    def first(self) -> np.ndarray:
        """(tokens,) bool: every second dialogue, the half to choose on."""
        return self.dialogue % 2 == 0


@torch.no_grad()
def read_dialogues(pair: SubjectPair, dialogues: Sequence[Encoded], batch: int = 32) -> Reading:
    """Both models read each dialogue from its own beginning, so that no prompt is cut off.

    Raises ValueError for no dialogues, or one that is too long or has no answer.
    """
    found: dict[int, Tensor] = {}
    for rows in rows_of(dialogues, pair.context, batch):
        x = pair.residuals(rows.tokens).float().cpu().unflatten(-1, (2, -1))
        found |= {i: x[row, 1 : len(dialogues[i].tokens)].clone() for row, i in enumerate(rows.dialogues)}
    names = ("tokens", "roles", "behaviours", "decisions")
    tokens, roles, behaviours, decisions = (np.concatenate([getattr(d, n)[1:] for d in dialogues]) for n in names)
    dialogue = np.repeat(np.arange(len(dialogues)), [len(d.tokens) - 1 for d in dialogues])
    x = torch.cat([found[i] for i in range(len(dialogues))])
    return Reading(x, tokens, roles, behaviours, decisions, dialogue)


@torch.no_grad()
def sparse_codes(encode: Callable[[Tensor], Tensor], x: Tensor, batch: int = 4096) -> scipy.sparse.csr_array:
    """What `encode` makes of x (tokens, ...), a part at a time: (tokens, n_latents)."""
    return scipy.sparse.vstack([scipy.sparse.csr_array(encode(part).numpy()) for part in x.split(batch)], format="csr")


def along(x: Tensor, directions: Tensor) -> scipy.sparse.csr_array:
    """Codes of directions (m, d_model) that may point either way: x . d, less the least of each, (tokens, m)."""
    heights = (x @ directions.T).numpy()
    return scipy.sparse.csr_array(heights - heights.min(0))


def template_shares(codes: scipy.sparse.sparray, template: np.ndarray) -> np.ndarray:
    """Share of each latent's firings at template tokens, (n_latents,); NaN for those that never fire."""
    on = scipy.sparse.csr_array(codes > 0).astype(np.float64)
    fired = on.sum(0)
    return np.where(fired > 0, (template.astype(np.float64) @ on) / np.maximum(fired, 1), np.nan)


def auroc_scores(codes: scipy.sparse.sparray | np.ndarray, labels: np.ndarray, n_labels: int) -> np.ndarray:
    """AUROC of each latent for each label, (n_labels, n_latents); NaN where no token or every token has the label.

    labels (tokens,), -1 for none. Exact, in one sort of what is above zero: zeros share one rank.
    """
    columns = _columns(codes)
    n, m = columns.shape
    latents = _latents(columns)
    ranks, zeros = _ranks(columns, latents), n - np.diff(columns.indptr)
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
    counts = [np.bincount(each, minlength=n) for each in (labels_a, labels_b)]
    usable = [(count > 0) & (count < count.sum()) for count in counts]
    usable = usable[0] & usable[1]
    aurocs, (f1s, cuts) = auroc_scores(codes_a, labels_a, n), cut_scores(codes_a, labels_a, n)
    allowed = np.broadcast_to(among, aurocs.shape)
    latent, f1_latent = (np.where(allowed, np.nan_to_num(s), -1).argmax(1) for s in (aurocs, f1s))
    cut = cuts[rows, f1_latent]
    on = scipy.sparse.csr_array(codes_b[:, f1_latent].toarray() >= cut)
    scores = {
        "auroc": auroc_scores(codes_b[:, latent], labels_b, n)[rows, rows],
        "auroc_chosen": aurocs[rows, latent],
        "f1": _f1_of_on(on, labels_b, n)[rows, rows],
        "f1_chosen": f1s[rows, f1_latent],
    }
    found = {"latent": latent, "f1_latent": f1_latent}
    found = {name: np.where(usable, each, -1) for name, each in found.items()}
    scores = {name: np.where(usable, each, np.nan) for name, each in (scores | {"cut": cut}).items()}
    return pd.DataFrame({"behaviour": list(names), "n": counts[1]} | found | scores)


def behaviour_rows(
    code: scipy.sparse.csr_array, reading: Reading, names: Sequence[str], among: np.ndarray | bool = True
) -> pd.DataFrame:
    """`behaviour_table` at the decision and over the answer, with a column `place`."""
    tables = [behaviour_table(code, reading.labels(where), reading.first, names, among) for where in WHERE]
    return pd.concat([table.assign(place=where) for table, where in zip(tables, WHERE, strict=True)])


def ceilings(reading: Reading, names: Sequence[str]) -> tuple[pd.DataFrame, dict[tuple[str, str], Tensor]]:
    """`behaviour_rows` of directions in chat that are fitted to the labels, with a column `method`; and the directions
    (n_labels, d_model), by method and place."""
    x, rows, directions = reading.x[:, 1], [], {}
    for where in WHERE:
        labels = reading.labels(where)
        known = np.where(reading.first, labels, -1)
        for method, fit in ((MEAN, mean_differences), (PROBE, linear_probes)):
            directions[method, where] = fit(x, known, len(names))
            code = along(x, directions[method, where])
            table = behaviour_table(code, labels, reading.first, names, np.eye(len(names), dtype=bool))
            rows.append(table.assign(method=method, place=where))
    return pd.concat(rows), directions


def latent_rows(table: pd.DataFrame, code: scipy.sparse.csr_array, reading: Reading) -> pd.DataFrame:
    """The rows of a `latent_table` whose latent fires, with how it fires on dialogues, the largest Delta_norm first.

    Added columns: latent, fired (tokens), share (of tokens), template (share of its firings), detected (F1 of the label
    that fits it best), leaning (among the first sixteenth of the dictionary).
    """
    labellings = {"role": reading.roles, "decision": reading.decisions, "answer": reading.behaviours}
    fired = (code > 0).sum(0)
    table = table.assign(latent=table.index, fired=fired, share=fired / code.shape[0])
    table["template"] = template_shares(code, reading.template)
    table["detected"] = detection_scores(code, labellings, reading.first).f1
    alive = table[(table.rate > 0) & (table.fired >= MIN_FIRED)].sort_values("delta", ascending=False)
    return alive.assign(leaning=np.arange(len(alive)) < LEANING * code.shape[1])


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
        n = max(labels.max() + 1, 1)
        names += [(name, label) for label in range(n)]
        scores.append([_f1_of_on(on[some], labels[some], n) for some in (first, ~first)])
    chosen, other = (np.concatenate([pair[half] for pair in scores]) for half in (0, 1))
    best = chosen.argmax(0)
    f1 = np.where(on[first].sum(0) > 0, other[best, np.arange(other.shape[1])], np.nan)
    return pd.DataFrame([names[i] for i in best], columns=["labelling", "label"]).assign(f1=f1)


def side_by_side(values: np.ndarray, reading: Reading, n: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Values (tokens,) and the tokens themselves, a row for each of the first n dialogues: (n, longest) each.

    The shorter dialogues end in the value 0 and the token -1.
    """
    lengths = np.bincount(reading.dialogue)[:n]
    inside = np.arange(lengths.max()) < lengths[:, None]
    rows, tokens = np.zeros(inside.shape, values.dtype), np.full(inside.shape, -1, np.int64)
    rows[inside], tokens[inside] = values[: lengths.sum()], reading.tokens[: lengths.sum()]
    return rows, tokens


def mean_differences(x: Tensor, labels: np.ndarray, n_labels: int) -> Tensor:
    """Mean of x (tokens, d_model) over each label less its mean over all other labels: (n_labels, d_model).

    Zero for a label that no token has, or every labelled one.
    """
    shares = _one_hot(labels, n_labels)
    x, shares = x[labels >= 0], shares[labels >= 0]
    there, others = shares.sum(0), len(shares) - shares.sum(0)
    sums = shares.T @ x
    known = ((there > 0) & (others > 0)).unsqueeze(1)
    means = sums / there.clamp(min=1).unsqueeze(1) - (x.sum(0) - sums) / others.clamp(min=1).unsqueeze(1)
    return means * known


def linear_probes(x: Tensor, labels: np.ndarray, n_labels: int, ridge: float = 1e-2) -> Tensor:
    """Directions (n_labels, d_model) of least squares for "has this label", on labelled tokens of x (tokens, d_model).

    `ridge` is in units of x's mean variance, so that the scale of x does not matter.
    """
    wanted, x = _one_hot(labels, n_labels)[labels >= 0].double(), x[labels >= 0].double()
    if not len(x):
        return torch.zeros(n_labels, x.shape[1])
    x, wanted = x - x.mean(0), wanted - wanted.mean(0)
    square = x.T @ x / len(x)
    price = ridge * square.diagonal().mean().clamp(min=1e-12) * torch.eye(len(square), dtype=x.dtype)
    return torch.linalg.solve(square + price, x.T @ wanted / len(x)).T.float()


def rank_of(scores: np.ndarray | pd.Series, latent: int, alive: np.ndarray | None = None) -> float:
    """Place of a latent when all are ordered by score, the highest first and as the first: 1, 2, ...

    Equal scores share the mean of their places. Latents without a score, or not in `alive` (bool), are left out; a
    latent that is left out has no rank (NaN).
    """
    scores = np.asarray(scores, dtype=np.float64)
    counted = np.isfinite(scores) if alive is None else np.isfinite(scores) & alive
    if latent < 0 or not counted[latent]:
        return float("nan")
    others = scores[counted]
    return float((others > scores[latent]).sum() + ((others == scores[latent]).sum() + 1) / 2)


def _columns(codes: scipy.sparse.sparray | np.ndarray) -> scipy.sparse.csc_array:
    columns = scipy.sparse.csc_array(codes)
    columns.eliminate_zeros()
    if columns.nnz and not columns.data.min() > 0:
        raise ValueError("codes are at least zero: shift what may be negative, as `along` does")
    return columns


def _latents(columns: scipy.sparse.csc_array) -> np.ndarray:
    """Of each entry, (nnz,)."""
    return np.repeat(np.arange(columns.shape[1]), np.diff(columns.indptr))


def _ranks(columns: scipy.sparse.csc_array, latents: np.ndarray) -> np.ndarray:
    """Rank of each entry among all tokens of its latent, from 1 for the lowest; equals share their mean. (nnz,)"""
    order = np.lexsort((columns.data, latents))
    values, latents = columns.data[order], latents[order]
    new = np.r_[True, (np.diff(values) != 0) | (np.diff(latents) != 0)][: len(values)]
    group = np.cumsum(new) - 1
    zeros = columns.shape[0] - np.diff(columns.indptr)
    places = np.arange(len(values)) - columns.indptr[latents] + 1 + zeros[latents]
    means = np.bincount(group, places) / np.maximum(np.bincount(group), 1)
    ranks = np.empty(len(values))
    ranks[order] = means[group]
    return ranks


def _f1_of_on(on: scipy.sparse.csr_array, labels: np.ndarray, n_labels: int) -> np.ndarray:
    """F1 of "is on" (tokens, n_latents) bool against each label: (n_labels, n_latents)."""
    labelled = scipy.sparse.csr_array(_one_hot(labels, n_labels).numpy())
    on = on.astype(np.float32)
    hits = (labelled.T @ on).toarray()
    return 2 * hits / np.maximum(on.sum(0) + labelled.sum(0)[:, None], 1)


def _one_hot(labels: np.ndarray, n_labels: int) -> Tensor:
    """(tokens, n_labels), all zero for a token without a label."""
    return torch.from_numpy((labels[:, None] == np.arange(n_labels)).astype(np.float32))
