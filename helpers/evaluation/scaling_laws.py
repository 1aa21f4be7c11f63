"""Scaling laws: how the loss falls with latents n, sparsity k and compute C, with intervals (Gao et al. 2024, 3.1).

    L(x)    = a x^b + floor                         x is n (section 3.1.2) or C (3.1.1); without floor also tokens, lr
    L(n, k) = exp(alpha + beta_k ln k + beta_n ln n + gamma ln k ln n) + exp(zeta + eta ln k)                   (3.1.4)

Both are fitted by least squares of ln L, since the noise of a loss is relative to it. Two fits with p constants each,
and with rss the sum of their squared residuals over m points, are compared by Akaike's criterion for small samples:
    AICc = m ln(rss / m) + 2 (p + 1) + 2 (p + 1) (p + 2) / (m - p - 2)
All functions raise ValueError for too few points, columns of unequal length and values that are not finite and
positive; noise is no error, but a training curve whose time does not increase is.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression, least_squares
from scipy.special import stdtrit


class PowerLaw(NamedTuple):
    """y = a x^b + floor, and how it was fitted. Call it on x."""

    a: float
    b: float
    floor: float = 0.0
    parameters: int = 2
    n: int = 0  # points
    rss: float = math.nan  # sum of squared residuals of ln y
    r2: float = math.nan  # share of the variance of ln y that is explained
    low: float = 0.0  # least x of the fit
    high: float = math.inf  # largest x

    def __call__(self, x: ArrayLike) -> NDArray:
        return self.a * np.asarray(x, float) ** self.b + self.floor

    @property
    def aic(self) -> float:
        """AICc for normal errors of ln y; lower is better. Raises ValueError below p + 3 points."""
        terms, spare = self.parameters + 1, self.n - self.parameters - 2  # the variance is a term too
        if spare < 1:
            raise ValueError(f"AICc needs at least {self.parameters + 3} points, got {self.n}: add sizes or seeds")
        variance = max(self.rss / self.n, 1e-20)  # less is rounding
        return self.n * math.log(variance) + 2 * terms + 2 * terms * (terms + 1) / spare


class JointLaw(NamedTuple):
    """L(n, k) of the module's head. Call it on n and k."""

    alpha: float
    beta_k: float
    beta_n: float
    gamma: float
    zeta: float
    eta: float
    parameters = 6

    def __call__(self, n: ArrayLike, k: ArrayLike) -> NDArray:
        return np.exp(self.alpha + self.beta_k * np.log(k) + self.exponent(k) * np.log(n)) + self.floor(k)

    def exponent(self, k: ArrayLike) -> NDArray:
        """Power of n at this k; beta_n alone means little."""
        return self.beta_n + self.gamma * np.log(k)

    def floor(self, k: ArrayLike) -> NDArray:
        """Loss at this k that no number of latents removes."""
        return np.exp(self.zeta + self.eta * np.log(k))


Law = PowerLaw | JointLaw
PAPER = JointLaw(alpha=-0.50, beta_k=0.26, beta_n=-0.017, gamma=-0.042, zeta=-1.32, eta=-0.085)  # GPT-4


def fit_power_law(x: ArrayLike, y: ArrayLike, floor: bool) -> PowerLaw:
    """Fit y = a x^b, plus a floor of at least zero if `floor`. Needs p + 1 points and p distinct x; x may repeat."""
    x, y = _columns(x=x, y=y)
    p = 3 if floor else 2
    _enough(p, p, x=x)
    line = np.column_stack([np.ones_like(x), np.log(x)])
    fits = [np.append(np.linalg.lstsq(line, np.log(y))[0], -np.inf)]  # a search over ln floor never reaches no floor
    if floor:
        fits.append(_fit_sum(line, line[:, :1], y, np.log(y.min() * (1 - np.geomspace(0.01, 0.9, 8)[:, None]))))
    laws = [PowerLaw(math.exp(fit[0]), float(fit[1]), math.exp(fit[2]), p, len(x)) for fit in fits]
    rss, law = min((float(np.square(residuals(law, x, y)).sum()), law) for law in laws)
    r2 = 1 - rss / max(float(np.log(y).var()) * len(y), 1e-20)
    return law._replace(rss=rss, r2=r2, low=float(x.min()), high=float(x.max()))


def fit_joint_law(n: ArrayLike, k: ArrayLike, loss: ArrayLike, starts: int = 32, seed: int = 0) -> JointLaw:
    """Fit L(n, k) from `starts` random floors, of which the best few are refined.

    Needs 7 points, 3 distinct n and 3 distinct k. At the middle k the floor is kept above a thousandth of the least
    loss, and |eta| below 2: a fit on such a bound found no floor, so read `floor(k)` before eta.
    """
    n, k, loss = _columns(n=n, k=k, loss=loss)
    _enough(6, 3, n=n, k=k)
    u, v, middle, one = np.log(n), np.log(k), np.log(k).mean(), np.ones_like(n)
    random = np.random.default_rng(seed)
    floors = [np.log(loss.min() * random.uniform(0.05, 0.95, starts)), random.uniform(-0.5, 0.5, starts)]
    first, second = np.column_stack([one, v, u, u * v]), np.column_stack([one, v - middle])
    *constants, zeta, eta = map(float, _fit_sum(first, second, loss, np.column_stack(floors)))
    return JointLaw(*constants, zeta - eta * float(middle), eta)


def residuals(law: Law, *columns: ArrayLike) -> NDArray:
    """ln(measured / predicted). `columns`: those that the law is called on, then the measured loss."""
    *x, y = _columns(**{f"column {i}": c for i, c in enumerate(columns, 1)})
    return np.log(y / law(*x))


def heldout_error(x: ArrayLike, y: ArrayLike, floor: bool) -> float:
    """|ln(measured / predicted)| at the largest x, for the fit to all smaller x. Seeds there are averaged first."""
    x, y = _columns(x=x, y=y)
    last = x == x.max()
    return float(abs(residuals(fit_power_law(x[~last], y[~last], floor), x[last], y[last]).mean()))


def equal_loss_ratio(small: PowerLaw, large: PowerLaw) -> float:
    """Latents that `large` needs over those that `small` needs for the same loss, a geometric mean over losses.

    Only losses that both laws span within their data count. Raises ValueError if there are none.
    """
    spans = np.sort([law([law.low, law.high]) for law in (small, large)])
    loss = np.geomspace(spans[:, 0].max(), spans[:, 1].min(), 33)
    if loss[0] >= loss[-1]:
        raise ValueError(f"the laws share no loss, their [low, high] are {spans.round(4).tolist()}: train more sizes")
    log_n, log_more = (np.log((loss - law.floor) / law.a) / law.b for law in (small, large))
    return float(np.exp((log_more - log_n).mean()))


def bootstrap(fit: Callable, *columns: ArrayLike, draws: int = 200, seed: int = 0, around: Law | None = None) -> dict:
    """(value, low, high) of each number in `fit(*columns)`, a law or a dict, with its 95 % percentile interval.

    The last column is the loss; rows that agree in all others are seeds of one cell. If every cell has several, each
    is redrawn from its own; otherwise from the residuals of all rows `around` a law (what `fit` returns, by default).
    With c cells or constants, deviations are widened by sqrt(m / (m - c)), for what the centres took of them, and by
    Student's quantile over the normal one, as percentiles of few points are too narrow.
    """
    *x, y = np.array(sorted(zip(*_columns(**{f"column {i}": c for i, c in enumerate(columns, 1)}), strict=True))).T
    found = fit(*x, y)
    cell = np.unique(np.column_stack(x), axis=0, return_inverse=True)[1].ravel()
    if (np.bincount(cell) > 1).all():
        centre, spare = (np.bincount(cell, np.log(y)) / np.bincount(cell))[cell], len(y) - cell[-1] - 1
    elif isinstance(law := around or found, dict):
        raise ValueError("some cell has one seed only: pass `around`, the law whose residuals are to be redrawn")
    else:
        cell, centre, spare = np.zeros_like(cell), np.log(law(*x)), len(y) - law.parameters
    if spare < 1:
        raise ValueError(
            f"{len(y)} points leave nothing to redraw around {law.parameters} constants: add sizes or seeds"
        )
    widen = math.sqrt(len(y) / spare) * stdtrit(spare, 0.975) / stdtrit(np.inf, 0.975)
    groups, random = pd.Series(widen * (np.log(y) - centre)).groupby(cell), np.random.default_rng(seed)
    noise = (groups.sample(frac=1, replace=True, random_state=random).to_numpy() for _ in range(draws))
    table = pd.DataFrame([found, *(fit(*x, np.exp(centre + shift)) for shift in noise)])
    ends = table[1:].quantile([0.025, 0.975]).to_numpy()
    return {name: tuple(map(float, row)) for name, *row in zip(table, table.iloc[0], *ends, strict=True)}


def lower_envelope(curves: pd.DataFrame, points: int = 64) -> pd.DataFrame:
    """Best loss at each training compute, from one curve per size; columns compute, loss, n_latents, for both.

    Losses are read in log-log between the points of a curve, and a curve that ended keeps its last loss. A compute
    counts where the best size still trains and beats a smaller and a larger one: at an edge of the sweep, a size that
    nobody trained could be better. Neighbouring points share curves, so take intervals over seeds.
    """
    _columns(compute=curves.compute, loss=curves.loss)
    paths = {n: _columns(True, compute=curve.compute, loss=curve.loss) for n, curve in curves.groupby("n_latents")}
    grid = np.geomspace(curves.compute.min(), curves.compute.max(), points)
    losses = np.exp([np.interp(np.log(grid), np.log(c), np.log(y), left=np.inf) for c, y in paths.values()])
    best, known, row = losses.argmin(0), np.isfinite(losses), np.arange(len(paths))[:, None]
    training = np.array([c[-1] for c, _ in paths.values()])[best] >= grid
    counts = training & (known & (row < best)).any(0) & (known & (row > best)).any(0)
    if not counts.any():
        raise ValueError("at no compute does a size beat a smaller and a larger one: train 3 sizes or more, for longer")
    envelope = pd.DataFrame({"compute": grid, "loss": losses.min(0), "n_latents": np.array(list(paths))[best]})
    return envelope[counts].reset_index(drop=True)


def tokens_to_converge(tokens: ArrayLike, loss: ArrayLike, within: float = 0.01) -> float:
    """Tokens until the loss is, and stays, within this fraction of its plateau: the mean over the last fifth.

    Noise is averaged away by isotonic regression: the nearest curve that never rises. Ask `has_converged` first.
    """
    tokens, loss, last = _run(tokens, loss)
    smooth = isotonic_regression(loss, increasing=False).x  # ends below the target
    return float(np.interp(-loss[last].mean() - math.log1p(within), -smooth, tokens))


def has_converged(tokens: ArrayLike, loss: ArrayLike, within: float = 0.01) -> bool:
    """Whether a straight line through ln loss changes by less than `within` over the last fifth of the tokens."""
    tokens, loss, last = _run(tokens, loss)
    slope = np.polyfit(tokens[last] / tokens[-1], loss[last], 1)[0]  # a decaying learning rate adds to it
    return bool(abs(0.2 * slope) < within)


def convergence(curves: pd.DataFrame, within: float) -> pd.DataFrame:
    """A row per run of `curves` (columns n_latents, sparsity, seed, tokens, nmse; a row per measurement of a run):
    `converged`, asked of `has_converged` within this fraction, and `tokens_needed`, those of `tokens_to_converge`."""

    def judge(run: pd.DataFrame) -> pd.Series:
        settled = has_converged(run.tokens, run.nmse, within)
        return pd.Series({"converged": settled, "tokens_needed": tokens_to_converge(run.tokens, run.nmse)})

    return curves.groupby(["n_latents", "sparsity", "seed"]).apply(judge, include_groups=False).reset_index()


def exponents(table: pd.DataFrame, y: str, sizes: int = 3) -> list[float]:
    """Slope of ln y over ln n_latents, one for each seed with so many sizes."""
    parts = [part for _, part in table.groupby("seed") if part.n_latents.nunique() >= sizes]
    logs = [np.log(_columns(n_latents=part.n_latents, **{y: part[y]})) for part in parts]
    return [float(np.polyfit(*log, 1)[0]) for log in logs]


def line_through(x: ArrayLike, y: ArrayLike, b: float) -> PowerLaw:
    """The power law with exponent b through the geometric middle of the points; unknown (nan) where one of them is."""
    if np.isnan(y).any():
        return PowerLaw(math.nan, b)
    x, y = _columns(x=x, y=y)
    return PowerLaw(float(np.exp(np.log(y).mean() - b * np.log(x).mean())), b)


def best_learning_rate(lr: ArrayLike, loss: ArrayLike) -> tuple[float, bool]:
    """Minimum of a parabola through the best rate and its neighbours in log-log, True; at an edge, that and False."""
    lr, loss = _columns(lr=lr, loss=loss)
    rates, cell = np.unique(lr, return_inverse=True)
    mean = np.bincount(cell, np.log(loss)) / np.bincount(cell)  # over seeds
    best = int(mean.argmin())
    if best in (0, len(rates) - 1):
        return float(rates[best]), False
    near = slice(best - 1, best + 2)
    square, line, _ = np.polyfit(np.log(rates[near] / rates[best]), mean[near] - mean[best], 2)
    return float(rates[best] * np.exp(-line / (2 * square))), True


def best_learning_rates(runs: pd.DataFrame) -> pd.DataFrame:
    """n_latents, seed and best lr of each size and seed of `runs` (columns lr, nmse too) that has its best inside."""
    groups = runs.groupby(["seed", "n_latents"])
    found = [(n, seed, *best_learning_rate(part.lr, part.nmse)) for (seed, n), part in groups]
    table = pd.DataFrame(found, columns=["n_latents", "seed", "lr", "inside"])
    return table[table.inside].drop(columns="inside")


def octaves_near_best(lr: ArrayLike, loss: ArrayLike, within: float = 0.05) -> float:
    """Width in octaves of the learning rates whose loss, linear in ln lr between those tried, is so near the least."""
    lr, loss = _columns(lr=lr, loss=loss)
    mean = pd.Series(loss).groupby(np.log2(lr)).mean()  # over seeds
    fine = np.linspace(mean.index[0], mean.index[-1], 400)
    return float((np.interp(fine, mean.index, mean) <= (1 + within) * mean.min()).mean() * (fine[-1] - fine[0]))


def _fit_sum(first: NDArray, second: NDArray, y: NDArray, floors: NDArray) -> NDArray:
    """Constants (p, q) that bring exp(first @ p) + exp(second @ q) nearest to y in logs, from each q in `floors`."""
    width = first.shape[1]
    steepest = [np.inf, *[10.0] * (width - 1)], [2.0] * (second.shape[1] - 1)  # a fading term would never stop
    low = np.negative([*steepest[0], -math.log(1e-3 * y.min()), *steepest[1]])
    high = np.array([*steepest[0], math.log(y.max()), *steepest[1]])

    def error(c: NDArray) -> NDArray:
        return np.logaddexp(first @ c[:width], second @ c[width:]) - np.log(y)

    rests = [np.log(np.maximum(y - np.exp(second @ q), 0.01 * y)) for q in floors]
    starts = [np.append(np.linalg.lstsq(first, rest)[0], q) for rest, q in zip(rests, floors, strict=True)]
    best = sorted(np.clip(starts, low, high), key=lambda c: np.square(error(c)).sum())[:4]
    fits = [least_squares(error, start, bounds=(low, high), ftol=1e-12, xtol=1e-12) for start in best]
    return min(fits, key=lambda fit: fit.cost).x


def _run(tokens: ArrayLike, loss: ArrayLike) -> tuple[NDArray, NDArray, NDArray]:
    tokens, loss = _columns(increasing=True, tokens=tokens, loss=loss)
    last = tokens >= 0.8 * tokens[-1]  # the last fifth
    if last.sum() < 3:
        raise ValueError(f"the last fifth of the tokens has {last.sum()} points, not 3 or more: measure more often")
    return tokens, np.log(loss), last


def _enough(p: int, distinct: int, **columns: NDArray) -> None:
    for name, column in columns.items():
        if len(column) <= p or len(set(column)) < distinct:
            got = f"got {len(column)} with {len(set(column))}: add sizes or seeds"
            raise ValueError(f"{p} constants need at least {p + 1} points with {distinct} different {name}, {got}")


def _columns(increasing: bool = False, **columns: ArrayLike) -> list[NDArray]:
    arrays = [np.asarray(column, float) for column in columns.values()]
    if any(array.shape != (arrays[0].size or 1,) for array in arrays):
        raise ValueError(f"{' and '.join(columns)} must be one-dimensional, of one length, and not empty")
    for name, array in zip(columns, arrays, strict=True):
        if (bad := array[~(np.isfinite(array) & (array > 0))]).size:
            raise ValueError(f"{name} must be finite and positive, found {bad[0]}: leave out the runs that failed")
    if increasing and (np.diff(arrays[0]) <= 0).any():
        raise ValueError(f"{next(iter(columns))} must increase along a curve: pass one run at a time, in its order")
    return arrays
