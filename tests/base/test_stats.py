"""Intervals over seeds by hand; what is missing is left out."""

import math

import pandas as pd
import pytest

from helpers.base.stats import above_least, interval, known_interval, per_seed, percent, percent_table, with_ends


def test_missing_values_are_left_out():
    assert known_interval([1.0, None, math.nan, 3.0]) == interval([1.0, 3.0])
    assert all(map(math.isnan, known_interval([None, math.nan])))


def test_a_statistic_of_each_seed():
    table = pd.DataFrame({"seed": [0, 0, 1, 1], "f1": [0.0, 1.0, 1.0, 2.0]})
    assert per_seed(table, lambda part: part.f1.mean()) == interval([0.5, 1.5])
    assert per_seed(table, lambda part: part.f1.max() if part.f1.min() else math.nan)[0] == pytest.approx(2.0)


def test_an_interval_is_printed_with_its_ends():
    assert with_ends((0.5, 0.25, 0.75)) == "0.50 [0.25, 0.75]" and with_ends((1 / 3, 0, 1), 3) == "0.333 [0.000, 1.000]"


def test_percent_has_half_the_width_of_its_interval():
    assert percent(-0.5, -0.75, -0.25) == "-50.0 ± 25.0" and percent(0.5, None, None) == "50.0"
    assert percent(float("nan"), 0.0, 1.0) == percent(None, None, None) == "n/a"


def test_a_table_in_percent_keeps_the_order_of_its_rows():
    rows = [("b", "z", 0.5, 0.25, 0.75), ("b", "a", 1.0, math.nan, math.nan), ("a", "z", math.nan, 0.0, 0.0)]
    found = percent_table(pd.DataFrame(rows, columns=["method", "measure", "mean", "low", "high"]), "method", "measure")
    assert list(found.index) == ["b", "a"] and list(found) == ["z", "a"]
    assert found.to_numpy().tolist() == [["50.0 ± 25.0", "100.0"], ["n/a", "n/a"]]


def test_the_least_is_chosen_by_one_half_and_judged_by_the_other():
    halves = pd.DataFrame({"first": [3.0, 1.0, 2.0, 0.0], "second": [5.0, 6.0, 4.0, 9.0]}, index=[8, 16, 32, 64])
    # of the first three, `first` picks 16 (6 by `second`) and `second` picks 32 (2 by `first`)
    assert above_least(halves, halves.index[:3]).tolist() == [0.0, -0.5, -1.0, 0.5]
    assert above_least(halves).tolist() == [-1.5, -2.0, -2.5, -1.0]  # of all, `first` picks 64 (9), `second` still 32
