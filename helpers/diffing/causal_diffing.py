"""The causal experiment on a dictionary of a pair: its conditions by name, the share each recovers, and its rivals.

    All, Error               every latent, and what they miss                                 of `patching`
    best by Δ, worst by Δ    halves of the latents with the largest Delta_norm, by it
    best by ν, worst by ν    halves of the same latents, by both ratios of Latent Scaling     of `effects`
    random, other random     halves of the same latents, by chance
    bias alone               no latent

Dictionaries of other kinds are compared on what they are all about: the difference chat - base that they rebuild, and,
on an injected pair, the planted directions that one of their rows points along.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.activations.injected import InjectedPair
from helpers.dictionaries.autoencoders import SparseAutoencoder
from helpers.dictionaries.crosscoders import Crosscoder
from helpers.diffing.effects import candidates, effects, halves, random_halves, rank_sum
from helpers.diffing.patching import NONE, Condition, Difference, error, patch_kl, written
from helpers.diffing.recovery import COSINE
from helpers.subjects.pair import SubjectPair
from helpers.text.turns import Encoded

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
    """The rows of `patch_effects.effects`, with a column for each part of a case's key in place of `condition`.

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
    nearest = (F.normalize(rows, dim=-1) @ pair.directions.T).amax(0)
    found = pd.Series((nearest > cosine).numpy(), index=pair.labels).astype(float)
    alone = found[found.index.isin(["chat-only", "base-only"])].mean()
    return pd.concat([found.groupby(level=0, sort=False).mean(), pd.Series({"exclusive": alone})])
