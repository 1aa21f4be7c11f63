"""Which positions predict an answer: by hand, and against the released code's masks written as loops."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_text import A, T, U
from twins import slow_masks

from helpers.base.storage import MODELS
from helpers.text.answer_positions import answer_order, dialogues_of, rows_of
from helpers.text.dialogues import Dialogue, Turn
from helpers.text.documents import load_tokenizer
from helpers.text.turns import DialogueStream, Encoded, encode


def dialogue(*roles):
    labels = np.full(len(roles), -1, np.int8)
    return Encoded(np.arange(100, 100 + len(roles), dtype=np.int32), np.array(roles, np.int8), labels, labels)


TWO_TURNS = [T, T, U, T, A, A, T, T, U, T, A, T]


def test_order_by_hand():
    assert answer_order(np.array(TWO_TURNS)).tolist() == [-1, -1, -1, 0, 1, 2, -1, -1, -1, 0, 1, -1]
    assert answer_order(np.array([T, U, T, A, A])).tolist() == [-1, -1, 0, 1, -1]  # cut: the last predicts nothing seen
    assert answer_order(np.array([T, U, U])).tolist() == [-1, -1, -1]


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
