"""What the browser knows of one latent: statistics, windows of text, what its decoder rows do. Arrays in, records out.

    activations, tokens   (N, T): N windows of T tokens
    W_dec                 (n_latents, d_model), unembedding (d_model, vocabulary)

A record follows the viewer of Gao et al. (2024): windows drawn at random among the positive ones, the strongest, and
some from each quarter of the positive activations. No part of a page shows nearly the same text twice.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

BINS = 40  # of a histogram
ALIKE = 0.5  # share of the shorter window's pairs of tokens that another has too


@dataclass(frozen=True)
class Window:
    """A piece of text around the token `at`, with the latent's activation on each token, and its effect if known."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    at: int
    effects: tuple[float, ...] = ()  # nats by which the loss on the token rises when the latent is taken out


@dataclass(frozen=True)
class Direction:
    """What a latent's decoder row does in one model."""

    model: str = ""
    norm: float | None = None
    promoted: tuple[str, ...] = ()  # next tokens that it makes likelier
    suppressed: tuple[str, ...] = ()  # and less likely
    neighbours: tuple[tuple[int, float], ...] = ()  # latents with the closest rows, and the cosines


class Crowd(NamedTuple):
    """Where a latent's density lies among those of all latents."""

    histogram: tuple[int, ...]  # latents per bin, bins of equal width in log density, up to 1
    lowest: float  # positive density, where the first bin begins
    bin: int | None  # the latent's own, None if it never fires
    denser_than: float  # share of the latents


@dataclass(frozen=True)
class LatentRecord:
    """What a page shows of one latent; mean and histogram are over the tokens on which it is active."""

    latent: int
    n_tokens: int
    density: float  # share of tokens on which it is active
    mean: float
    maximum: float
    histogram: tuple[int, ...]  # tokens per bin, bins of equal width from 0 to the maximum
    random: tuple[Window, ...]
    top: tuple[Window, ...]
    quarters: tuple[tuple[Window, ...], ...]  # of its positive activations, the weakest first
    crowd: Crowd | None = None
    directions: tuple[Direction, ...] = ()
    facts: Mapping[str, float | str] = field(default_factory=dict)


def latent_record(
    latent: int,
    activations: np.ndarray,
    tokens: np.ndarray,
    decode: Callable[[Any], str] = str,
    *,
    n_random: int = 5,
    n_top: int = 5,
    n_quarter: int = 2,
    context: int = 20,
    promoted: Sequence[str] = (),
    directions: Sequence[Direction] = (),
    effects: np.ndarray | None = None,
    densities: np.ndarray | None = None,
    n_tokens: int | None = None,
    facts: Mapping[str, float | str] | None = None,
    seed: int = 0,
) -> LatentRecord:
    """Summarise one latent from its activations (N, T) on tokens (N, T): strings, or ids for `decode`.

    Top windows are those with the highest maximum. The others are drawn by token, so a window that fires often is
    likelier. All show `context` tokens on each side of the token they were picked for.

    promoted    tokens it makes likelier, where that is all that is known of its direction
    effects     (N, T) nats by which the loss on a token rises when the latent is taken out
    densities   (n_latents,) of all latents
    n_tokens    how many of the N T places are text, if rows are padded
    facts       whatever else is known by name, as its best probe task or its pattern; numbers can be sorted by

    Raises ValueError for arrays that do not fit each other, are empty or not finite.
    """
    activations, tokens = np.asarray(activations), np.asarray(tokens)
    _check(activations, tokens, effects)
    at = np.argwhere(activations > 0)
    positive = activations[at[:, 0], at[:, 1]]
    n_tokens = n_tokens or activations.size
    density = positive.size / n_tokens
    rng = np.random.default_rng((seed, latent))
    order = np.argsort(-activations.max(1), kind="stable")
    strongest = ((row, activations[row].argmax()) for row in order if activations[row].max() > 0)
    quarters = np.array_split(at[np.argsort(positive, kind="stable")], 4)

    def windows(places: Iterable[Sequence[int]], n: int) -> tuple[Window, ...]:
        chosen = _unlike(places, n, tokens, context)
        return tuple(_window(activations, tokens, effects, row, at, context, decode) for row, at in chosen)

    return LatentRecord(
        latent=int(latent),
        n_tokens=n_tokens,
        density=density,
        mean=float(positive.mean()) if positive.size else 0.0,
        maximum=float(positive.max()) if positive.size else 0.0,
        histogram=tuple(np.histogram(positive, BINS, (0, positive.max() if positive.size else 1))[0].tolist()),
        random=windows(_shuffled(at, rng), n_random),
        top=windows(strongest, n_top),
        quarters=tuple(windows(_shuffled(quarter, rng), n_quarter) for quarter in quarters),
        crowd=None if densities is None else _crowd(density, np.asarray(densities)),
        directions=(*directions, *([Direction(promoted=tuple(promoted))] if len(promoted) else [])),
        facts=dict(facts or {}),
    )


def directions_of(
    W_dec: np.ndarray,
    unembedding: np.ndarray,
    decode: Callable[[int], str],
    latents: Iterable[int],
    model: str = "",
    n: int = 8,
) -> list[Direction]:
    """What the decoder rows of `latents` add to the logits directly, `W_dec @ unembedding`, and their neighbours.

    The unembedding (d_model, vocabulary) has the weights of the last norm in it. Raises ValueError for a latent that
    the decoder has not.
    """
    norms = np.linalg.norm(W_dec, axis=1)
    unit = W_dec / np.where(norms > 0, norms, 1)[:, None]
    found = []
    for latent in checked_latents(latents, len(W_dec)):
        logits, cosines = W_dec[latent] @ unembedding, unit @ unit[latent]
        cosines[latent] = -np.inf
        neighbours = [(int(j), float(cosines[j])) for j in _largest(cosines, min(n, len(unit) - 1))]
        likelier, less = (tuple(map(decode, _largest(sign * logits, n).tolist())) for sign in (1, -1))
        found.append(Direction(model, float(norms[latent]), likelier, less, tuple(neighbours)))
    return found


def checked_latents(latents: Iterable[int], n_latents: int) -> list[int]:
    """The latents as ints; raises ValueError for one that is not among `n_latents`."""
    latents = list(map(int, latents))
    for latent in latents:
        if not 0 <= latent < n_latents:
            raise ValueError(f"There is no latent {latent}: the dictionary has {n_latents:,}, 0 to {n_latents - 1}.")
    return latents


def _check(activations: np.ndarray, tokens: np.ndarray, effects: np.ndarray | None) -> None:
    if activations.ndim != 2 or activations.shape != tokens.shape or not activations.size:
        raise ValueError(
            f"Activations {activations.shape} and tokens {tokens.shape} must both be (windows, tokens) and not empty."
        )
    if effects is not None and np.shape(effects) != activations.shape:
        raise ValueError(f"Effects {np.shape(effects)} must have the shape of the activations, {activations.shape}.")
    if not np.isfinite(activations).all():
        raise ValueError("The activations hold NaN or infinite values: look at the autoencoder that made them.")


def _shuffled(at: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    return (at[i] for i in rng.permutation(len(at)))


def _unlike(places: Iterable[Sequence[int]], n: int, tokens: np.ndarray, context: int) -> list[tuple[int, int]]:
    """The first n places (row, column) in different rows whose surroundings are not nearly those of one before."""
    chosen: dict[int, int] = {}
    seen: list[set] = []
    for row, at in places:
        if len(chosen) == n:
            break
        if row in chosen:
            continue
        near = tokens[row, max(0, at - context) : at + context + 1].tolist()
        pairs = set(zip(near, near[1:], strict=False)) or set(near)
        if all(len(pairs & other) < ALIKE * min(len(pairs), len(other)) for other in seen):
            chosen[int(row)] = int(at)
            seen.append(pairs)
    return list(chosen.items())


def _window(
    activations: np.ndarray,
    tokens: np.ndarray,
    effects: np.ndarray | None,
    row: int,
    at: int,
    context: int,
    decode: Callable,
) -> Window:
    first = max(0, at - context)
    near = slice(first, at + context + 1)
    nats = () if effects is None else tuple(np.asarray(effects)[row, near].tolist())
    text = tuple(map(decode, tokens[row, near].tolist()))
    return Window(text, tuple(activations[row, near].tolist()), at - first, nats)


def _crowd(density: float, densities: np.ndarray) -> Crowd:
    logs = np.log10(densities[densities > 0])
    edges = np.linspace(min(logs.min(initial=0), -1e-9), 0, BINS + 1)
    own = int(np.clip(np.searchsorted(edges, np.log10(density), "right") - 1, 0, BINS - 1)) if density > 0 else None
    counts = tuple(np.histogram(logs, edges)[0].tolist())
    return Crowd(counts, float(10 ** edges[0]), own, float((densities < density).mean()))


def _largest(values: np.ndarray, n: int) -> np.ndarray:
    """Indices of the n largest values, the largest first."""
    n = min(n, len(values))
    part = np.argpartition(-values, n - 1)[:n] if n else np.arange(0)
    return part[np.argsort(-values[part], kind="stable")]
