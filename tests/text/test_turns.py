"""Dialogue for a notebook's subject dial: generated, or read from a hub that is not there.

Which positions predict an answer: by hand, and against the released code's masks written as loops.
"""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_text import TOKENIZER, TOPICS, A, T, U
from twins import slow_masks

from helpers.base.storage import MODELS
from helpers.text.dialogues import Dialogue, Turn, dialogues
from helpers.text.documents import load_tokenizer
from helpers.text.turns import (
    HUB_DIALOGUES,
    ROLES,
    DialogueStream,
    Encoded,
    answer_order,
    decisive,
    dialogue_text_for,
    dialogues_of,
    encode,
    hub_dialogues,
    rows_of,
)


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

        def column(name, column, *config, instead):
            assert (name, column, config) == (HUB_DIALOGUES, "conversation", ())
            return (read.append(row) or row[column] for row in rows)

        monkeypatch.setattr("helpers.base.hub.rows", column)
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


def test_turn_tokens_need_not_be_listed_as_special(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["extra_special_tokens"] = {"image_token": "<unk>"}  # as Gemma 3 has it
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    said = Dialogue((Turn("What?", "That.", None),))
    assert encode(said, load_tokenizer(tmp_path)).tokens.tolist() == encode(said, TOKENIZER).tokens.tolist()


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


def test_bad_requests_are_one_clear_sentence(hub):
    hub(ROWS[:20])
    with pytest.raises(ValueError, match=r"has \d+ tokens, 9,000 were asked for; ask for fewer"):
        dialogue_text_for("hub", "train", TOKENIZER, 9_000)
    with pytest.raises(ValueError, match='run_subject is \'embeded\'; expected "embedded", "hub" or "gemma"'):
        dialogue_text_for("embeded", "train", TOKENIZER, 10)


def test_no_network_is_one_clear_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("SUITE_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match='lmsys.* is not complete in the local .* use subject="embedded"'):
        dialogue_text_for("hub", "train", TOKENIZER, 10)


def dialogue(*roles):
    labels = np.full(len(roles), -1, np.int8)
    return Encoded(np.arange(100, 100 + len(roles), dtype=np.int32), np.array(roles, np.int8), labels, labels)


TWO_TURNS = [T, T, U, T, A, A, T, T, U, T, A, T]


def test_order_by_hand():
    assert answer_order(np.array(TWO_TURNS)).tolist() == [-1, -1, -1, 0, 1, 2, -1, -1, -1, 0, 1, -1]
    assert answer_order(np.array([T, U, T, A, A])).tolist() == [-1, -1, 0, 1, -1]  # cut: the last predicts nothing seen
    assert answer_order(np.array([T, U, U])).tolist() == [-1, -1, -1]


def test_an_answer_is_decided_in_the_template_and_its_first_nine_tokens():
    roles = np.array([T, U, U, T, T, *[A] * 12, T, U, T, A, A, T])
    expected = [1, 0, 0, 1, 1, *[1] * 9, 0, 0, 0, 1, 0, 1, 1, 1, 1]
    assert decisive(roles).tolist() == [bool(each) for each in expected]


turn = st.tuples(st.integers(1, 4), st.integers(1, 14))


@given(st.lists(turn, min_size=1, max_size=3), st.integers(0, 5))
def test_masks_equal_the_slow_twin(turns, cut):
    roles = [T] + [role for asked, said in turns for role in [T, *[U] * asked, T, T, *[A] * said, T]]
    roles = roles[: len(roles) - cut] if cut < turns[-1][1] else roles
    [rows] = rows_of([dialogue(*roles)], 200, 4)
    full, first = slow_masks(roles)
    assert (rows.order[0] >= 0).tolist() == full and rows.first_nine[0].tolist() == first


def test_first_nine_are_nine_and_leave_out_the_first():
    [rows] = rows_of([dialogue(T, U, T, *[A] * 30, T)], 64, 1)
    assert rows.order[0][rows.first_nine[0]].tolist() == list(range(1, 10))
    assert (rows.order >= 0).sum() == 31


def test_rows_come_shortest_first_and_padding_is_nothing():
    dialogues = [dialogue(*TWO_TURNS), dialogue(T, U, T, A), dialogue(T, U, T, A, T)]
    first, second = rows_of(dialogues, 12, 2)
    assert first.dialogues == [1, 2] and second.dialogues == [0]
    assert first.tokens.tolist() == [[100, 101, 102, 103, 0], [100, 101, 102, 103, 104]]
    assert first.roles.tolist() == [[T, U, T, A, -1], [T, U, T, A, T]]
    assert first.order.tolist() == [[-1, -1, 0, -1, -1], [-1, -1, 0, 1, -1]]
    assert first.template.tolist() == [[False, False, True, False, False], [False, False, True, False, True]]


def test_what_is_predicted_in_a_rendered_dialogue_is_the_answers_and_their_ends():
    tokenizer = load_tokenizer(MODELS / "docs-gpt2")
    said = ["It joins the parts of a path, and gives one string back.", "Yes."]
    turns = tuple(
        Turn(prompt, answer, behaviour=None) for prompt, answer in zip(["What does it do?", "Sure?"], said, strict=True)
    )
    [rows] = rows_of([encode(Dialogue(turns), tokenizer)], 256, 1)
    [order], [tokens] = rows.order, rows.tokens
    predicted = tokenizer.decode(tokens[1:][order[:-1] >= 0])
    assert predicted == "".join(f"{answer}<end_of_turn>" for answer in said)
    first = tokens[1:][rows.first_nine[0, :-1]]
    whole, end = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (said[0], said[1] + "<end_of_turn>")
    )
    assert first.tolist() == whole[1:10] + end[1:]


def test_dialogues_of_a_stream():
    parts = [dialogue(*TWO_TURNS), dialogue(T, U, U, U, T, A), dialogue(T, U, T, A)]
    joined = (np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Encoded))
    stream = DialogueStream(*joined, starts=np.array([0, 12, 18, 22]))
    found = dialogues_of(stream, 5)
    assert [each.roles.tolist() for each in found] == [TWO_TURNS[:5], [T, U, T, A]]  # the second has no answer left
    assert found[1].tokens.tolist() == [100, 101, 102, 103]
    with pytest.raises(ValueError, match="no dialogue has an answer within its first 3 tokens"):
        dialogues_of(stream, 3)


def test_bad_input():
    with pytest.raises(ValueError, match="no position of dialogue 1 predicts an answer"):
        rows_of([dialogue(T, U, T, A), dialogue(T, U, U)], 16, 2)
    with pytest.raises(ValueError, match="dialogue 0 has 12 tokens, more than the 8 of a context"):
        rows_of([dialogue(*TWO_TURNS)], 8, 2)
    with pytest.raises(ValueError, match="dialogue 0 has 4 tokens but 3 roles: encode both together"):
        rows_of([dataclasses.replace(dialogue(T, U, T, A), roles=np.array([T, U, A]))], 8, 2)
    with pytest.raises(ValueError, match="there are no dialogues"):
        rows_of([], 8, 2)
