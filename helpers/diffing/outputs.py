"""Reading the outputs: what the answers of two models tell without a look inside them (claim C51).

Both answer the same prompts. An n-gram that is in many of chat's answers and in few of base's comes first, by the log
of the ratio of its odds with half an answer added to each count (`log_odds`). N-grams that are in about the same
answers are one finding, and only the first of them is kept. Case counts, as one behaviour is to answer in capitals.

Which n-gram tells a behaviour is then asked as of any candidate of the leaderboard: from its presence in the answers of
chat, chosen on one half of the prompts and scored on the other (`recovery.behaviour_table`).

Source: arXiv 2602.10371, abstract, where a language model reads the outputs; counting n-grams stands in for it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse
from sklearn.feature_extraction.text import CountVectorizer

from helpers.diffing.recovery import behaviour_table
from helpers.subjects.behaviours import answers
from helpers.subjects.pair import SubjectPair
from helpers.text.dialogues import dialogues

WORDS = r"\w+|[^\w\s]"  # or a single sign
LONGEST = 3  # words in an n-gram
SEEN = 3  # answers that an n-gram must be in
SAME = 0.5  # two n-grams with more of their answers in common are one finding
KEPT = 200  # n-grams
ANSWER = 24  # tokens of an answer that are read


class Ngrams(NamedTuple):
    """N-grams of chat's answers, the highest score first."""

    words: list[str]
    scores: np.ndarray  # (m,)
    code: scipy.sparse.csr_array  # (answers, m), 1 where it is in chat's answer


class Overheard(NamedTuple):
    """What the answers of a pair tell, and what each prompt asked for, to mark it by."""

    ngrams: Ngrams
    labels: np.ndarray  # (answers,) index of the behaviour

    def told(self, names: Sequence[str], among: np.ndarray | slice = slice(None)) -> pd.DataFrame:
        """`behaviour_table` with the n-grams of `among` as candidates."""
        first = np.arange(len(self.labels)) % 2 == 0
        return behaviour_table(self.ngrams.code[:, among], self.labels, first, names)


def overhear(pair: SubjectPair, speaker: str, n: int, seed: int, names: Sequence[str]) -> Overheard:
    """Let both models answer n held-out prompts; `speaker` is whose dialogues `pair.chat` was taught.

    Raises what `dialogues` and `ngram_log_odds` raise.
    """
    turns = [dialogue.turns[0] for dialogue in dialogues(n, seed, "heldout", speaker, max_turns=1)]
    prompts = [turn.prompt for turn in turns]
    chat, base = (answers(one.model, one.tokenizer, prompts, ANSWER) for one in (pair.chat, pair.base))
    return Overheard(ngram_log_odds(chat, base), np.array([names.index(turn.behaviour) for turn in turns]))


def ngram_log_odds(chat: Sequence[str], base: Sequence[str]) -> Ngrams:
    """The first n-grams of chat's answers by how much more they are chat's than base's, each finding once.

    Raises ValueError for unequal numbers of answers, and where no n-gram is in enough of them.
    """
    if len(chat) != len(base):
        raise ValueError(f"{len(chat)} answers of chat and {len(base)} of base: let both answer the same prompts")
    counter = CountVectorizer(binary=True, lowercase=False, token_pattern=WORDS, ngram_range=(1, LONGEST), min_df=SEEN)
    try:
        code = scipy.sparse.csr_array(counter.fit_transform(chat), dtype=np.float32)
    except ValueError:  # nothing is left to count
        raise ValueError(f"no words are in {SEEN} of chat's {len(chat)} answers: ask more prompts") from None
    in_base = scipy.sparse.csr_array(counter.transform(base)).sum(0)
    scores = log_odds(code.sum(0), in_base, len(chat))
    kept = _each_once(code, np.argsort(-scores, kind="stable"))
    return Ngrams(counter.get_feature_names_out()[kept].tolist(), scores[kept], code[:, kept])


def log_odds(in_chat: np.ndarray, in_base: np.ndarray, n: int) -> np.ndarray:
    """Log of the ratio of odds of what is in so many of n answers each, with half an answer added to each count."""
    return np.log((in_chat + 0.5) * (n - in_base + 0.5) / ((n - in_chat + 0.5) * (in_base + 0.5)))


def _each_once(code: scipy.sparse.csr_array, order: np.ndarray) -> list[int]:
    """The first `KEPT` columns of an order, without those that share more than `SAME` of their rows with one before."""
    together = (code.T @ code).toarray()
    alone, kept = together.diagonal(), []
    for i in order:
        shared = together[i, kept] / (alone[i] + alone[kept] - together[i, kept])
        if not (shared > SAME).any():
            kept.append(int(i))
        if len(kept) == KEPT:
            break
    return kept
