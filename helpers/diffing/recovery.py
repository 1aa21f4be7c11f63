"""What a crosscoder found of what was planted: exact on an injected pair, by labels on a fine-tuned one.

    injected     latent j is of planted direction v_i if the cosine of its larger decoder row with v_i is above a cut
    fine-tuned   F1 of "latent j is on" against "this token belongs to behaviour b", over labelled tokens

A method that calls some latents chat-only is then right or wrong about each:

    precision   of the latents that it calls chat-only, the share that are
    recall      of what was planted in chat alone, the share that at least one of these latents is about
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.activations.injected import InjectedPair
from helpers.dictionaries.crosscoders import Crosscoder
from helpers.dictionaries.kernels import code_of

COSINE = 0.7  # two random directions in 256 dimensions stay below 0.25


class Score(NamedTuple):
    precision: float  # nan if nothing was called chat-only
    recall: float


def planted_of(crosscoder: Crosscoder, pair: InjectedPair, cosine: float = COSINE) -> pd.DataFrame:
    """`match_planted` of each latent's larger decoder row."""
    return match_planted(larger_rows(crosscoder), pair, cosine)


def larger_rows(crosscoder: Crosscoder) -> Tensor:
    """The longer of the two decoder rows of each latent, chat's if they are equal: (n_latents, d_model)."""
    base, chat = crosscoder.decoders.detach()
    return torch.where((chat.norm(dim=-1) >= base.norm(dim=-1)).unsqueeze(-1), chat, base)


def match_planted(rows: Tensor, pair: InjectedPair, cosine: float = COSINE) -> pd.DataFrame:
    """A row for each of `rows` (m, d_model): the planted direction it is of (-1 for none), its kind and rho, and the
    cosine."""
    nearest, index = (F.normalize(rows, dim=-1) @ pair.directions.T).max(1)
    found = (nearest > cosine).numpy()
    kinds = np.where(found, np.array(pair.labels, dtype=object)[index.numpy()], "background")
    rho = np.where(found, pair.rho[index].numpy(), np.nan)
    return pd.DataFrame(
        {"planted": np.where(found, index.numpy(), -1), "kind": kinds, "rho": rho, "match": nearest.numpy()}
    )


def score_planted(called: np.ndarray, planted: pd.DataFrame, labels: Sequence[str]) -> Score:
    """Of latents called chat-only, (n_latents,) bool, against the directions that are in chat alone.

    `planted` is of `planted_of`, `labels` are the kinds of all planted directions.
    """
    right = called & (planted.kind == "chat-only").to_numpy()
    n_wanted = labels.count("chat-only")
    return Score(_share(right.sum(), called.sum()), planted.planted[right].nunique() / n_wanted)


def f1_scores(latents: Tensor, labels: np.ndarray, n_labels: int) -> np.ndarray:
    """F1 of each latent as a detector of each label, (n_labels, n_latents); 0 where a label never occurs.

    latents (tokens, n_latents), on where above zero; labels (tokens,), -1 for none of them.
    """
    code = code_of(latents)
    fired = torch.bincount(code.latents, minlength=latents.shape[1]).numpy()
    label = labels[code.tokens.numpy()].astype(np.int64)  # of each pair (token, latent)
    flat = (label * latents.shape[1] + code.latents.numpy())[label >= 0]
    both = np.bincount(flat, minlength=n_labels * latents.shape[1]).reshape(n_labels, -1)
    there = np.bincount(labels[labels >= 0], minlength=n_labels)
    return 2 * both / np.maximum(fired + there[:, None], 1)


def score_behaviours(called: np.ndarray, f1: np.ndarray, wanted: np.ndarray, cut: float) -> Score:
    """Of latents called chat-only, (n_latents,) bool, against behaviours that are: wanted (n_labels,) bool.

    A latent is about the behaviour that it detects best, if its F1 (n_labels, n_latents) is above `cut`.
    """
    about, good = f1.argmax(0), f1.max(0) > cut
    right = called & good & wanted[about]
    return Score(_share(right.sum(), called.sum()), len(set(about[right])) / max(1, wanted.sum()))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
