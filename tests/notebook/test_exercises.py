"""Exercises: what a learner is told for a right, a wrong, a broken and a missing answer."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.notebook import exercises
from helpers.notebook.exercises import check_answer, difference, exercise


def make_inputs(generator):
    return torch.randn(2, 3, generator=generator), 2


def topk(x, k):
    """Slow specification: the k largest of each row, the rest zero."""
    out = torch.zeros_like(x)
    for i, row in enumerate(x.tolist()):
        for value in sorted(row)[-k:]:
            out[i, row.index(value)] = value
    return out


def topk_of_positive(x, k):
    return topk(x, k).relu()


def fast_topk(x, k):
    top = x.topk(k)
    return torch.zeros_like(x).scatter(1, top.indices, top.values)


def stub(x, k):
    raise NotImplementedError


def test_a_right_answer_passes(capsys):
    assert check_answer(fast_topk, topk, make_inputs, n_cases=7) == "passed"
    assert "7 random cases agree" in capsys.readouterr().out


def test_a_stub_is_not_attempted_and_the_notebook_goes_on(capsys):
    assert check_answer(stub, topk, make_inputs) == "not attempted"
    assert capsys.readouterr().out.startswith("○ not attempted")


def test_the_first_differing_case_is_shown_with_inputs_expected_and_got(capsys):
    def wrong_from_the_third(x, k):
        seen.append(x)
        return topk(x, k) + (len(seen) >= 3)

    seen = []
    assert check_answer(wrong_from_the_third, topk, make_inputs) == "failed"
    out = capsys.readouterr().out
    x, _ = make_inputs(torch.Generator().manual_seed(2))
    assert len(seen) == 3 and "failed on case 3: the values differ first at [0, 0]" in out
    for shown in (x, topk(x, 2), topk(x, 2) + 1):
        assert repr(shown).replace(" ", "") in out.replace(" ", "")
    assert "    k = 2\n" in out


def test_an_exception_is_shown_with_its_message_and_inputs(capsys):
    assert check_answer(lambda x, k: x.sum(dim=7), topk, make_inputs) == "failed"
    out = capsys.readouterr().out
    assert "your function raised IndexError: Dimension out of range" in out and "x = tensor(" in out


def test_an_answer_may_write_into_its_inputs(capsys):
    def in_place(x, k):
        return x.copy_(fast_topk(x, k))

    def shows_clean_inputs(x, k):
        return x.zero_()

    assert check_answer(in_place, topk, make_inputs) == "passed"
    check_answer(shows_clean_inputs, topk, make_inputs)
    x, _ = make_inputs(torch.Generator().manual_seed(0))
    assert repr(x).replace(" ", "") in capsys.readouterr().out.replace(" ", "")


def test_only_the_hint_of_the_known_mistake_is_given(capsys):
    hints = {"keep negative values as well": topk_of_positive, "that is the input": lambda x, k: x}
    check_answer(lambda x, k: fast_topk(x, k).relu(), topk, make_inputs, hints=hints)
    assert capsys.readouterr().out.endswith("Hint: keep negative values as well\n")
    check_answer(lambda x, k: x * 0, topk, make_inputs, hints=hints)
    check_answer(lambda x, k: x.sum(dim=7), topk, make_inputs, hints=hints)
    check_answer(fast_topk, topk, make_inputs, hints=hints)
    assert "Hint" not in capsys.readouterr().out


def test_a_hint_needs_agreement_on_every_case(capsys):
    check_answer(lambda x, k: x * 0 if x[0, 0] < 0 else x, topk, make_inputs, hints={"input": lambda x, k: x})
    assert "Hint" not in capsys.readouterr().out


@pytest.mark.parametrize("answer", [stub, topk_of_positive])
def test_in_a_solution_only_passing_will_do(answer, monkeypatch):
    with pytest.raises(AssertionError, match="not attempted|failed on case"):
        check_answer(answer, topk, make_inputs, must_pass=True)
    monkeypatch.setenv("SUITE_MUST_PASS", "1")
    with pytest.raises(AssertionError):
        check_answer(answer, topk, make_inputs)
    assert check_answer(answer, topk, make_inputs, must_pass=False) in ("not attempted", "failed")
    assert check_answer(topk, topk, make_inputs) == "passed"


@pytest.mark.parametrize("value", ["0", None])
def test_a_notebook_goes_on_unless_told_otherwise(value, monkeypatch):
    monkeypatch.delenv("SUITE_MUST_PASS", raising=False)
    if value:
        monkeypatch.setenv("SUITE_MUST_PASS", value)
    assert check_answer(stub, topk, make_inputs) == "not attempted"


@pytest.mark.parametrize(
    "got, expected, said",
    [
        ([1.0], torch.ones(1), "type differs: expected Tensor, got list"),
        (torch.ones(1), 1.0, "type differs: expected float, got Tensor"),
        (torch.tensor(1.5), 1.0, "values differ: expected 1, got 1.5"),
        (None, (1, 2), "type differs: expected tuple, got NoneType"),
        ("a", 1, "type differs: expected int, got str"),
        (torch.ones(2, 3), torch.ones(3, 2), r"shape differs: expected \(3, 2\), got \(2, 3\)"),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), "dtype differs: expected torch.float64, got torch.float32"),
        (torch.tensor([0, 1]), torch.tensor([0, 2]), r"values differ first at \[1\]: expected 2, got 1"),
        (torch.tensor([True]), torch.tensor([False]), "values differ"),
        (torch.tensor(100_001), torch.tensor(100_000), "values differ: expected 100000, got 100001"),
        (torch.tensor(math.nan), torch.tensor(1.0), "values differ: expected 1, got nan"),
        ((1, 2), (1, 2, 3), "length differs: expected 3 items, got 2"),
        ((1, torch.ones(2)), (1, torch.ones(3)), "in item 1 the shape differs"),
        (0.51, 0.5, "values differ: expected 0.5, got 0.51"),
        ("a", "b", "values differ"),
    ],
)
def test_the_kind_of_difference_is_named(got, expected, said):
    with pytest.raises(AssertionError, match=said):
        check_answer(lambda: got, lambda: expected, lambda generator: (), must_pass=True)


@pytest.mark.parametrize(
    "same", [1, 0.5, "a", None, (1, "b"), [2.0, torch.ones(2)], torch.tensor(math.nan), torch.ones(0)]
)
def test_a_thing_does_not_differ_from_itself(same):
    assert difference(same, same) == ""


@pytest.mark.parametrize("number", [0.5, 2, np.float32(0.5), torch.tensor(0.5, dtype=torch.float64), torch.tensor(2)])
def test_a_number_may_come_as_a_tensor_and_a_tensor_as_a_number(number):
    plain, tensor = float(number), torch.tensor(float(number))
    assert difference(number, plain) == difference((plain, number), (tensor, plain)) == ""
    assert "values differ" in difference(plain + 1, torch.as_tensor(number))


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=8), st.data())
def test_one_changed_entry_is_found_wherever_it_is(values, data):
    expected = torch.tensor(values)
    at = data.draw(st.integers(0, len(values) - 1))
    got = expected.clone()
    got[at] += 1 + got[at].abs() * 0.01
    assert f"first at [{at}]" in difference(got, expected)
    assert difference(expected * (1 + 1e-6), expected) == ""  # what float32 does to another order of the terms


def test_the_header_shows_how_hard_how_important_how_long_and_what(monkeypatch):
    shown = []
    monkeypatch.setattr(exercises, "display", lambda markdown: shown.append(markdown.data))
    exercise("TopK", minutes=5, difficulty=2, importance=3, task="Keep the k largest.")
    assert all(
        part in shown[0]
        for part in ("Exercise: TopK", "difficulty ●●○ · importance ●●● ·", "5 minutes", "Keep the k largest.")
    )
    with pytest.raises(ValueError, match="difficulty must be 1, 2 or 3, not 4"):
        exercise("TopK", minutes=5, difficulty=4, importance=1, task="")
    with pytest.raises(ValueError, match="importance must be 1, 2 or 3, not 0"):
        exercise("TopK", minutes=5, difficulty=1, importance=0, task="")


def test_a_known_wrong_answer_that_is_right_is_no_hint():
    with pytest.raises(ValueError, match="'not twice' passes, so it is not wrong"):
        check_answer(None, lambda x: x + x, lambda random: (1.0,), hints={"not twice": lambda x: 2 * x})
