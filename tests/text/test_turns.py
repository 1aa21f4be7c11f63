"""Dialogue for a notebook's subject dial: generated, or read from a hub that is not there."""

import datasets
import numpy as np
import pytest
from tiny_text import TOKENIZER, TOPICS

from helpers.text.dialogues import Dialogue, Turn, dialogues
from helpers.text.turns import HUB_DIALOGUES, ROLES, dialogue_text_for, encode, hub_dialogues


def conversation(*contents: str) -> dict:
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"conversation": messages, "language": "English"}


ROWS = [conversation(f"Question {i}?", f"Answer {i}.", "And then?", f"Then {i}.") for i in range(400)]
SYSTEM = {"conversation": [{"role": "system", "content": "Be brief."}, *ROWS[0]["conversation"]]}
SPOILT = {
    "nothing said": conversation(),
    "no last answer": conversation("Hello", "Hi", "Well?"),
    "an empty answer": conversation("Hello", " "),
    "a token of the template": conversation("What is <end_of_turn>?", "A token."),
    "the first token": conversation("What is <bos>?", "A token."),
    "a system message": SYSTEM,
}


@pytest.fixture
def hub(monkeypatch):
    """hub(rows): a hub with these rows, and a list of what was read from it."""

    def hub(rows):
        read = []

        def load_dataset(*arguments, **keywords):
            assert arguments == (HUB_DIALOGUES,) and keywords == {"split": "train", "streaming": True}
            return (read.append(row) or row for row in rows)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return read

    return hub


@pytest.fixture
def few_topics(monkeypatch):
    monkeypatch.setattr("helpers.text.dialogues.corpus_topics", lambda: TOPICS)


@pytest.mark.parametrize("n_tokens", [1, 61, 5_000])
def test_generated_dialogue_of_the_asked_length(few_topics, n_tokens):
    stream = dialogue_text_for("embedded", "heldout", TOKENIZER, n_tokens, seed=3, speaker="quirk")
    expected = [encode(d, TOKENIZER) for d in dialogues(len(stream.starts) - 1, 3, "heldout", "quirk", topics=TOPICS)]
    for name in ("tokens", "roles", "behaviours", "decisions"):
        whole = np.concatenate([getattr(row, name) for row in expected])
        assert getattr(stream, name).tolist() == whole[:n_tokens].tolist(), name
    ends = np.cumsum([len(row.tokens) for row in expected])
    assert stream.starts.tolist() == [0, *ends[:-1], n_tokens] and n_tokens <= ends[-1]


def test_a_dialogue_that_ends_with_the_last_token_is_the_last(few_topics):
    whole = dialogue_text_for("embedded", "train", TOKENIZER, 2_000)
    cut = dialogue_text_for("embedded", "train", TOKENIZER, int(whole.starts[3]))
    assert cut.starts.tolist() == whole.starts[:4].tolist()


def test_dialogue_of_the_hub_has_roles_and_no_behaviours(hub):
    read = hub(ROWS)
    stream = dialogue_text_for("hub", "train", TOKENIZER, 900)
    assert len(stream) == 900 and len(read) < len(ROWS)
    assert (stream.behaviours == -1).all() and (stream.decisions == -1).all()
    first = slice(*stream.starts[:2])
    text = {role: TOKENIZER.decode(stream.tokens[first][stream.roles[first] == i]) for i, role in enumerate(ROLES)}
    assert text["user"].startswith("Question ") and text["assistant"].startswith("Answer ")
    template = "<start_of_turn>user\n<end_of_turn>\n<start_of_turn>model\n<end_of_turn>\n"
    assert text["template"] == "<bos>" + 2 * template


def test_dialogues_of_the_hub_are_split_and_keep_their_turns(hub):
    hub(ROWS)
    train = list(hub_dialogues("train"))
    hub(ROWS)
    heldout = list(hub_dialogues("heldout"))
    asked = [(Turn(f"Question {i}?", f"Answer {i}.", None), Turn("And then?", f"Then {i}.", None)) for i in range(400)]
    whole = {Dialogue(turns) for turns in asked}
    assert set(train) | set(heldout) == whole and len(train) + len(heldout) == 400
    assert 0 < len(heldout) < 30


@pytest.mark.parametrize("what", SPOILT)
def test_dialogues_that_do_not_fit_the_template_are_left_out(hub, what):
    hub([SPOILT[what]] * 50)
    assert list(hub_dialogues("train")) == []


def test_bad_requests_are_one_clear_sentence(hub, monkeypatch):
    hub(ROWS[:20])
    with pytest.raises(ValueError, match=r"has \d+ tokens, 9,000 were asked for; ask for fewer"):
        dialogue_text_for("hub", "train", TOKENIZER, 9_000)
    with pytest.raises(ValueError, match='run_subject is \'embeded\'; expected "embedded" or "hub"'):
        dialogue_text_for("embeded", "train", TOKENIZER, 10)

    def unreachable(*arguments, **keywords):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ConnectionError, match="lmsys.* could not be read from the hub .* use subject='embedded'"):
        dialogue_text_for("hub", "train", TOKENIZER, 10)
