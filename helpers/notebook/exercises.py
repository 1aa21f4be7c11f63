"""Exercises that check themselves: an answer against a slow specification, on small random inputs.

An exercise is a header (`exercise`), a specification in plain loops, a stub that raises NotImplementedError, and a
check (`check_answer`). An unsolved stub is reported and the notebook goes on; a wrong answer is shown the first inputs
on which it differs, and a hint where it is one of the known wrong ones. In the solutions a wrong answer is an error:
they pass `must_pass=True` or set SUITE_MUST_PASS=1.
"""

import copy
import inspect
import os
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from IPython.display import Markdown, display

RTOL, ATOL = 1e-4, 1e-6  # an answer may add its float32 terms in another order


def exercise(title: str, *, minutes: int, difficulty: int, importance: int, task: str) -> None:
    """Show the header of an exercise: how hard and how important (1 to 3 dots), how long, the task in one sentence."""
    dots = {}
    for name, value in {"difficulty": difficulty, "importance": importance}.items():
        if value not in (1, 2, 3):
            raise ValueError(f"{name} must be 1, 2 or 3, not {value!r}")
        dots[name] = f"{name} {'●' * value}{'○' * (3 - value)}"
    facts = " · ".join([*dots.values(), f"about {minutes} minutes"])
    display(Markdown(f"#### Exercise: {title}\n\n{facts}\n\n{task}"))


def check_answer(
    answer: Callable,
    specification: Callable,
    make_inputs: Callable[[torch.Generator], tuple],
    *,
    n_cases: int = 20,
    hints: dict[str, Callable] | None = None,
    must_pass: bool | None = None,
) -> str:
    """Print how `answer` compares with `specification`, and return "not attempted", "passed" or "failed".

    make_inputs: gives a tuple of small inputs from a torch.Generator; case i gets a generator with seed i.
    hints: what to tell a learner whose answer equals that known wrong function on every case. Raises ValueError for one
        that the cases do not tell from the specification.
    must_pass: raise AssertionError unless passed; by default as the environment variable SUITE_MUST_PASS says.
    """
    cases = [make_inputs(torch.Generator().manual_seed(i)) for i in range(n_cases)]
    if right := [hint for hint, wrong in (hints or {}).items() if _agree(wrong, specification, cases)]:
        raise ValueError(f"the function with the hint {right[0]!r} passes, so it is not wrong: mend it, or the inputs")
    outcome, message = _compare(answer, specification, cases)
    if outcome == "failed":
        message += "".join(f"\nHint: {hint}" for hint, wrong in (hints or {}).items() if _agree(answer, wrong, cases))
    must_pass = os.environ.get("SUITE_MUST_PASS", "0") != "0" if must_pass is None else must_pass
    if must_pass and outcome != "passed":
        raise AssertionError(message)
    print(message)
    return outcome


def difference(got: Any, expected: Any) -> str:
    """How `got` differs from `expected` in one clause, or "": first type, then length or shape, dtype, values.

    A number and a tensor without dimensions are of one type.
    """
    if not (isinstance(got, torch.Tensor) and isinstance(expected, torch.Tensor)):
        got, expected = _number(got), _number(expected)
    if isinstance(expected, int | float) and isinstance(got, int | float):
        got, expected = torch.tensor([got, expected], dtype=torch.float64)
    kind = next((kind for kind in (torch.Tensor, tuple, list) if isinstance(expected, kind)), type(expected))
    if not isinstance(got, kind):
        return f"the type differs: expected {type(expected).__name__}, got {type(got).__name__}"
    if kind is torch.Tensor:
        return _tensor_difference(got, expected)
    if kind in (tuple, list):
        return _items_difference(got, expected)
    return "" if got == expected else "the values differ"


def _compare(answer: Callable, specification: Callable, cases: list[tuple]) -> tuple[str, str]:
    for number, inputs in enumerate(cases, start=1):
        expected = _call(specification, inputs)
        try:
            got = _call(answer, inputs)
        except NotImplementedError:
            return "not attempted", "○ not attempted: replace the NotImplementedError by your answer"
        except Exception as error:
            shown = [("inputs", _named(specification, inputs)), ("expected", _show(expected))]
            return "failed", _report(f"your function raised {type(error).__name__}: {error}", number, shown)
        if reason := difference(got, expected):
            shown = [("inputs", _named(specification, inputs)), ("expected", _show(expected)), ("got", _show(got))]
            return "failed", _report(reason, number, shown)
    return "passed", f"✔ passed: {len(cases)} random cases agree with the specification"


def _agree(answer: Callable, wrong: Callable, cases: list[tuple]) -> bool:
    try:
        return not any(difference(_call(answer, inputs), _call(wrong, inputs)) for inputs in cases)
    except Exception:  # the answer's own error has been reported
        return False


def _call(function: Callable, inputs: tuple) -> Any:
    return function(*copy.deepcopy(inputs))  # a function may write into its inputs


def _number(value: Any) -> Any:
    """What a tensor or a NumPy scalar without dimensions holds; anything else as it is."""
    return value.item() if isinstance(value, torch.Tensor | np.generic) and value.ndim == 0 else value


def _items_difference(got: tuple | list, expected: tuple | list) -> str:
    if len(got) != len(expected):
        return f"the length differs: expected {len(expected)} items, got {len(got)}"
    reasons = [(i, difference(*pair)) for i, pair in enumerate(zip(got, expected, strict=True))]
    return next((f"in item {i} {reason}" for i, reason in reasons if reason), "")


def _tensor_difference(got: torch.Tensor, expected: torch.Tensor) -> str:
    if got.shape != expected.shape:
        return f"the shape differs: expected {tuple(expected.shape)}, got {tuple(got.shape)}"
    if got.dtype != expected.dtype:
        return f"the dtype differs: expected {expected.dtype}, got {got.dtype}"
    exact = not (got.is_floating_point() or got.is_complex())
    close = got == expected if exact else torch.isclose(got, expected, rtol=RTOL, atol=ATOL, equal_nan=True)
    if close.all():
        return ""
    index = tuple((~close).nonzero()[0].tolist())
    place = f" first at {list(index)}" if index else ""
    return f"the values differ{place}: expected {expected[index].item():.6g}, got {got[index].item():.6g}"


def _report(reason: str, number: int, shown: list[tuple[str, str]]) -> str:
    parts = [f"{label}\n{textwrap.indent(text, '    ')}" for label, text in shown]
    return "\n".join([f"✘ failed on case {number}: {reason}", *parts])


def _named(specification: Callable, inputs: tuple) -> str:
    names = inspect.signature(specification).parameters
    return "\n".join(_show(value, f"{name} = ") for name, value in zip(names, inputs, strict=False))


def _show(value: Any, label: str = "") -> str:
    text = repr(value.detach() if isinstance(value, torch.Tensor) else value)
    return label + text.replace("\n", "\n" + " " * len(label))
