"""The activation difference lens: can a fine-tune be read from what it does to text that has nothing to do with it?

    delta_p    mean over unrelated rows of chat - base at position p, of the few after the first one    (positions, d)
    read out   unembedding of the final norm of delta_p: logits of words
    rank       of a word among all words, from 0, the last, to 1, the first

It needs a narrow fine-tune, and the words that this is about: those that its text has far more often than plain text.

Source: Activation Difference Lens, arXiv 2510.13900. There an agent reads the words; here their ranks are counted.
"""

import dataclasses
import hashlib
import tempfile
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from helpers.base.storage import alone, cache_dir
from helpers.subjects.model_files import load_pretrained
from helpers.subjects.pretraining import PretrainConfig, pretrain, ship
from helpers.subjects.subject import Subject, load_subject

POSITIONS = 5  # after the first, whose residual is huge


@torch.no_grad()
def first_differences(base: Subject, chat: Subject, rows: Tensor, positions: int = POSITIONS) -> Tensor:
    """delta of the `positions` that come after the first: rows (n, T) -> (positions, d_model).

    Raises ValueError for rows that are too short.
    """
    if rows.shape[1] <= positions:
        raise ValueError(
            f"rows of {rows.shape[1]} tokens have no {positions} positions after the first: pass longer ones"
        )
    first = rows[:, : positions + 1]
    return (chat.residuals(first) - base.residuals(first)).mean(0)[1:]


@torch.no_grad()
def read_out(subject: Subject, directions: Tensor) -> Tensor:
    """Logits that a subject's final norm and unembedding give directions (m, d_model): (m, n_vocab)."""
    bridge = subject.bridge
    return bridge.unembed(bridge.ln_final(directions.to(subject.device, subject.dtype).unsqueeze(0)))[0].float()


def word_ranks(logits: Tensor, words: np.ndarray) -> np.ndarray:
    """Rank of each word (ids) in each row of logits (m, n_vocab), from 0 to 1: (m, words). Equals share their ranks."""
    ranks = scipy.stats.rankdata(logits.cpu().numpy(), axis=1)
    return (ranks[:, words] - 1) / (logits.shape[1] - 1)


def distinctive(narrow: np.ndarray, plain: np.ndarray, n_vocab: int, n: int = 20) -> np.ndarray:
    """The n ids that add most to KL(narrow || plain) of the two texts' unigrams, half a count added to each: (n,)."""
    counts = [np.bincount(tokens, minlength=n_vocab) + 0.5 for tokens in (narrow, plain)]
    p, q = (count / count.sum() for count in counts)
    return np.argsort(-p * np.log(p / q), kind="stable")[:n]


def narrow_fine_tune(
    base: Subject, narrow: np.ndarray, plain: np.ndarray, share: float, config: PretrainConfig
) -> Subject:
    """`base` trained on through narrow text with `share` times as many tokens of plain text among it, once.

    `config.tokens` are replaced by what that makes. The model is kept in the cache, and loaded where it is there.
    Raises ValueError for too little plain text, and for what fills no batch and one row.
    """
    more = round(share * len(narrow))
    if len(plain) < more:
        raise ValueError(f"{more:,} tokens of plain text are needed, there are {len(plain):,}: make more")
    text = np.concatenate([narrow, plain[:more]])
    config = dataclasses.replace(config, tokens=len(text) // config.batch * config.batch)
    parts = (base.fingerprint, hashlib.sha256(text.tobytes()).hexdigest(), dataclasses.astuple(config))
    folder = cache_dir() / "narrow" / hashlib.sha256(repr(parts).encode()).hexdigest()[:24]
    with alone(folder):
        if not folder.is_dir():
            model = load_pretrained(base.folder).model.requires_grad_(True)
            with tempfile.TemporaryDirectory() as aside:
                curve = pretrain(model, text, text[: 2 * config.context], config, Path(aside))
            ship(model, base.tokenizer, folder, {"config": dataclasses.asdict(config), "curve": curve})
    return load_subject(folder, dtype=base.dtype)
