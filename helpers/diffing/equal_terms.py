"""Four dictionaries of one pair on equal terms: the same tokens, size and sparsity.

    L1 crosscoder          base and chat, one price
    BatchTopK crosscoder   base and chat
    diff-SAE               chat - base
    chat-SAE               chat

All but the first keep k latents on, with the k that matches the L0 of the L1 crosscoder.
"""

from typing import NamedTuple

import pandas as pd
import scipy.sparse
from torch import Tensor

from helpers.activations.views import view_of
from helpers.dictionaries.autoencoders import SparseAutoencoder
from helpers.dictionaries.pair_collection import TrainedPairs
from helpers.dictionaries.sweeps import Cell
from helpers.diffing.reading import sparse_codes

L1, BATCHTOPK, DIFF, CHAT = DICTIONARIES = ("L1 crosscoder", "BatchTopK crosscoder", "diff-SAE", "chat-SAE")
VIEWS = {DIFF: "difference", CHAT: "chat"}  # what an autoencoder reads of a pair; crosscoders read both models


class OnEqualTerms(NamedTuple):
    saes: dict[tuple[str, int], SparseAutoencoder]  # by method and seed
    quality: pd.DataFrame  # a row for each: pair, method, seed, n_latents, sparsity, l0, nmse, dead


def train_on_equal_terms(pairs: TrainedPairs, pair: str, **changes) -> OnEqualTerms:
    """All four for each seed; `changes` to their cells are for all but the L1 crosscoder's."""
    sweeps = {L1: pairs.train(pair, pairs.cells("ReLU"))}
    k = pairs.matched_k(sweeps[L1].frame.l0.mean())
    sweeps[BATCHTOPK] = pairs.train(pair, pairs.cells("BatchTopK", k, **changes))
    for method, view in VIEWS.items():
        sweeps[method] = pairs.train(pair, pairs.cells("BatchTopK", k, kind=Cell, **changes), view=view)
    quality = pd.concat([found.frame.assign(method=method, pair=pair) for method, found in sweeps.items()])
    saes = {(method, cell.seed): sae for method, found in sweeps.items() for cell, sae in found.saes.items()}
    return OnEqualTerms(saes, quality[["pair", "method", "seed", "n_latents", "sparsity", "l0", "nmse", "dead"]])


def codes_of(method: str, sae: SparseAutoencoder, x: Tensor) -> scipy.sparse.csr_array:
    """The code that a dictionary of this method makes of pairs x (tokens, 2, d_model): (tokens, n_latents)."""
    view = VIEWS.get(method)
    return sparse_codes(lambda part: sae.eval().encode(part if view is None else view_of(part, view)), x)
