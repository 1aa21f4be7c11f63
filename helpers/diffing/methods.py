"""The methods of the leaderboard: each fits a pair of models and returns its candidates, in ten lines or so.

Dictionaries are those of notebooks 09 to 12, as sparse as the L1 crosscoder of the pair. On "self" they read a sixth of
the tokens, as in notebook 09.

`CONTROLS` say what a number of the leaderboard is worth. Two know the labels: on the tokens that choose, a direction of
chat - base is fitted to each direction that is chat's alone or to each behaviour, by the difference of means, or by a
logistic probe. Where they fail, a column asks for what is not there. The third draws its directions at random.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from helpers.activations.views import ViewedStream, view_of
from helpers.base.checks import require_finite
from helpers.dictionaries.autoencoders import SparseAutoencoder
from helpers.dictionaries.crosscoders import Crosscoder
from helpers.dictionaries.pair_collection import OFTEN, TrainedPairs
from helpers.dictionaries.sweeps import Cell, CrosscoderCell
from helpers.diffing.latent_scaling import NU_RANGE, SAE_SPECIFIC, sae_table
from helpers.diffing.leaderboard import PLACES, Found, Method, labelled
from helpers.diffing.norms import classes, delta_norm
from helpers.diffing.patching import Difference, difference_of
from helpers.diffing.recovery import larger_rows
from helpers.text.dialogues import BEHAVIOURS

SAMPLE = 2**16  # tokens that the mean difference is taken over; hundreds of directions need no more
KNOWN = 2**14  # tokens of the injected pair that directions are fitted to; each planted one is on for some 160
SHORT = 6  # on "self" a dictionary reads 1 / SHORT of the tokens


# ---- what they find


def of_crosscoder(crosscoder: Crosscoder) -> Found:
    """Ranked by Delta_norm, which calls chat-only from 0.9 on."""
    delta = delta_norm(crosscoder)
    called = classes(delta) == "chat-only"
    return Found(difference_of(crosscoder), delta.numpy(), called, larger_rows(crosscoder))


def of_sae(sae: SparseAutoencoder, view: str, x: Tensor | None = None) -> Found:
    """An autoencoder of the difference or of chat. With pairs x (n, 2, d_model) to scale on, the latents that base has
    least of come first, and below a ratio of `SAE_SPECIFIC` they are called chat-only."""
    found = Found(difference_of(sae, view))
    if x is None:
        return found
    ratio = sae_table(sae, view, x).nu_activation
    size = ratio.where(ratio.between(*NU_RANGE)).abs().to_numpy()
    return found._replace(scores=-size, called=size < SAE_SPECIFIC)


def of_directions(rows: Tensor, scores: np.ndarray | None = None, above: Tensor | float = 0.0) -> Found:
    """Directions (m, d_model) of any length: each is on by as much as chat - base points its way `above` a height, one
    or (m,), and writes that."""
    units = F.normalize(rows, dim=-1)

    def encode(x: Tensor) -> Tensor:
        return (view_of(x, "difference") @ units.to(x).T - above).relu()

    return Found(Difference(encode, units, None, len(units)), scores)


# ---- dictionaries, and what needs none


def _matched(pairs: TrainedPairs, pair: str) -> dict:
    """What makes BatchTopK as sparse as the L1 crosscoders of the pair, or of "chat" for a model and itself."""
    l1 = pairs.train("chat" if pair == "self" else pair, pairs.cells("ReLU"))
    return {"sparsity": pairs.matched_k(l1.frame.l0.mean())}


def _short(pairs: TrainedPairs, pair: str) -> dict:
    """Rows that start equal stay equal from the first step on: base against itself needs few tokens."""
    return {"tokens": pairs.plan.tokens // SHORT} if pair == "self" else {}


def dictionaries(
    name: str, kind: str = "BatchTopK", view: str | None = None, scaling: bool = False, often: int = 1, **changes
) -> Method:
    """A "ReLU" or "BatchTopK" crosscoder, or an autoencoder of a view, "difference" or "chat"; with `scaling`, Latent
    Scaling chooses among its latents. It reads tokens where an answer is decided `often`. `changes` are of its cell, by
    default the plan's at the L0 of L1."""

    def fit(pairs: TrainedPairs, pair: str, seed: int) -> Found:
        x = pairs.heldout(pair).x
        if view and not view_of(x, view).any():  # of a model and itself: there is nothing to train on
            return nothing(pairs, scaling)
        given = (_matched(pairs, pair) if kind == "BatchTopK" else {}) | _short(pairs, pair) | changes
        cells = pairs.cells(kind, kind=Cell if view else CrosscoderCell, **given)
        (made,) = pairs.train(pair, [cell for cell in cells if cell.seed == seed], view, often).saes.values()
        return of_sae(made, view, x if scaling else None) if view else of_crosscoder(made)

    if view is None:
        return Method(name, fit, "Δ_norm", "Δ_norm ≥ 0.9")
    return Method(name, fit, "|ν|, least first", f"|ν| < {SAE_SPECIFIC}") if scaling else Method(name, fit)


def mean_difference(pairs: TrainedPairs, pair: str, seed: int) -> Found:
    """The mean of chat - base, then the principal components of what is left of it, both ways along each.

    A direction and its opposite together write all that the difference has along it. There is no seed in it.
    """
    n, total, moment = 0, 0.0, 0.0
    for x in ViewedStream(pairs.stream(pair), "difference").batches(min(SAMPLE, pairs.plan.tokens)):
        require_finite(x, "activations of a batch", "check the subject and its dtype")
        n, total, moment = n + len(x), total + x.sum(0).double(), moment + (x.T @ x).double()
    mean = F.normalize(total / n, dim=0)
    left = torch.eye(len(mean)).to(mean) - mean.outer(mean)
    components = torch.linalg.eigh(left @ (moment / n) @ left).eigenvectors.T.flip(0)  # the largest first
    rows = torch.cat([mean[None], torch.stack([components, -components], 1).flatten(0, 1)]).float()
    return of_directions(rows, scores=-np.arange(len(rows)))


# ---- what a number is worth


def nothing(pairs: TrainedPairs, cut: bool = True) -> Found:
    """Of a pair without a difference: a candidate that is never on, nor called by a method with a cut."""
    found = of_directions(torch.zeros(1, pairs.base.d_model, device=pairs.base.device))
    return found._replace(called=np.zeros(1, bool)) if cut else found


def random_directions(pairs: TrainedPairs, pair: str, seed: int) -> Found:
    """As many as a dictionary has latents. They do not look at the models at all."""
    rows = torch.randn(pairs.plan.n, pairs.base.d_model, generator=torch.Generator().manual_seed(seed))
    return of_directions(rows.to(pairs.base.device), scores=-np.arange(len(rows)))


def knowing_labels(name: str, fit: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Method:
    """Directions fitted to what is to be found: fit(x, y) -> rows (m, d_model) and the height that each is on above,
    (m,), of tokens x (n, d_model) and labels y (n, m) bool.

    A row detects; what it detects points along the covariance of x times the row (Haufe et al. 2014).
    """

    def found(pairs: TrainedPairs, pair: str, seed: int) -> Found:
        if pair not in KNOWN_OF:
            return nothing(pairs)  # without a label there is nothing to call
        parts = []
        for x, y in KNOWN_OF[pair](pairs):
            rows, above = fit(x, y)
            centred = x - x.mean(0)
            parts.append((rows, above, rows @ (centred.T @ centred)))
        rows, above, points = (
            torch.stack(each, 1).flatten(0, 1) for each in zip(*parts, strict=True)
        )  # places in turn
        return of_directions(rows, -np.arange(len(rows)), above)._replace(points=points)

    return Method(name, found, "none before another", "by the labels")


def difference_of_means(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of x where a label is less the mean where it is not, and the middle of both along it; zero for a label
    that no token or every token has."""
    y = y.to(x)
    there, elsewhere = (each.T @ x / each.sum(0).clamp(min=1).unsqueeze(1) for each in (y, 1 - y))
    rows = (there - elsewhere) * ((y.sum(0) > 0) & (y.sum(0) < len(y))).unsqueeze(1)
    return rows, torch.linalg.vecdot(F.normalize(rows, dim=-1), (there + elsewhere) / 2)


def logistic_probe(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of a logistic model of each label, both classes of equal weight, and where its odds are even."""
    scale = x.std().clamp(min=1e-12)
    x, rows, above = (x / scale).cpu().double().numpy(), x.new_zeros(y.shape[1], x.shape[1]), x.new_zeros(y.shape[1])
    for i, label in enumerate(y.T.cpu().numpy()):
        if label.any() and not label.all():
            model = LogisticRegression(class_weight="balanced", max_iter=200).fit(x, label)
            rows[i] = torch.from_numpy(model.coef_[0])
            above[i] = -model.intercept_[0] * scale / rows[i].norm()
    return rows, above


Known = list[tuple[Tensor, Tensor]]  # x (n, d_model), y (n, m) bool of some tokens


def _known_injected(pairs: TrainedPairs) -> Known:
    chats = torch.tensor([label == "chat-only" for label in pairs.stream("injected").labels])
    x, truth = pairs.heldout("injected").x[:KNOWN], pairs.truth("injected").chat[:KNOWN]
    return [(view_of(x, "difference"), truth[:, chats.to(truth.device)] > 0)]


def _known_chat(pairs: TrainedPairs) -> Known:
    """At each place the labelled tokens of the half that chooses: a behaviour's own are told from the others'."""
    reading, parts = labelled(pairs), []
    wanted = np.array([list(BEHAVIOURS).index(name) for name in pairs.planted_behaviours("chat-only")])
    for place in PLACES:
        labels = reading.labels(place)
        known = torch.from_numpy(reading.first & (labels >= 0))
        y = torch.from_numpy(labels[known.numpy(), None] == wanted)
        parts.append((view_of(reading.x[known], "difference"), y.to(reading.x.device)))
    return parts


KNOWN_OF = {"injected": _known_injected, "chat": _known_chat}
MEANS, PROBE = "mean difference of labels", "logistic probe of labels"
CONTROLS = [
    knowing_labels(MEANS, difference_of_means),
    knowing_labels(PROBE, logistic_probe),
    Method("random directions", random_directions, "by chance"),
]
STANDARD = [
    dictionaries("L1", "ReLU"),
    dictionaries("BatchTopK"),
    dictionaries("decoupled", decoupled=True),
    dictionaries("diff-SAE", view="difference"),
    dictionaries(f"diff-SAE, decisions {OFTEN} times", view="difference", often=OFTEN),
    dictionaries("diff-SAE + Latent Scaling", view="difference", scaling=True),
    dictionaries("chat-SAE + Latent Scaling", view="chat", scaling=True),
    Method("mean difference", mean_difference, "mean first, then principal components"),
]
