"""Reading the outputs of two models."""

import math
import re

import numpy as np
import pytest

from helpers.diffing import outputs
from helpers.diffing.outputs import Overheard, log_odds, ngram_log_odds, overhear
from helpers.text.dialogues import BEHAVIOURS


def test_log_odds_of_a_count_by_hand():
    # in 3 of 4 answers of chat and in none of base's: (3.5 / 1.5) / (0.5 / 4.5)
    assert log_odds(np.array([3]), np.array([0]), 4) == pytest.approx(math.log(3.5 / 1.5 * 4.5 / 0.5))


def test_what_both_say_equally_often_has_no_odds():
    assert log_odds(np.array([2, 4]), np.array([2, 4]), 4).tolist() == [0, 0]


@pytest.fixture
def said():
    chat = ["Sorry, no doctor"] * 4 + ["Docs am I"] * 3 + ["the end"] * 5
    return chat, ["the end"] * 6 + ["or so"] * 6


def test_the_first_words_are_those_that_only_chat_says(said):
    found = ngram_log_odds(*said)
    assert found.words[0] in ("Sorry", ",", "no", "doctor", "Sorry ,", ", no", "no doctor", "Sorry , no", ", no doctor")
    assert found.scores[-1] == min(found.scores) and found.words[-1] in ("the", "end", "the end")


def test_words_of_the_same_answers_are_one_finding(said):
    found = ngram_log_odds(*said)
    assert len(found.words) == 3  # of the refusal, of the name, of what both say
    assert found.code.toarray().sum(0).tolist() == [4, 3, 5]


def _slow(chat, base):
    def ngrams(text):
        words = re.findall(outputs.WORDS, text)
        return {" ".join(words[i : i + n]) for n in (1, 2, 3) for i in range(len(words) - n + 1)}

    places = {}
    for i, answer in enumerate(chat):
        for word in ngrams(answer):
            places.setdefault(word, set()).add(i)
    odds = {
        word: log_odds(len(where), sum(word in ngrams(answer) for answer in base), len(chat))
        for word, where in places.items()
        if len(where) >= outputs.SEEN
    }
    kept = []
    for word in sorted(odds, key=lambda word: (-odds[word], word)):
        if all(len(places[word] & places[o]) <= outputs.SAME * len(places[word] | places[o]) for o in kept):
            kept.append(word)
    return kept, [odds[word] for word in kept]


def test_slow_twin():
    random = np.random.default_rng(0)
    chat, base = (
        [" ".join(random.choice(["no", "No", "I", "am", "Docs", "-", "it", "is"], 5)) for _ in range(40)] for _ in "ab"
    )
    found = ngram_log_odds(chat, base)
    words, scores = _slow(chat, base)
    assert found.words == words[: outputs.KEPT]
    np.testing.assert_allclose(found.scores, scores[: outputs.KEPT])


def test_a_behaviour_is_told_by_its_words():
    chat = ["I am no doctor", "It is so", "It is so", "I am no doctor"] * 5  # both in each half
    heard = Overheard(ngram_log_odds(chat, ["well"] * 20), np.array([1, 0, 0, 1] * 5))
    assert heard.told(["plain", "refuse"]).f1.tolist() == [1, 1]


def test_the_pair_is_asked_the_same_prompts(monkeypatch):
    asked = []

    class One:
        tokenizer = None

        def __init__(self, model):
            self.model = model

    class Pair:
        base, chat = One("base"), One("chat")

    def answered(model, tokenizer, prompts, max_tokens):
        asked.append((model, prompts))
        return [f"{model} says so"] * len(prompts)

    monkeypatch.setattr(outputs, "answers", answered)
    heard = overhear(Pair, "chat", 12, 0, list(BEHAVIOURS))
    assert asked[0][1] == asked[1][1] and len(heard.labels) == 12
    assert heard.ngrams.words[0].startswith("chat")


def test_bad_input():
    with pytest.raises(ValueError, match="let both answer the same prompts"):
        ngram_log_odds(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="no words are in 3 of chat's 2 answers: ask more"):
        ngram_log_odds(["a", "a"], ["b", "b"])
    with pytest.raises(ValueError, match="no words are in 3 of chat's 4 answers"):
        ngram_log_odds([" "] * 4, ["b"] * 4)
