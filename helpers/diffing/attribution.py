"""Which latents change what the chat model says: every latent at once by gradients, or one token's one by one.

    share of latent j    a_j = - mean over positions of  f_j d_j . integral of dKL/dh from base to base + all latents
    removal              KL( chat || chat without f_j d_j ) at one position

The shares add up to KL(None) - KL(All), so that a ranking by them says how much is left for the others. The integral is
a mean over `steps` points of the straight path. Removal is a measurement, one run of the upper blocks for each latent
that is on up to the token; it finds behavioural latents from a token on which the models disagree.

Sources: Sundararajan et al. 2017 (integrated gradients); Aranguri, Drori and Nanda 2025 (from a token to its latents).
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from helpers.diffing.patching import BATCH, NONE, Difference, Patched, Site, patch_kl
from helpers.subjects.pair import SubjectPair
from helpers.text.turns import Encoded, Rows, answer_order, rows_of

REMOVED = 32  # latents taken out side by side
TRIED = 2  # decisions of each behaviour
FIRST = 5  # latents that a reader would look at


def shares(
    pair: SubjectPair,
    dialogues: Sequence[Encoded],
    difference: Difference,
    steps: int = 8,
) -> Tensor:
    """Nats a position that each latent takes off the KL, (n_latents,) float64, over all positions that predict an
    answer; as `patch_kl` without the bias. Raises ValueError for fewer than one step."""
    if steps < 1:
        raise ValueError(f"an integral of {steps} points is none: choose steps >= 1")
    total, positions = torch.zeros(len(difference.rows), dtype=torch.float64), 0
    for rows in tqdm(list(rows_of(dialogues, pair.context, BATCH)), "shares", unit="batch", delay=2, leave=False):
        site = Site(pair, rows)
        slope = _mean_slope(pair, site, difference, steps)[site.inside]
        code = site.code(difference)
        taken = -torch.linalg.vecdot(slope[code.tokens], difference.rows[code.latents].to(slope)) * code.values
        total.index_add_(0, code.latents.cpu(), taken.double().cpu())
        positions += int((rows.order >= 0).sum())
    return total.view(-1, difference.n_latents).sum(0) / positions


def hardest(patched: Patched, dialogues: Sequence[Encoded], behaviours: Sequence[int], n: int) -> pd.DataFrame:
    """The n decisions for each behaviour on which base is furthest from chat, of different dialogues: behaviour,
    dialogue, position, kl.

    A later token of an answer is one of wording: which behaviour it is of was decided before. `dialogues` are those of
    `patch_kl`. Behaviours that no answer shows are left out.
    """
    places = zip(patched.positions.dialogue, patched.positions.position, strict=True)
    shown = [int(dialogues[dialogue].decisions[position]) for dialogue, position in places]
    rows = patched.positions[["dialogue", "position"]].assign(behaviour=shown, kl=patched.kl[NONE])
    rows = rows[rows.behaviour.isin(behaviours)].sort_values("kl", ascending=False, kind="stable")
    first = rows.groupby(["behaviour", "dialogue"], sort=False).head(1).groupby("behaviour", sort=False).head(n)
    return first.sort_values("behaviour", kind="stable").reset_index(drop=True)


@torch.no_grad()
def removal(pair: SubjectPair, dialogue: Encoded, position: int, difference: Difference) -> pd.Series:
    """KL at one position if a latent is taken out of chat everywhere, in nats: a value for each latent that is on up to
    there, the highest first. Raises ValueError for a position that predicts no answer.
    """
    if not 0 <= position < len(dialogue.tokens) or answer_order(dialogue.roles)[position] < 0:
        raise ValueError(f"position {position} predicts no answer: choose one of `patch_kl`'s")
    [rows] = rows_of([dialogue], pair.context, 1)
    site = Site(pair, _up_to(rows, position))
    latents = (site.code(difference).latents % difference.n_latents).unique().tolist()
    log_p = _last(pair, site.chat)
    found = []
    for start in range(0, len(latents), REMOVED):
        some = [difference.kept([j]) for j in latents[start : start + REMOVED]]
        without = torch.cat([site.chat - site.added(difference, kept, False) for kept in some])
        log_q = _last(pair, without)
        found += torch.linalg.vecdot(log_p.exp(), log_p - log_q).tolist()
    order = np.argsort(-np.array(found), kind="stable").astype(int)
    return pd.Series(np.array(found)[order], index=np.array(latents, dtype=int)[order])


COLUMNS = ["behaviour", "kl", "change", "latent", "f1", "first_f1", "best", "active"]  # of `found_by_removal`
COLUMNS += ["random_f1", "random", "random_first"]


def found_by_removal(
    pair: SubjectPair,
    dialogues: Sequence[Encoded],
    difference: Difference,
    f1: np.ndarray,
    behaviours: Sequence[int],
    cut: float,
) -> pd.DataFrame:
    """The latents whose removal changes the prediction most, at the hardest decisions of each behaviour.

    f1: how well each latent detects each label, (n_labels, n_latents). Columns: behaviour, kl, change (KL without the
    first latent), latent, f1 (its, for the behaviour), first_f1 (the best of the first `FIRST`), best (of all latents);
    of the latents on up to there active (how many), random_f1 (their mean), random (share of them above `cut`) and
    random_first (how likely one of `FIRST` drawn from them is above it). Where none is on, the decision drops out.
    Where nothing is left, as in dialogues of the hub, which carry no behaviours, each behaviour has a row of nan.
    """
    rows = []
    for token in hardest(patch_kl(pair, dialogues, {}), dialogues, behaviours, TRIED).itertuples():
        change = removal(pair, dialogues[token.dialogue], token.position, difference)
        own = f1[token.behaviour]
        if len(change):
            on = own[change.index]
            row = {"behaviour": token.behaviour, "kl": token.kl, "change": change.iloc[0], "latent": change.index[0]}
            row |= {"f1": on[0], "first_f1": on[:FIRST].max(), "best": own.max(), "active": len(on)}
            row |= {"random_f1": on.mean(), "random": (on > cut).mean()}
            none = scipy.stats.hypergeom.pmf(0, len(on), (on > cut).sum(), min(FIRST, len(on)))
            rows.append(row | {"random_first": 1 - none})
    return pd.DataFrame(rows or [{"behaviour": b} for b in behaviours], columns=COLUMNS)


def _mean_slope(pair: SubjectPair, site: Site, difference: Difference, steps: int) -> Tensor:
    """Mean of dKL/dh over the path, KL summed over positions: (B, T, d_model)."""
    asked = site.rows.order >= 0
    with torch.no_grad():
        added = site.added(difference, difference.kept(None), bias=False)
        log_p = pair.chat.resume(site.chat, asked).log_softmax(-1)
    slope = torch.zeros_like(site.base)
    for t in (np.arange(steps) + 0.5) / steps:
        h = (site.base + t * added).requires_grad_()
        log_q = pair.chat.resume(h, asked).log_softmax(-1)
        slope += torch.autograd.grad(F.kl_div(log_q, log_p, reduction="sum", log_target=True), h)[0] / steps
    return slope


def _last(pair: SubjectPair, residuals: Tensor) -> Tensor:
    """What chat predicts after the last position, (B, T, d_model) -> (B, n_vocab), in nats."""
    at = torch.zeros(residuals.shape[:2], dtype=torch.bool)
    at[:, -1] = True
    return pair.chat.resume(residuals, at).log_softmax(-1)


def _up_to(rows: Rows, position: int) -> Rows:
    """No later token, as none changes what is predicted there."""
    return rows._replace(**{name: getattr(rows, name)[:, : position + 1] for name in ("tokens", "roles", "order")})
