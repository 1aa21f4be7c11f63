"""Can an auditor without labels find a hidden habit? Each method orders its latents by a score of its own.

    crosscoders   Delta_norm, and the ranks of both ratios of Latent Scaling
    SAEs          the smallest |nu|; a diff-SAE also energy, the sum of squared activations

Labels come in only afterwards: the latent that tells the habit best, and how far down the order it stands.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import scipy.sparse
from torch import Tensor

from helpers.activations.views import view_of
from helpers.dictionaries.autoencoders import SparseAutoencoder
from helpers.dictionaries.pair_collection import WHERE, Heldout
from helpers.diffing.equal_terms import DIFF, VIEWS
from helpers.diffing.latent_scaling import latent_table, rank_sum, sae_table
from helpers.diffing.reading import MIN_FIRED, along
from helpers.diffing.recovery import auroc_scores, behaviour_table, rank_of


def own_orders(method: str, sae: SparseAutoencoder, code: scipy.sparse.csr_array, x: Tensor) -> dict[str, pd.Series]:
    """Scores of all latents by name of the order, the first of it highest; read on pairs x (tokens, 2, d_model)."""
    if method not in VIEWS:
        table = latent_table(sae, x)
        return {"Δ_norm": table.delta, "ranks of ν": rank_sum(table)}
    found = {"smallest |ν|": -sae_table(sae, VIEWS[method], x).nu_activation.abs()}
    return found | ({"energy": pd.Series((code**2).sum(0))} if method == DIFF else {})


def first_of(scores: pd.Series, code: scipy.sparse.csr_array, n: int = 6) -> pd.Index:
    """The first n latents of an order, of those that fire often enough to be read."""
    return scores.astype(float).where((code > 0).sum(0) >= MIN_FIRED).nlargest(n).index


def habit_places(
    code: scipy.sparse.csr_array, orders: Mapping[str, pd.Series], reading: Heldout, names: Sequence[str], habit: str
) -> pd.DataFrame:
    """The latent that tells the habit best by F1, chosen on one half, and its rank in each order, among live latents.

    A row for each place of labels and order: place, f1, auroc (of the latent that is best by AUROC), order, rank, live,
    latent.
    """
    alive, rows = np.asarray((code > 0).sum(0)).ravel() > 0, []
    for where in WHERE:
        table = behaviour_table(code, reading.labels(where), reading.first, names)
        best = table.set_index("behaviour").loc[habit]
        for order, scores in orders.items():
            rank = rank_of(scores, int(best.f1_latent), alive)
            found = {"place": where, "f1": best.f1, "auroc": best.auroc, "order": order}
            rows.append(found | {"rank": rank, "live": alive.sum(), "latent": best.f1_latent})
    return pd.DataFrame(rows)


def without_dictionary(reading: Heldout, names: Sequence[str], habit: str) -> pd.DataFrame:
    """AUROC for the habit of the mean difference over all labelled tokens, and of the length of the difference.

    A row for each place of labels and baseline: method, place, auroc (NaN where no token there is labelled).
    """
    apart, rows = view_of(reading.x, "difference"), []
    for where in WHERE:
        labels = reading.labels(where)
        spoken = labels >= 0
        mean = apart[spoken].sum(0, keepdim=True) / max(1, spoken.sum())
        shift = along(apart, mean).toarray()
        for name, heights in (
            ("mean difference", shift),
            ("length of the difference", apart.norm(dim=1)[:, None].cpu().numpy()),
        ):
            area = auroc_scores(heights[spoken], labels[spoken], len(names))[names.index(habit), 0]
            rows.append({"method": name, "place": where, "auroc": area})
    return pd.DataFrame(rows)
