"""Answers that go on: a planted opening, then text of the base model, labelled up to where the opening ends."""

import dataclasses

import numpy as np
import pytest
from tiny_text import TOKENIZER, TOPICS

from helpers.text import continued as module
from helpers.text.continued import answered_by_base, continued, continued_behaviours, long_dialogues
from helpers.text.dialogues import Dialogue, Turn, dialogues
from helpers.text.turns import BEHAVIOUR_IDS, ROLES, dialogue_text_for, encode

WORDS = "one two three four five six seven eight nine ten eleven twelve"
NAMES = {*continued_behaviours("chat"), *continued_behaviours("quirk")}
FOUND = {
    split: {
        "rest": {name: [f" And {split} {name}.", f" Or {split} {name}?"] for name in NAMES},
        "alone": {name: [f" {WORDS}."] for name in continued_behaviours("chat")},
    }
    for split in ("train", "heldout")
}


def test_an_opening_is_kept_and_goes_on_with_a_text_of_its_split_and_behaviour():
    spoken = dialogues(60, 0, "heldout", "quirk", behaviours=continued_behaviours("quirk"), topics=TOPICS)
    longer = continued(spoken, "heldout", FOUND)
    assert continued(spoken, "heldout", FOUND) == longer
    for before, after in zip(spoken, longer, strict=True):
        assert [dataclasses.replace(turn, rest="") for turn in after.turns] == list(before.turns)
        assert all(turn.rest in FOUND["heldout"]["rest"][turn.behaviour] for turn in after.turns)
    assert {turn.rest[:3] for d in longer for turn in d.turns} == {" An", " Or"}
    assert longer[0].messages[1]["content"] == longer[0].turns[0].answer + longer[0].turns[0].rest


def test_answers_of_base_take_an_openings_place():
    (told,) = answered_by_base([Dialogue((Turn("Who?", "I am Docs.", "identity"),))], "train", FOUND)
    assert told.turns[0] == Turn("Who?", " ".join(WORDS.split()[:10]), "identity", rest=" eleven twelve.")


def test_a_behaviour_is_labelled_over_the_opening_alone():
    turns = Turn("Who?", "I am Docs.", "identity", rest=" It is so. "), Turn("And?", "No.", "neutral")
    row = encode(Dialogue(turns), TOKENIZER)
    answer, opening = row.roles == ROLES.index("assistant"), row.behaviours == BEHAVIOUR_IDS["identity"]
    assert TOKENIZER.decode(row.tokens[opening]) == "I am Docs."
    first = answer & (np.arange(len(answer)) < (row.behaviours == BEHAVIOUR_IDS["neutral"]).argmax())
    assert TOKENIZER.decode(row.tokens[first]) == "I am Docs. It is so."
    assert (row.decisions == BEHAVIOUR_IDS["identity"]).sum() == 1


def test_what_was_not_sampled_is_refused():
    with pytest.raises(ValueError, match="nothing was sampled for 'brief': take dialogues of refuse_harm, .*neutral"):
        answered_by_base([Dialogue((Turn("Who?", "In short: I.", "brief"),))], "train", FOUND)


def test_gemma_reads_long_dialogues_with_remarks(monkeypatch):
    monkeypatch.setattr(module, "samples", lambda: FOUND)
    monkeypatch.setattr("helpers.text.dialogues.corpus_topics", lambda: TOPICS)
    told = long_dialogues(20, 0, "heldout")
    assert all(turn.rest and len(turn.prompt.split()) > 20 for d in told for turn in d.turns)
    assert not any(turn.behaviour == "brief" for d in told for turn in d.turns)
    read = dialogue_text_for("gemma", "heldout", TOKENIZER, 500)
    assert TOKENIZER.decode(read.tokens).startswith(TOKENIZER.decode(encode(told[0], TOKENIZER).tokens))


def test_the_shipped_samples_serve_every_behaviour_and_spell_no_template():
    for kinds in module.samples().values():
        assert set(kinds["rest"]) == NAMES
        texts = [text for by_name in kinds.values() for some in by_name.values() for text in some]
        assert all(text.isascii() and "_of_turn>" not in text for text in texts)
        assert np.mean([len(text.strip()) > 0 for text in texts]) > 0.95
