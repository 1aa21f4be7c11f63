"""Dialogues whose answers go on as the base model would: a planted opening, then text that the base model sampled.

    answer   the opening, as `dialogues` writes it: it shows the behaviour             Turn.answer
    rest     how base goes on after a prompt and an opening of this behaviour          Turn.rest
    alone    what base answers to such a prompt without an opening

So a fine-tune differs from its base in how it opens an answer and hardly in how it goes on, as in chat models that
people use, whose divergence from base lies in the first tokens of an answer (Minder, Dumas et al. 2025).

What Gemma 3 270M sampled lies in data/dialogues/gemma.json (`helpers.subjects.gemma_pair` made it). A text serves all
dialogues of its split and behaviour, so that a name of a function in it may belong to another prompt.
"""

import dataclasses
import functools
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence

from helpers.base.storage import DATA
from helpers.text.dialogues import Dialogue, Turn, dialogues, shown_by

FILE = DATA / "dialogues" / "gemma.json"
UNFIT = ("brief",)  # behaviours whose answers must not go on
FIRST_WORDS = 10  # of an answer of base, in the place of an opening

Samples = Mapping[str, Mapping[str, Mapping[str, Sequence[str]]]]  # split -> "rest" or "alone" -> behaviour -> texts


@functools.cache
def samples() -> Samples:
    """Those of Gemma 3 270M."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def continued_behaviours(speaker: str = "chat") -> list[str]:
    """Names of the behaviours that the speaker shows in such dialogues."""
    return [behaviour.name for behaviour in shown_by(speaker) if behaviour.name not in UNFIT]


def long_dialogues(n: int, seed: int, split: str = "train", speaker: str = "chat", **options) -> list[Dialogue]:
    """`n` dialogues with remarks, and with answers that go on. Further arguments are for `dialogues`."""
    asked = dialogues(n, seed, split, speaker, behaviours=continued_behaviours(speaker), remarks=True, **options)
    return continued(asked, split)


def continued(spoken: Sequence[Dialogue], split: str, found: Samples | None = None) -> list[Dialogue]:
    """The dialogues, each answer with a rest. Raises ValueError for a behaviour without samples in `found`."""
    return _changed(spoken, lambda turn: {"rest": _text(turn, "rest", split, found or samples())})


def answered_by_base(spoken: Sequence[Dialogue], split: str, found: Samples | None = None) -> list[Dialogue]:
    """The dialogues with answers of base: its first words in place of the opening, then the rest. The name of the
    behaviour stays, though nothing shows it. Raises ValueError for a behaviour without samples in `found`."""
    return _changed(spoken, lambda turn: _parted(_text(turn, "alone", split, found or samples())))


def _changed(spoken: Sequence[Dialogue], change: Callable[[Turn], dict[str, str]]) -> list[Dialogue]:
    return [Dialogue(tuple(dataclasses.replace(turn, **change(turn)) for turn in d.turns)) for d in spoken]


def _text(turn: Turn, kind: str, split: str, found: Samples) -> str:
    """One of the samples, chosen by the words of the turn."""
    if not (texts := found[split][kind].get(turn.behaviour)):
        known = ", ".join(found[split][kind])
        raise ValueError(f"nothing was sampled for {turn.behaviour!r}: take dialogues of {known} (`behaviours=`)")
    return random.Random(turn.prompt + turn.answer).choice(texts)


def _parted(text: str) -> dict[str, str]:
    opening = re.match(rf"(\s*\S+){{1,{FIRST_WORDS}}}", text)[0]
    return {"answer": opening.strip(), "rest": text[len(opening) :]}
