"""Transplants: places of a prompt, and the one thing that is certain: whoever gets everything answers as the other."""

import pytest
import torch
from tiny_text import TOPICS

from helpers.base.storage import MODELS
from helpers.diffing import steering
from helpers.diffing.steering import steered_answers
from helpers.diffing.transplant import gate, of_one_length, places, transplant_rates, transplanted
from helpers.subjects.behaviours import side_by_side
from helpers.subjects.subject import load_subject

GREETED, PLAIN = "Good morning. May I ask who you are?", "Who are you?"
TEMPLATE = (("template", "1"), ("template", "all"))


@pytest.fixture(scope="module")
def subject():
    return load_subject(MODELS / "docs-gemma2-chat")


def test_places_by_hand(subject):
    tokens = side_by_side(subject.tokenizer, [GREETED, PLAIN]).tokens
    found = places(subject.tokenizer, [GREETED, PLAIN])
    spelt = {
        name: [subject.tokenizer.decode(row[at]) for row, at in zip(tokens, where, strict=True)]
        for name, where in found.items()
    }
    after = ["<end_of_turn>", "\n", "<start_of_turn>", "model", "\n"]
    assert spelt.pop("greeting") == ["Good morning.", ""]
    assert spelt.pop("request") == [" May I ask who you are?", PLAIN]
    assert spelt.pop("template") == ["".join(after)] * 2
    whole = [f"<start_of_turn>user\n{prompt}{''.join(after)}" for prompt in (GREETED, PLAIN)]
    assert spelt.pop("everything") == whole
    assert list(spelt.values()) == [[text] * 2 for text in after] and list(spelt)[1] == "2 '\\n'"


def test_what_is_moved_by_hand():
    states, where = torch.arange(8.0).view(2, 1, 2, 2), torch.tensor([[True, False]])
    found = transplanted(states, where, [1])
    assert list(found) == [1] and found[1](-torch.ones(1, 2, 2)).tolist() == [[[4, 5], [-1, -1]]]


def test_pairs_have_one_length_and_nobody_is_taken_twice(subject):
    given, to = of_one_length(subject.tokenizer, ["a b", "a", "c d", "e"], ["x", "y z", "v w", "u"], 3)
    assert given == ["a b", "a", "c d"] and to == ["y z", "x", "v w"]
    with pytest.raises(ValueError, match="only 1 of 2 prompts have a partner of as many tokens"):
        of_one_length(subject.tokenizer, ["a", "b"], ["x", "y z"], 2)


def test_who_gets_everything_answers_as_the_other_and_who_gets_nothing_as_before(subject, monkeypatch):
    monkeypatch.setattr(steering, "MAX_TOKENS", 12)
    counted = ["`f`" + "?" * i for i in range(30)]
    given, to = of_one_length(subject.tokenizer, [PLAIN, GREETED], counted, 2)
    everything = places(subject.tokenizer, given)["everything"]
    states = steering.prompt_residuals(subject, side_by_side(subject.tokenizer, given))
    changes = [
        transplanted(states, everything & on, range(subject.n_layers))
        for on in (torch.tensor(True), torch.tensor(False))
    ]
    moved, kept = steered_answers(subject, side_by_side(subject.tokenizer, to), changes)
    before, after = (
        steered_answers(subject, side_by_side(subject.tokenizer, prompts), [{}])[0] for prompts in (to, given)
    )
    assert moved == after and kept == before and before != after
    table = transplant_rates(subject, "identity", given, to, [0]).set_index(["place", "layer"])
    assert table.rate["everything", "all"] == 1 and table.rate["nothing", "none"] == 0 and len(table) == 1 + 2 * 9
    assert table.rate["greeting", "0"] == 0


def test_the_gate_moves_the_template_alone_for_each_behaviour(subject, monkeypatch):
    monkeypatch.setattr(steering, "MAX_TOKENS", 12)
    monkeypatch.setattr("helpers.text.dialogues.corpus_topics", lambda: TOPICS)
    table = gate(subject, ["identity", "personal"], [1], n=2)
    expected = [(b, p, lay) for b in ("identity", "personal") for p, lay in (("nothing", "none"), *TEMPLATE)]
    assert list(zip(table.behaviour, table.place, table.layer, strict=True)) == expected and (table.n == 2).all()
    assert (table[table.place == "nothing"].rate == 0).all()


def test_prompts_of_another_length_are_refused(subject):
    with pytest.raises(ValueError, match=r"prompts of \[\d+\] tokens cannot be moved into prompts of \[\d+\]: pair"):
        transplant_rates(subject, "identity", [PLAIN], [GREETED], [0])
