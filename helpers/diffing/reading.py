"""What do latents tell about an answer? Labelled dialogues, the codes of their tokens, and a row for each latent.

    codes      (tokens, n_latents), sparse, at least zero; of a direction, x . d less the least of them
    template   share of a latent's firings that fall on tokens of the chat template, <bos> left out

Scores against labels are those of `recovery`: chosen on one half of the dialogues, measured on the other.

Source: section 2.8 of the facts on Minder, Dumas et al. 2025, for template shares.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import scipy.sparse
import torch
from torch import Tensor

from helpers.base.checks import require_finite
from helpers.dictionaries.pair_collection import WHERE, Heldout
from helpers.diffing.recovery import behaviour_table, detection_scores
from helpers.subjects.pair import SubjectPair
from helpers.text.turns import Encoded, rows_of

MEAN, PROBE = "mean difference", "linear probe"  # what knows the labels
MIN_FIRED = 10  # tokens of dialogue: a share of fewer says little
LEANING = 1 / 16  # share of the latents that counts as chat-leaning, as hardly any is chat-only


@torch.no_grad()
def read_dialogues(pair: SubjectPair, dialogues: Sequence[Encoded], batch: int = 32) -> Heldout:
    """Both models read each dialogue from its own beginning, so that no prompt is cut off.

    Raises ValueError for no dialogues, or one that is too long or has no answer.
    """
    found: dict[int, Tensor] = {}
    for rows in rows_of(dialogues, pair.context, batch):
        x = pair.residuals(rows.tokens).float().unflatten(-1, (2, -1))
        found |= {i: x[row, 1 : len(dialogues[i].tokens)].clone() for row, i in enumerate(rows.dialogues)}
    names = ("tokens", "roles", "behaviours", "decisions")
    tokens, roles, behaviours, decisions = (np.concatenate([getattr(d, n)[1:] for d in dialogues]) for n in names)
    dialogue = np.repeat(np.arange(len(dialogues)), [len(d.tokens) - 1 for d in dialogues])
    x = torch.cat([found[i] for i in range(len(dialogues))])
    return Heldout(x, tokens, roles, behaviours, decisions, dialogue)


@torch.no_grad()
def sparse_codes(encode: Callable[[Tensor], Tensor], x: Tensor, batch: int = 4096) -> scipy.sparse.csr_array:
    """What `encode` makes of x (tokens, ...), a part at a time: (tokens, n_latents).

    Raises ValueError for x that is not finite.
    """
    require_finite(x, "activations", "check the subject and its dtype")
    return scipy.sparse.vstack(
        [scipy.sparse.csr_array(encode(part).cpu().numpy()) for part in x.split(batch)], format="csr"
    )


def along(x: Tensor, directions: Tensor) -> scipy.sparse.csr_array:
    """Codes of directions (m, d_model) that may point either way: x . d, less the least of each, (tokens, m).

    Raises ValueError for no tokens, and for what is not finite.
    """
    if not len(x):
        raise ValueError("there are no tokens to read: pass one or more")
    require_finite(x, "activations", "check the subject and its dtype")
    require_finite(directions, "directions", "check what they were fitted to")
    heights = (x @ directions.T).cpu().numpy()
    return scipy.sparse.csr_array(heights - heights.min(0))


def template_shares(codes: scipy.sparse.sparray, template: np.ndarray) -> np.ndarray:
    """Share of each latent's firings at template tokens, (n_latents,); NaN for those that never fire."""
    on = scipy.sparse.csr_array(codes > 0).astype(np.float64)
    fired = on.sum(0)
    return np.where(fired > 0, (template.astype(np.float64) @ on) / np.maximum(fired, 1), np.nan)


def behaviour_rows(
    code: scipy.sparse.csr_array, reading: Heldout, names: Sequence[str], among: np.ndarray | bool = True
) -> pd.DataFrame:
    """`behaviour_table` at the decision and over the answer, with a column `place`."""
    tables = [behaviour_table(code, reading.labels(where), reading.first, names, among) for where in WHERE]
    return pd.concat([table.assign(place=where) for table, where in zip(tables, WHERE, strict=True)])


def ceilings(reading: Heldout, names: Sequence[str]) -> tuple[pd.DataFrame, dict[tuple[str, str], Tensor]]:
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


def latent_rows(table: pd.DataFrame, code: scipy.sparse.csr_array, reading: Heldout) -> pd.DataFrame:
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


def side_by_side(values: np.ndarray, reading: Heldout, n: int | None = None) -> tuple[np.ndarray, np.ndarray]:
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

    Zero for a label that no token has, or every labelled one. Raises ValueError for x that is not finite.
    """
    require_finite(x, "activations", "check the subject and its dtype")
    shares = _one_hot(labels, n_labels).to(x)
    x, shares = x[labels >= 0], shares[labels >= 0]
    there, others = shares.sum(0), len(shares) - shares.sum(0)
    sums = shares.T @ x
    known = ((there > 0) & (others > 0)).unsqueeze(1)
    means = sums / there.clamp(min=1).unsqueeze(1) - (x.sum(0) - sums) / others.clamp(min=1).unsqueeze(1)
    return means * known


def linear_probes(x: Tensor, labels: np.ndarray, n_labels: int, ridge: float = 1e-2) -> Tensor:
    """Directions (n_labels, d_model) of least squares for "has this label", on labelled tokens of x (tokens, d_model).

    `ridge` is in units of x's mean variance, so that the scale of x does not matter. Raises ValueError for x that is
    not finite.
    """
    require_finite(x, "activations", "check the subject and its dtype")
    wanted, x = _one_hot(labels, n_labels)[labels >= 0].to(x.device, torch.float64), x[labels >= 0].double()
    if not len(x):
        return torch.zeros(n_labels, x.shape[1], device=x.device)
    x, wanted = x - x.mean(0), wanted - wanted.mean(0)
    square = x.T @ x / len(x)
    price = ridge * square.diagonal().mean().clamp(min=1e-12) * torch.eye(len(square)).to(x)
    return torch.linalg.solve(square + price, x.T @ wanted / len(x)).T.float()


def _one_hot(labels: np.ndarray, n_labels: int) -> Tensor:
    """(tokens, n_labels), all zero for a token without a label."""
    return torch.from_numpy((labels[:, None] == np.arange(n_labels)).astype(np.float32))
