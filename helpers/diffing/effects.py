"""How much of the gap between base and chat does a patch close, and which latents to try.

    KL         mean over positions, of the first nine or of all                   of `patching.patch_kl`
    recovered  1 - KL(patched) / KL(None)                                         1: nothing is left of the gap

Intervals hold 95 % of resamplings of whole dialogues, as positions of one dialogue are not independent (the paper's,
1.96 sd / sqrt(positions), count them as if they were). All conditions are resampled together, so that a difference of
two of them has an interval of its own, and a narrow one.

The whole experiment on one dictionary of a pair has these conditions:

    All, Error               every latent, and what they miss                                 of `patching`
    best by Δ, worst by Δ    halves of the latents with the largest Delta_norm, by it
    best by ν, worst by ν    halves of the same latents, by both ratios of Latent Scaling
    random, other random     halves of the same latents, by chance
    bias alone               no latent

Dictionaries of other kinds are compared on what they are all about: the difference chat - base that they rebuild.

Source: Minder, Dumas et al. 2025, section 4, and their released code; section 2.6 of the facts.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from helpers.base.stats import recovered, resampled_columns
from helpers.dictionaries.quality import nmse
from helpers.diffing.latent_scaling import NU_RANGE, rank_sum
from helpers.diffing.patching import NONE, Condition, Difference, Patched, error, patch_kl, written
from helpers.subjects.pair import SubjectPair
from helpers.text.turns import Encoded

POSITIONS = ("first nine", "full")
BIAS = {False: "without", True: "with"}  # the difference of the decoder biases


def gap_closed(patched: Patched) -> pd.Series:
    """The share of the gap that each condition closes over all positions, by its name; NaN where there is no gap."""
    kl = patched.kl.astype(float).mean()
    return pd.Series(recovered(torch.tensor(kl.to_numpy()), torch.tensor(kl[NONE])).numpy(), kl.index)


def effects(patched: Patched, draws: int = 500) -> pd.DataFrame:
    """A row for each condition and kind of positions: condition, positions, n of them, dialogues, kl, recovered.

    kl (nats a position) and recovered (a share, NaN where there is no gap) have `_low` and `_high`, over dialogues, but
    for no `draws`. Raises ValueError for fewer than two dialogues with such positions.
    """
    tables = []
    for positions in POSITIONS:
        sums, counts = _by_dialogue(patched, positions)
        means = _resampled(sums, counts, draws)  # (conditions, 1 + draws)
        shares = recovered(means, means[sums.columns.get_loc(NONE)])
        about = {"condition": sums.columns, "positions": positions, "n": counts.sum(), "dialogues": len(counts)}
        measured = resampled_columns("kl", means) | resampled_columns("recovered", shares)
        tables.append(pd.DataFrame(about | measured))
    return pd.concat(tables, ignore_index=True)


def measured(
    pair: SubjectPair,
    dialogues: Sequence[Encoded],
    cases: Mapping[tuple, Condition],
    names: Sequence[str],
    draws: int = 500,
) -> pd.DataFrame:
    """The rows of `effects`, with a column for each part of a case's key in place of `condition`.

    The first row of each kind of positions is that of None, in all of these columns. Raises ValueError for keys that
    have not as many parts as there are names.
    """
    if wrong := [key for key in cases if len(key) != len(names)]:
        raise ValueError(f"the case {wrong[0]} has not the parts {', '.join(names)}: give each part its name")
    keys = {", ".join(map(str, key)): key for key in cases}
    found = effects(patch_kl(pair, dialogues, {name: cases[key] for name, key in keys.items()}), draws)
    keys[NONE] = (NONE,) * len(names)
    parts = pd.DataFrame([keys[name] for name in found.condition], columns=list(names))
    return pd.concat([parts, found.drop(columns="condition")], axis=1)


def cases(difference: Difference, sets: Mapping[str, np.ndarray]) -> dict[tuple[str, str], Condition]:
    """(condition, "with" or "without" the bias) -> condition: All, Error, each of `sets`, and the bias alone."""
    found = {}
    for bias, name in BIAS.items():
        found["All", name] = written(difference, bias=bias)
        found |= {(each, name): written(difference, latents, bias) for each, latents in sets.items()}
        found["Error", name] = error(difference, bias)
    return found | {("bias alone", BIAS[True]): written(difference, [], bias=True)}


def sets_of(table: pd.DataFrame, n: int, seed: int = 0) -> dict[str, np.ndarray]:
    """The halves above, of the n latents of a `latent_table` with the largest Delta_norm: name -> latents.

    Those that never fire, or with a ratio missing or outside -0.1 ... 2, are left out first. Raises ValueError if fewer
    than two are left.
    """
    some = table.nlargest(n, "delta")
    usable = some[["nu_error", "nu_reconstruction"]].apply(lambda ratio: ratio.between(*NU_RANGE)).all(axis=1)
    some = some[usable & (some.rate > 0)]
    chance = pd.Series(np.random.default_rng(seed).random(len(some)), index=some.index)
    both = (*halves(some.delta), *halves(rank_sum(some)), *halves(chance))
    names = ("best by Δ", "worst by Δ", "best by ν", "worst by ν", "random", "other random")
    return dict(zip(names, both, strict=True))


def halves(scores: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Latents, the index of `scores`, with the highest half of them and with the lowest; of an odd number the middle
    one goes. Raises ValueError for fewer than two."""
    if len(scores) < 2:
        raise ValueError(f"{len(scores)} latent(s) can be halved: take more of them, or train a larger dictionary")
    in_order = scores.sort_values(ascending=False, kind="stable").index.to_numpy()
    return in_order[: len(scores) // 2], in_order[-(len(scores) // 2) :]


@torch.no_grad()
def explained(difference: Difference, x: Tensor, batch: int = 4096) -> float:
    """Share of the variance of chat - base that a dictionary rebuilds, with its bias where it has one: x (n, 2, d).

    Raises ValueError for x that is not finite, and for a difference without variance, as of a model and itself.
    """
    bias = 0.0 if difference.bias is None else difference.bias
    rebuilt = torch.cat([difference.encode(part) @ difference.rows + bias for part in x.split(batch)])
    return 1 - nmse(x[:, 1] - x[:, 0], rebuilt)


def _by_dialogue(patched: Patched, positions: str) -> tuple[pd.DataFrame, np.ndarray]:
    """Summed KL of each dialogue, (dialogues, conditions), and the number of its positions, (dialogues,)."""
    chosen = patched.positions.first_nine if positions == "first nine" else patched.positions.order >= 0
    groups = patched.kl[chosen].astype(float).groupby(patched.positions.dialogue[chosen])
    sums, counts = groups.sum(), groups.size().to_numpy()
    if len(counts) < 2:
        raise ValueError(f"{len(counts)} dialogue(s) have {positions} positions: an interval needs two at least")
    return sums, counts


def _resampled(sums: pd.DataFrame, counts: np.ndarray, draws: int) -> Tensor:
    """Means over positions of all dialogues, and then of each resampling of them: (conditions, 1 + draws)."""
    n = len(counts)
    times = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=draws)
    times = np.concatenate([np.ones((1, n), dtype=times.dtype), times])
    return torch.from_numpy((times @ sums.to_numpy() / (times @ counts)[:, None]).T)
