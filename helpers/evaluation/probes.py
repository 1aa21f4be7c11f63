"""Probes of one unit: how well a logistic model of a single latent (or channel, neuron, direction) tells a label.

    score(task) = min over units i, weight w and bias b of   E[ softplus(-s (w z_i + b)) ],    s = +1 or -1 by the label

in nats (Gao et al. 2024, section 4.2). Each class has half of the weight, so that chance is ln 2 for every task, and no
token is thrown away. The unit is chosen and fitted on some documents and scored on others.

z_i is a pre-activation, z_i = W_enc[i] x + constant, and a constant changes no probe: the score depends on the
encoder's directions alone. So all is probed as directions: latents, random projections, the tokens' own vectors.

The best of n units is found without fitting them all. softplus is convex, so the mean of a class within a bin costs no
more than the tokens there do (Jensen). Binned by value, with count and mean of each class, the loss is a *lower bound*
for every w and b, and so is its minimum, which costs a bin where it cost a token. Exact fits then go through the units
in the order of their bounds, until the next bound is above the best exact loss: what is left out cannot be the best.
"""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.evaluation.probe_tasks import Labelled

CHANCE = math.log(2)  # nats, of a probe that knows nothing
RIDGE = 1e-7  # times (w^2 + b^2) / 2, z standardised: keeps w finite where a unit separates the classes
BINS = 64  # per unit
CHUNK = 64  # units binned together; their tables stay near the processor
STEPS = 100  # of Newton's method at most; ten is usual
PRECISION = 1e-6  # nats, of the bounds, which are computed in single precision
FITTED = 2  # units of a task fitted exactly before the bounds are looked at again


class Fit(NamedTuple):
    """Logistic fits of some units to one task, (m,) float64 each; the probability of a label is s(weight z + bias)."""

    weight: Tensor
    bias: Tensor
    loss: Tensor  # nats


def probe(fit: Labelled, test: Labelled, directions: Tensor | None = None) -> pd.DataFrame:
    """The best unit of each task by `fit`, scored on `test`: task, unit, weight, bias, fit_loss, loss (nats).

    Unit i is x @ directions[i], directions (n_units, width); or the channel x[:, i] if there are none, which is the way
    to probe latents after their activation. Raises ValueError for a task that has one class only.
    """
    if test.tasks != fit.tasks:
        raise ValueError("the tokens to score on have other tasks than those of the fit: take both of `common_tasks`")
    best = best_probes(fit, directions)
    _check(test, directions)
    chosen = _units(test.x, directions, torch.tensor(best.unit.tolist())).double()
    rows = zip(chosen.T, test.y, best.weight, best.bias, strict=True)
    return best.assign(loss=[probe_loss(z, y, weight, bias).item() for z, y, weight, bias in rows])


def best_probes(data: Labelled, directions: Tensor | None = None) -> pd.DataFrame:
    """The unit of the least loss for each task, fitted exactly: task, unit, weight, bias, fit_loss."""
    _check(data, directions)
    n_units = data.x.shape[1] if directions is None else len(directions)
    chunks = (_units(data.x, directions, units) for units in torch.arange(n_units).split(CHUNK))
    starts = torch.cat([_bounds(z, data.y) for z in chunks], dim=1)  # (3, n_units, n_tasks)
    return pd.DataFrame([_best(data, directions, task, starts[..., task]) for task in range(len(data.tasks))])


def fit_probes(z: Tensor, y: Tensor, start: tuple[Tensor, Tensor] | None = None) -> Fit:
    """Fit every column of z (n_tokens, m) to the labels y (n_tokens,) bool, each class with half of the weight.

    `start` (weights, biases) speeds it up. A column that never varies has weight 0.
    """
    z, mean, sd = _standardised(z.double())
    sign, share = _signs_and_shares(y)
    if start is not None:
        start = torch.stack([start[0] * sd, start[1] + start[0] * mean]).double()
    weight, bias, loss, _ = _newton(z, sign[:, None], share[:, None], 1e-12, start)
    return Fit(weight / sd, bias - weight * mean / sd, loss)


def probe_loss(z: Tensor, y: Tensor, weight: float, bias: float) -> Tensor:
    """Loss in nats of a given probe on units z (n_tokens,) and labels y (n_tokens,) bool."""
    sign, share = _signs_and_shares(y)
    return (share * F.softplus(-sign * (weight * z + bias))).sum()


def token_table_loss(fit: Labelled, test: Labelled) -> np.ndarray:
    """What knowing the token and nothing else gives, (n_tasks,) nats: log odds from counts in `fit`, one added to each.

    A task of low loss here is about single tokens, such as commas; one near ln 2 is about their context.
    """
    vocabulary = int(max(fit.ids.max(), test.ids.max())) + 1
    losses = []
    for y_fit, y_test in zip(fit.y, test.y, strict=True):
        counts = torch.stack([torch.bincount(fit.ids[y_fit == label], minlength=vocabulary) + 1.0 for label in (0, 1)])
        log_odds = counts.double().div(counts.sum(1, keepdim=True)).log().diff(dim=0)[0]
        losses.append(probe_loss(log_odds[test.ids], y_test, 1.0, 0.0).item())
    return np.array(losses)


def _best(data: Labelled, directions: Tensor | None, task: int, starts: Tensor) -> dict:
    """Exact fits in the order of the bounds, until the next bound is above the best."""
    bounds, order = starts[2].sort()
    best, y = {"fit_loss": math.inf}, data.y[task]
    for first in range(0, len(order), FITTED):
        if bounds[first] > best["fit_loss"]:
            break
        units = order[first : first + FITTED]
        fit = fit_probes(_units(data.x, directions, units), y, (starts[0, units], starts[1, units]))
        i = fit.loss.argmin()
        if fit.loss[i] < best["fit_loss"]:
            best = {"task": data.tasks[task], "unit": units[i].item(), "weight": fit.weight[i].item()}
            best |= {"bias": fit.bias[i].item(), "fit_loss": fit.loss[i].item()}
    return best


def _units(x: Tensor, directions: Tensor | None, units: Tensor) -> Tensor:
    """(n_tokens, width) -> (n_tokens, len(units))."""
    return x[:, units] if directions is None else x @ directions[units].detach().to(x).T


def _bounds(z: Tensor, y: Tensor) -> Tensor:
    """Weight and bias where the binned loss is least, and a lower bound of the exact loss: (3, n_units, n_tasks)."""
    z, mean, sd = _standardised(z.float())
    means, shares = _tables(z, y)  # (2, BINS, n_units, n_tasks), positives first
    sign = torch.tensor([1.0, -1.0]).repeat_interleave(BINS)[:, None]
    found = _newton(means.flatten(2).flatten(0, 1), sign, shares.flatten(2).flatten(0, 1), PRECISION)
    weight, bias, loss, promise = found.unflatten(1, means.shape[2:])
    weight = weight / sd[:, None]
    bound = torch.where(promise < PRECISION, loss - 2 * PRECISION, 0.0)  # no bound but zero before the minimum
    return torch.stack([weight, bias - weight * mean[:, None], bound])


def _tables(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and weight of each class in each of BINS equal bins of each unit, (2, BINS, n_units, n_tasks)."""
    low = z.amin(0)
    width = (z.amax(0) - low).clamp_min(1e-12) / BINS
    place = (z - low) / width
    bins = place.int().clamp_(0, BINS - 1)
    everyone = torch.cat([torch.ones_like(y[:1]), y]).T.float().contiguous().numpy()  # (n_tokens, 1 + n_tasks)
    count, offset = (_sums(bins, values, everyone) for values in (torch.ones_like(place), place - bins - 0.5))
    counts, offsets = (torch.stack([s[..., 1:], s[..., :1] - s[..., 1:]]) for s in (count, offset))
    centre = torch.arange(BINS)[:, None, None] + 0.5
    means = low[:, None] + width[:, None] * (centre + offsets / counts.clamp_min(1))
    return means, counts / (2 * counts.sum(1, keepdim=True))


def _sums(bins: Tensor, values: Tensor, weights: np.ndarray) -> Tensor:
    """Sum of value times weights over the tokens of each bin: (n_tokens, n_units) -> (BINS, n_units, n_weights)."""
    starts, shape = np.arange(len(bins) + 1, dtype=np.int32), (BINS, len(bins))
    columns = zip(values.T.contiguous().numpy(), bins.T.contiguous().numpy(), strict=True)
    tables = [scipy.sparse.csc_array((value, b, starts), shape) @ weights for value, b in columns]
    return torch.from_numpy(np.stack(tables, axis=1))


def _newton(z: Tensor, sign: Tensor, share: Tensor, tolerance: float, start: Tensor | None = None) -> Tensor:
    """Least sum_i share softplus(-sign (w z + b)) + ridge over w and b, for each column of z (n, m).

    A step that does not lower the loss is halved. Ends when none promises `tolerance` nats: w, b, loss, promise (4, m).
    """
    at = torch.zeros(2, z.shape[1], dtype=z.dtype) if start is None else start
    loss, slope, curvature = _derivatives(z, sign, share, at)
    length = torch.ones_like(loss)
    for _ in range(STEPS):
        step = _solve(curvature, slope)
        promise = (step * slope).sum(0)
        if promise.max() < tolerance:
            break
        trial = at - length * step
        new_loss, new_slope, new_curvature = _derivatives(z, sign, share, trial)
        better = new_loss <= loss + tolerance
        loss, at, slope, curvature = (
            torch.where(better, new, old)
            for new, old in ((new_loss, loss), (trial, at), (new_slope, slope), (new_curvature, curvature))
        )
        length = torch.where(better, 1.0, length / 2)
    return torch.stack([*at, loss, promise])


def _derivatives(z: Tensor, sign: Tensor, share: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (m,), slope in w and b (2, m), second derivatives ww, wb, bb (3, m)."""
    margin = sign * (at[0] * z + at[1])
    missed, loss = torch.sigmoid(-margin), -torch.sigmoid(margin).clamp_min(torch.finfo(z.dtype).tiny).log()
    pull, spread = -share * sign * missed, share * missed * (1 - missed)
    slope = torch.stack([(pull * z).sum(0), pull.sum(0)]) + RIDGE * at
    spread_z = spread * z
    ridge = torch.tensor([[RIDGE], [0.0], [RIDGE]])
    curvature = torch.stack([(spread_z * z).sum(0), spread_z.sum(0), spread.sum(0)]) + ridge.to(z)
    return (share * loss).sum(0) + RIDGE / 2 * at.square().sum(0), slope, curvature


def _solve(curvature: Tensor, slope: Tensor) -> Tensor:
    """Newton's step, the 2 x 2 systems of all columns at once."""
    ww, wb, bb = curvature
    determinant = (ww * bb - wb * wb).maximum(RIDGE / 2 * (ww + bb))  # the ridge keeps it above, rounding might not
    return torch.stack([bb * slope[0] - wb * slope[1], ww * slope[1] - wb * slope[0]]) / determinant


def _standardised(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns with mean 0 and deviation 1, and what they were; a constant column becomes zero."""
    sd, mean = torch.std_mean(z, dim=0, correction=0)
    sd = torch.where(z.amax(0) > z.amin(0), sd, 1.0)
    return (z - mean) / sd, mean, sd


def _signs_and_shares(y: Tensor) -> tuple[Tensor, Tensor]:
    """+1 or -1 for each token, and its weight: half for each class. Raises ValueError for one class only."""
    if y.all() or not y.any():
        raise ValueError("every token has the same label: take tokens of both classes")
    return torch.where(y, 1.0, -1.0).double(), torch.where(y, 0.5 / y.sum(), 0.5 / (~y).sum()).double()


def _check(data: Labelled, directions: Tensor | None) -> None:
    if not data.tasks:
        raise ValueError(
            "there is no task to probe for: take more documents, so that both classes of a label are common"
        )
    for what, values in {"activations": data.x, "directions": directions}.items():
        if values is not None and not values.isfinite().all():
            raise ValueError(f"some {what} are NaN or infinite: look at the model that they come from")
    for task, n in zip(data.tasks, data.y.sum(1).tolist(), strict=True):
        if n in (0, data.y.shape[1]):
            raise ValueError(f"every token has the same label in task {task!r}: leave it out, or take more documents")
