"""Four dictionaries of one pair on equal terms: the same tokens, size and sparsity.

    L1 crosscoder          base and chat, one price
    BatchTopK crosscoder   base and chat
    diff-SAE               chat - base
    chat-SAE               chat

All but the first keep k latents on, with the k that matches the L0 of the L1 crosscoder.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse
from torch import Tensor

from helpers.dictionaries.autoencoders import SparseAutoencoder
from helpers.dictionaries.pair_collection import TrainedPairs
from helpers.dictionaries.quality import at_matched_l0
from helpers.dictionaries.sweeps import Cell, Sweep
from helpers.diffing.patching import difference_of
from helpers.diffing.reading import sparse_codes

L1, BATCHTOPK, DIFF, CHAT = DICTIONARIES = ("L1 crosscoder", "BatchTopK crosscoder", "diff-SAE", "chat-SAE")
VIEWS = {DIFF: "difference", CHAT: "chat"}  # what an autoencoder reads of a pair; crosscoders read both models


class OnEqualTerms(NamedTuple):
    saes: dict[tuple[str, int], SparseAutoencoder]  # by method and seed
    quality: pd.DataFrame  # a row for each: pair, method, seed, n_latents, sparsity, l0, nmse, dead


def train_crosscoders(pairs: TrainedPairs, pair: str) -> dict[str, Sweep]:
    """Crosscoders of a pair under "L1", then "BatchTopK" with the k that matches L1's L0."""
    l1 = pairs.train(pair, pairs.cells("ReLU"))
    return {"L1": l1, "BatchTopK": pairs.train(pair, pairs.cells("BatchTopK", pairs.matched_k(l1.frame.l0.mean())))}


def train_on_equal_terms(pairs: TrainedPairs, pair: str) -> OnEqualTerms:
    """All four for each seed."""
    sweeps = dict(zip((L1, BATCHTOPK), train_crosscoders(pairs, pair).values(), strict=True))
    cells = pairs.cells("BatchTopK", pairs.matched_k(sweeps[L1].frame.l0.mean()), kind=Cell)
    sweeps |= {method: pairs.train(pair, cells, view=view) for method, view in VIEWS.items()}
    return together(sweeps, pair)


def together(sweeps: Mapping[str, Sweep], pair: str) -> OnEqualTerms:
    """Sweeps on a pair, by the name of their method, in one."""
    quality = pd.concat([found.frame.assign(method=method, pair=pair) for method, found in sweeps.items()])
    saes = {(method, cell.seed): sae for method, found in sweeps.items() for cell, sae in found.saes.items()}
    return OnEqualTerms(saes, quality[["pair", "method", "seed", "n_latents", "sparsity", "l0", "nmse", "dead"]])


def gain_at_matched_l0(frame: pd.DataFrame, method: str, over: str) -> pd.Series:
    """Variance explained by one method minus that by another at matched L0, a mean over L0 for each seed.

    `frame` has a row for each crosscoder: method, seed, l0, fve. Counted are the L0 of either method that lie in the
    range of both. Raises ValueError for a seed whose methods share no L0.
    """
    return frame.groupby("seed").apply(_gain, method, over, include_groups=False)


def _gain(frame: pd.DataFrame, method: str, over: str) -> float:
    a, b = (frame[frame.method == name] for name in (method, over))
    low, high = max(a.l0.min(), b.l0.min()), min(a.l0.max(), b.l0.max())
    wanted = [l0 for l0 in (*a.l0, *b.l0) if low <= l0 <= high]
    if not wanted:
        raise ValueError(f"{method} and {over} share no L0: widen the prices or the k of either")
    errors = [[at_matched_l0(list(part.l0), list(1 - part.fve), l0) for l0 in wanted] for part in (a, b)]
    return float(np.subtract(errors[1], errors[0]).mean())


def codes_of(method: str, sae: SparseAutoencoder, x: Tensor) -> scipy.sparse.csr_array:
    """The code that a dictionary of this method makes of pairs x (tokens, 2, d_model): (tokens, n_latents)."""
    return sparse_codes(difference_of(sae, VIEWS.get(method)).latents, x)
