"""How much of the gap between base and chat does a patch close, and which latents to try.

    KL         mean over positions, of the first nine or of all                   of `patching.patch_kl`
    recovered  1 - KL(patched) / KL(None)                                         1: nothing is left of the gap

Intervals hold 95 % of resamplings of whole dialogues, as positions of one dialogue are not independent (the paper's,
1.96 sd / sqrt(positions), count them as if they were). All conditions are resampled together, so that a difference of
two of them has an interval of its own, and a narrow one.

Which latents: of some candidates the best half by a score and the worst, or random halves. Delta_norm is a score, and
so are the ranks of both ratios of Latent Scaling added up, the lowest best.

Source: Minder, Dumas et al. 2025, section 4, and their released code; section 2.6 of the facts.

The whole experiment on one dictionary of a pair has these conditions:

    All, Error               every latent, and what they miss                                 of `patching`
    best by Δ, worst by Δ    halves of the latents with the largest Delta_norm, by it
    best by ν, worst by ν    halves of the same latents, by both ratios of Latent Scaling
    random, other random     halves of the same latents, by chance
    bias alone               no latent

Dictionaries of other kinds are compared on what they are all about: the difference chat - base that they rebuild.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from helpers.diffing.latent_scaling import NU_RANGE, rank_sum
from helpers.diffing.patching import NONE, Condition, Difference, Patched, error, patch_kl, written
from helpers.subjects.pair import SubjectPair
from helpers.text.turns import Encoded

POSITIONS = ("first nine", "full")
TAILS = (0.025, 0.975)  # of a 95 % interval


def effects(patched: Patched, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """A row for each condition and kind of positions: condition, positions, n of them, dialogues, kl, recovered.

    kl (nats a position) and recovered (a share) have `_low` and `_high`, over dialogues. Raises ValueError for fewer
    than two dialogues with such positions.
    """
    rows = []
    for positions in POSITIONS:
        sums, counts = _by_dialogue(patched, positions)
        means = _resampled(sums, counts, draws, seed)  # (1 + draws, conditions)
        shares = 1 - means / means[:, [sums.columns.get_loc(NONE)]]
        for i, condition in enumerate(sums.columns):
            row = {"condition": condition, "positions": positions, "n": counts.sum(), "dialogues": len(counts)}
            rows.append(row | _with_ends("kl", means[:, i]) | _with_ends("recovered", shares[:, i]))
    return pd.DataFrame(rows)


def candidates(table: pd.DataFrame, n: int | None = None) -> pd.DataFrame:
    """Rows of a `latent_table` to be halved: the n largest Delta_norm, or the class chat-only where n is None.

    Those that never fire, or with a ratio missing or outside -0.1 ... 2, are left out. Raises ValueError if fewer than
    two are left.
    """
    some = table[table["class"] == "chat-only"] if n is None else table.nlargest(n, "delta")
    ratios = some[["nu_error", "nu_reconstruction"]]
    usable = some[((ratios >= NU_RANGE[0]) & (ratios <= NU_RANGE[1])).all(axis=1) & (some.rate > 0)]
    if len(usable) < 2:
        raise ValueError(f"{len(usable)} of {len(some)} latents can be halved: give n, or train a larger dictionary")
    return usable


def halves(scores: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Latents, the index of `scores`, with the highest half of them and with the lowest; of an odd number the middle
    one goes. Raises ValueError for fewer than two, and for missing scores."""
    if len(scores) < 2 or scores.isna().any():
        raise ValueError(f"{scores.notna().sum()} of {len(scores)} latents have a score: halves need all, and two")
    in_order = scores.sort_values(ascending=False, kind="stable").index.to_numpy()
    return in_order[: len(scores) // 2], in_order[-(len(scores) // 2) :]


def random_halves(latents: pd.Index | np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two random halves of some latents. Raises ValueError for fewer than two."""
    return halves(pd.Series(np.random.default_rng(seed).random(len(latents)), index=latents))


def _by_dialogue(patched: Patched, positions: str) -> tuple[pd.DataFrame, np.ndarray]:
    """Summed KL of each dialogue, (dialogues, conditions), and the number of its positions, (dialogues,)."""
    chosen = patched.positions.first_nine if positions == "first nine" else patched.positions.order >= 0
    groups = patched.kl[chosen].astype(float).groupby(patched.positions.dialogue[chosen])
    sums, counts = groups.sum(), groups.size().to_numpy()
    if len(counts) < 2:
        raise ValueError(f"{len(counts)} dialogue(s) have {positions} positions: an interval needs two at least")
    return sums, counts


def _resampled(sums: pd.DataFrame, counts: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Means over positions of all dialogues, and then of each resampling of them: (1 + draws, conditions)."""
    n = len(counts)
    times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    times = np.concatenate([np.ones((1, n), dtype=times.dtype), times])
    return times @ sums.to_numpy() / (times @ counts)[:, None]


def _with_ends(name: str, means: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(means[1:], TAILS)
    return {name: means[0], f"{name}_low": low, f"{name}_high": high}


BIAS = {False: "without", True: "with"}  # the difference of the decoder biases
BESIDE = "\n"  # between the parts of a case's name, which hold no line break


def sets_of(table: pd.DataFrame, n: int, seed: int = 0) -> dict[str, np.ndarray]:
    """The halves above, of the n latents of a `latent_table` with the largest Delta_norm: name -> latents."""
    some = candidates(table, n)
    both = (*halves(some.delta), *halves(rank_sum(some)), *random_halves(some.index, seed))
    names = ("best by Δ", "worst by Δ", "best by ν", "worst by ν", "random", "other random")
    return dict(zip(names, both, strict=True))


def cases(difference: Difference, sets: Mapping[str, np.ndarray]) -> dict[tuple[str, str], Condition]:
    """(condition, "with" or "without" the bias) -> condition: All, Error, each of `sets`, and the bias alone."""
    found = {}
    for bias, name in BIAS.items():
        found["All", name] = written(difference, bias=bias)
        found |= {(each, name): written(difference, latents, bias) for each, latents in sets.items()}
        found["Error", name] = error(difference, bias)
    return found | {("bias alone", BIAS[True]): written(difference, [], bias=True)}


def nested(
    difference: Difference, order: Sequence[int], sizes: Sequence[int], bias: bool = False
) -> dict[int, Condition]:
    """How many latents -> the condition that writes so many, the first of `order`. Raises ValueError for too many."""
    if max(sizes) > len(order):
        raise ValueError(f"there are {len(order)} latents in this order, {max(sizes)} were asked for")
    return {size: written(difference, order[:size], bias) for size in sizes}


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
    joined = {BESIDE.join(map(str, key)): condition for key, condition in cases.items()}
    keys = dict(zip(joined, cases, strict=True)) | {NONE: (NONE,) * len(names)}
    found = effects(patch_kl(pair, dialogues, joined), draws)
    parts = pd.DataFrame([keys[name] for name in found.condition], columns=list(names))
    return pd.concat([parts, found.drop(columns="condition")], axis=1)


@torch.no_grad()
def explained(difference: Difference, x: Tensor, batch: int = 4096) -> float:
    """Share of the variance of chat - base that a dictionary rebuilds, with its bias where it has one: x (n, 2, d)."""
    bias = 0.0 if difference.bias is None else difference.bias
    rebuilt = torch.cat([difference.encode(part) @ difference.rows + bias for part in x.split(batch)])
    wanted = x[:, 1] - x[:, 0]
    return 1 - ((wanted - rebuilt).square().sum() / (wanted - wanted.mean(0)).square().sum()).item()
