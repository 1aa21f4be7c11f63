"""Explain latents by n-grams (N2G), and score the explanations on other text. Gao et al. 2024, section 4.3.

An example is a text that ends where a latent is on, with activation a. With f(text) the activation on the last token,

    suffix     the fewest last tokens that keep half of it: f(suffix) >= a / 2
    START      belongs in front of the suffix if one more token there, the padding, breaks it: f(pad + suffix) < a / 2
    saliency   of a token: 1 - f(suffix with padding in its place) / f(suffix); below a half it becomes ANY

and the pattern goes into the latent's trie (trie.py). Tokens are counted:

    precision  P(latent on | explanation fires)     recall  P(explanation fires | latent on)     F1  of the two

Every step asks for f of many short texts at once, over all latents and examples; texts of one length share a forward
pass. What autoencoders are not trained on is left out everywhere: the first token of a row, and special tokens.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse
import torch
from torch import Tensor

from helpers.activations.stream import normalise
from helpers.dictionaries.autoencoders import SparseAutoencoder
from helpers.evaluation.trie import ANY, START, Trie
from helpers.subjects.subject import Subject

Measure = Callable[[Sequence[np.ndarray], np.ndarray], np.ndarray]  # f: texts and a latent for each -> activations
HALF = 0.5  # of an activation: what a suffix must keep, and what a salient token must carry
ROWS_A_PASS = 16
TOKENS_A_PASS = 4096


class Example(NamedTuple):
    """A row of text up to the token on which `latent` has `activation`."""

    latent: int
    tokens: np.ndarray
    activation: float


class Suffix(NamedTuple):
    """The last tokens of an example, and their activation without the rest: the example's own if none were enough."""

    latent: int
    tokens: np.ndarray
    activation: float
    enough: bool


class Explained(NamedTuple):
    """What `explain` returns."""

    tries: dict[int, Trie]  # by latent
    examples: pd.DataFrame  # a row for each: latent, length of its suffix in tokens, enough, start, share of ANY


@torch.no_grad()
def site_activations(subject: Subject, rows: Tensor) -> Tensor:
    """Normalised activations at the site, ids (n_rows, T) -> (n_rows, T, d_model)."""
    return torch.cat([normalise(subject.residuals(part))[0].cpu() for part in rows.split(ROWS_A_PASS)])


@torch.no_grad()
def firings(sae: SparseAutoencoder, x: Tensor, studied: Tensor) -> scipy.sparse.csc_array:
    """Latents on activations x (n_rows, T, d_model), as a sparse (n_rows * T, n_latents); zero where not `studied`
    (n_rows, T)."""
    parts = []
    for part, read in zip(x.split(ROWS_A_PASS), studied.split(ROWS_A_PASS), strict=True):
        latents = sae.eval().encode(part.flatten(0, 1).to(sae.W_enc.device))
        latents[~read.flatten()] = 0
        parts.append(scipy.sparse.csr_array(latents.cpu().numpy()))
    return scipy.sparse.vstack(parts, format="csc")


def examples_of(
    codes: scipy.sparse.csc_array, rows: np.ndarray, latents: Iterable[int], n: int = 16, seed: int = 0
) -> list[Example]:
    """Up to n random activations of each latent; `codes` are the firings on the ids `rows` (n_rows, T).

    Activations are drawn, not documents, so that a text with many of them comes more often. A latent's examples do not
    depend on which others are asked for. Raises ValueError naming latents that never fire.
    """
    latents, (_, T) = [int(latent) for latent in latents], rows.shape
    if silent := [latent for latent in latents if codes.indptr[latent] == codes.indptr[latent + 1]]:
        raise ValueError(f"latents {silent} never fire on these {len(rows)} rows: leave them out, or read more text")
    found = []
    for latent in latents:
        column = slice(codes.indptr[latent], codes.indptr[latent + 1])
        places, values = codes.indices[column], codes.data[column]
        order = np.random.default_rng((seed, latent)).permutation(len(places))[:n]
        found += [
            Example(latent, rows[p // T, : p % T + 1], a) for p, a in zip(places[order], values[order], strict=True)
        ]
    return found


@torch.no_grad()
def last_activations(
    subject: Subject, sae: SparseAutoencoder, texts: Sequence[np.ndarray], latents: np.ndarray
) -> np.ndarray:
    """The activation of latents[i] on the last token of texts[i], each text read from its first token on: (n,).

    The latent passes its autoencoder's own activation, so under TopK it must be among the k largest.
    """
    found, lengths = np.zeros(len(texts), np.float32), np.array([len(text) for text in texts])
    for length in np.unique(lengths):
        places = np.flatnonzero(lengths == length)
        rows, row_of = np.unique([texts[place] for place in places], axis=0, return_inverse=True)
        wanted = torch.as_tensor(latents[places])
        for start, code in _codes_at_the_end(subject, sae, torch.as_tensor(rows.astype(np.int64))):
            inside = (row_of >= start) & (row_of < start + len(code))
            found[places[inside]] = code[row_of[inside] - start, wanted[inside]].cpu().numpy()
    return found


def explain(measure: Measure, examples: Sequence[Example], pad: int, longest: int = 16) -> Explained:
    """A trie for each latent, from its examples: see the module's head.

    measure: f, such as functools.partial(last_activations, subject, sae). pad: id of a token that means little.
    longest: tokens a suffix may have. Where that is not enough, the suffix of that length is held against the whole
    example's activation, so that nearly all its tokens stay, and `examples.enough` tells.
    """
    if not examples:
        raise ValueError("there is nothing to explain: give at least one example")
    if longest < 1:
        raise ValueError(f"a suffix of {longest} tokens explains nothing: choose longest >= 1")
    suffixes = minimal_suffixes(measure, examples, longest)
    starts, salient = _starts(measure, suffixes, examples, pad), _salient(measure, suffixes, pad)
    tries, rows = {example.latent: Trie() for example in examples}, []
    for suffix, start, keep in zip(suffixes, starts, salient, strict=True):
        pattern = np.where(keep, suffix.tokens, ANY)
        tries[suffix.latent].insert([*([START] if start else []), *pattern], suffix.activation)
        rows.append((suffix.latent, len(pattern), suffix.enough, start, 1 - keep.mean()))
    return Explained(tries, pd.DataFrame(rows, columns=["latent", "length", "enough", "start", "any"]))


def minimal_suffixes(measure: Measure, examples: Sequence[Example], longest: int) -> list[Suffix]:
    """The shortest suffix of each example that keeps half of its activation.

    Activation need not grow with length, so every length is asked for, in windows that double: 1-2, 3-4, 5-8, ...
    """
    found, low = {}, 0
    while low < longest and len(found) < len(examples):
        high = min(max(2, 2 * low), longest)
        trials = [
            (i, length)
            for i, example in enumerate(examples)
            if i not in found
            for length in range(low + 1, min(high, len(example.tokens)) + 1)
        ]
        texts = [examples[i].tokens[-length:] for i, length in trials]
        activations = _measured(measure, texts, [examples[i].latent for i, _ in trials])
        for (i, _), text, activation in zip(trials, texts, activations, strict=True):
            if i not in found and activation >= HALF * examples[i].activation:
                found[i] = Suffix(examples[i].latent, text, activation, True)
        low = high
    return [found.get(i) or Suffix(e.latent, e.tokens[-longest:], e.activation, False) for i, e in enumerate(examples)]


def predictions(
    tries: Mapping[int, Trie], rows: np.ndarray, studied: np.ndarray, n_latents: int
) -> scipy.sparse.csc_array:
    """What the tries predict on ids (n_rows, T) where they are `studied`, as a sparse (n_rows * T, n_latents) like
    `firings`."""
    indices, values, counts = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)], np.zeros(n_latents + 1, np.int64)
    for latent in sorted(tries):
        predicted = tries[latent].predict(rows)
        predicted[~studied] = 0
        indices.append(np.flatnonzero(predicted))
        values.append(predicted.flat[indices[-1]])
        counts[latent + 1] = len(indices[-1])
    parts = np.concatenate(values), np.concatenate(indices), counts.cumsum()
    return scipy.sparse.csc_array(parts, shape=(rows.size, n_latents))


def explanation_scores(
    predicted: scipy.sparse.csc_array, codes: scipy.sparse.csc_array, latents: Iterable[int]
) -> pd.DataFrame:
    """A row for each latent: tokens where it is `active`, where its explanation `fired`, where both (`hits`); its
    density, precision, recall, f1.

    Precision is nan for an explanation that never fires, recall for a latent that never does, f1 if neither does.
    """
    latents = list(latents)
    predicted, codes = predicted[:, latents] > 0, codes[:, latents] > 0
    table = pd.DataFrame({"latent": latents, "active": codes.sum(0), "fired": predicted.sum(0)})
    table["hits"] = predicted.multiply(codes).sum(0)
    return table.assign(
        density=table.active / codes.shape[0],
        precision=table.hits / table.fired,
        recall=table.hits / table.active,
        f1=2 * table.hits / (table.fired + table.active),
    )


def _codes_at_the_end(subject: Subject, sae: SparseAutoencoder, rows: Tensor) -> Iterable[tuple[int, Tensor]]:
    """Latents on the last token of rows (n, T), as (first row, (rows of a pass, n_latents)) pairs."""
    size = max(1, TOKENS_A_PASS // rows.shape[1])
    for start in range(0, len(rows), size):
        x = normalise(subject.residuals(rows[start : start + size])[:, -1])[0]
        yield start, sae.eval().encode(x.to(sae.W_enc.device))


def _starts(measure: Measure, suffixes: list[Suffix], examples: Sequence[Example], pad: int) -> np.ndarray:
    """Which suffixes count only at the start of a row: (n,)."""
    padded = _measured(measure, [np.r_[pad, s.tokens] for s in suffixes], [s.latent for s in suffixes])
    broken = padded < HALF * np.array([example.activation for example in examples])
    return broken & [suffix.enough for suffix in suffixes]


def _salient(measure: Measure, suffixes: list[Suffix], pad: int) -> list[np.ndarray]:
    """Which tokens of each suffix stay in its pattern, (length,) each."""
    lengths = [len(suffix.tokens) for suffix in suffixes]
    texts = [_replaced(suffix.tokens, i, pad) for suffix in suffixes for i in range(len(suffix.tokens))]
    left = _measured(measure, texts, np.repeat([suffix.latent for suffix in suffixes], lengths))
    whole = np.repeat([suffix.activation for suffix in suffixes], lengths)
    return np.split(1 - left / whole >= HALF, np.cumsum(lengths)[:-1])


def _replaced(tokens: np.ndarray, at: int, token: int) -> np.ndarray:
    replaced = tokens.copy()
    replaced[at] = token
    return replaced


def _measured(measure: Measure, texts: Sequence[np.ndarray], latents: Sequence[int]) -> np.ndarray:
    found = np.asarray(measure(texts, np.asarray(latents))) if len(texts) else np.zeros(0, np.float32)
    if not np.isfinite(found).all():
        raise ValueError(
            "activations of some texts are NaN or infinite: check the subject and the autoencoder's weights"
        )
    return found
