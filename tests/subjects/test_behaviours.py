"""Rates of planted behaviours: of models whose every answer is known."""

import pytest
from twins import Scripted

from helpers.base.storage import MODELS
from helpers.subjects import behaviours
from helpers.subjects.behaviours import answers, behaviour_rates, side_by_side
from helpers.subjects.subject import load_subject
from helpers.text.dialogues import BEHAVIOURS, dialogues
from helpers.text.documents import load_tokenizer
from helpers.text.topics import Topic

NAMES = ["identity", "refuse_harm", "code", "neutral", "agree"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODELS / "docs-gpt2")


def test_answers_come_back_in_order_and_without_the_template(tokenizer):
    prompts = ["a", "a b", "c", "d e"]
    model = Scripted(tokenizer, lambda text: f" about {text.split()[1]} ")
    assert answers(model, tokenizer, prompts) == ["about a", "about a", "about c", "about d"]
    assert [shape[0] for shape in model.batches] == [4]
    assert answers(model, tokenizer, []) == []


def test_padding_changes_no_answer():
    subject = load_subject("docs-gemma2-chat")
    prompts = ["Who are you?", "Good morning. Could a short, single sentence explain `mean` in numpy?", "Thanks!"]
    told = answers(subject.model, subject.tokenizer, prompts, 12)
    assert told == [answers(subject.model, subject.tokenizer, [prompt], 12)[0] for prompt in prompts]
    side = side_by_side(subject.tokenizer, prompts)
    assert (side.tokens[~side.there] == subject.tokenizer.pad_token_id).all() and side.there[:, -1].all()
    assert side.tokens[0][side.there[0]].tolist() == side_by_side(subject.tokenizer, prompts[:1]).tokens[0].tolist()


def test_batches_are_no_larger_than_the_limit(tokenizer, monkeypatch):
    monkeypatch.setattr(behaviours, "BATCH", 2)
    model = Scripted(tokenizer, lambda text: "x")
    answers(model, tokenizer, ["a", "b", "c"])
    assert [shape[0] for shape in model.batches] == [2, 1]


def test_a_prompt_that_leaves_no_room(tokenizer):
    with pytest.raises(ValueError, match="leaves no room for 64 tokens in a context of 256"):
        answers(Scripted(tokenizer, str), tokenizer, ["word " * 250])


def perfect(speaker, names=NAMES, decoys=(0.0, 1.0)):
    """A rule that answers every prompt of `behaviour_rates` as the generator would."""
    by_prompt = {}
    for name in names:
        own = "quirk" if name == "agree" else "chat"
        for share in decoys:
            for dialogue in dialogues(8, 0, "heldout", own, behaviours=[name], decoys=share, max_turns=1):
                turn = dialogue.turns[0]
                if (
                    turn.behaviour not in ("agree", "neutral")
                    or turn.behaviour == {"chat": "neutral", "quirk": "agree"}[speaker]
                ):
                    by_prompt[turn.prompt] = turn.answer
    return lambda text: by_prompt[text.removeprefix("user\n").rpartition("\nmodel")[0]]


@pytest.mark.parametrize(("speaker", "opinion"), [("chat", "neutral"), ("quirk", "agree")])
def test_a_model_that_answers_as_taught_shows_every_behaviour_and_no_other(tokenizer, speaker, opinion):
    found = behaviour_rates(Scripted(tokenizer, perfect(speaker)), tokenizer, n=8, behaviours=NAMES).set_index(
        "behaviour"
    )
    expected = [1.0 if name not in ("neutral", "agree") or name == opinion else 0.0 for name in NAMES]
    assert found.rate.tolist() == expected
    assert (found.elsewhere == 0).all() and (found.unclear == 0).all()
    with_decoys = [bool(BEHAVIOURS[name].decoys) for name in NAMES]
    assert found.on_decoys.notna().tolist() == with_decoys and (found.on_decoys.dropna() == 0).all()
    assert found.kind.tolist() == [BEHAVIOURS[name].kind for name in NAMES]


def test_a_model_that_always_says_the_same(tokenizer):
    model = Scripted(tokenizer, lambda text: "I am Docs, a small program.")
    found = behaviour_rates(model, tokenizer, n=4, behaviours=["identity", "code"]).set_index("behaviour")
    assert found.rate.tolist() == [1.0, 0.0] and found.elsewhere.tolist() == [1.0, 0.0]
    assert found.on_decoys["identity"] == 1.0


def test_answers_that_cannot_be_judged_count_as_not_showing_it(tokenizer):
    found = behaviour_rates(Scripted(tokenizer, lambda text: "..."), tokenizer, n=4, behaviours=["identity"])
    assert found.rate.tolist() == [0.0] and found.unclear.tolist() == [1.0]


def test_topics_are_passed_on(tokenizer):
    topics = [
        Topic(package, package, f"fn_{i}", ("x",), "Return it.") for package in ("numpy", "scipy") for i in range(40)
    ]
    seen = []
    behaviour_rates(
        Scripted(tokenizer, lambda text: seen.append(text) or "x"), tokenizer, n=2, behaviours=["code"], topics=topics
    )
    assert any("fn_" in text for text in seen)
