"""Means and intervals by hand and by a twin; what a frame must have; panels, ticks, and what a log axis can show."""

import math

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from hypothesis import given

from helpers.base.stats import interval
from helpers.figures.canvas import add_band, band, blank, check, plain, whiskers
from helpers.figures.style import ALONE


def test_band_by_hand():
    frame = pd.DataFrame({"k": [8, 8, 16], "seed": [0, 1, 0], "nmse": [0.1, 0.3, 0.5]})
    table = band(frame, "k", "nmse")
    half = 12.7062 * 0.1  # t for one degree of freedom, times the standard error
    assert table["k"].tolist() == [8, 16] and table["seeds"].tolist() == [2, 1]
    assert table["mean"].tolist() == pytest.approx([0.2, 0.5])
    assert table["low"].tolist() == pytest.approx([0.2 - half, 0.5], abs=1e-4)
    assert table["high"].tolist() == pytest.approx([0.2 + half, 0.5], abs=1e-4)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 2), st.floats(-5, 5)), min_size=1, max_size=30))
def test_band_equals_a_loop_over_the_groups(rows):
    frame = pd.DataFrame(rows, columns=["method", "k", "y"])
    for row in band(frame, ["method", "k"], "y").itertuples():
        values = [y for method, k, y in rows if (method, k) == (row.method, row.k)]
        mean, low, high = interval(values)
        expected = [mean, mean if math.isnan(low) else low, mean if math.isnan(high) else high, len(values)]
        assert [row.mean, row.low, row.high, row.seeds] == pytest.approx(expected)


def test_band_keeps_rows_whose_group_is_missing():
    frame = pd.DataFrame({"k": [8.0, np.nan], "y": [1.0, 2.0]})
    assert band(frame, "k", "y")["mean"].tolist() == [1.0, 2.0]


def test_band_keeps_the_order_of_first_sight_on_request():
    frame = pd.DataFrame({"name": ["b", "a", "b"], "y": [1.0, 2.0, 3.0]})
    assert band(frame, "name", "y", sort=False)["name"].tolist() == ["b", "a"]


@pytest.mark.parametrize(
    ("frame", "columns", "log_columns", "message"),
    [
        ([{"x": 1}], ["x"], [], "needs a pandas DataFrame, not list"),
        (pd.DataFrame({"x": []}), ["x"], [], "has no rows"),
        (pd.DataFrame({"x": [1], "z": [1]}), ["x", "y"], [], "no column 'y', it has x, z"),
        (pd.DataFrame({"x": [1.0, 0.0, -1.0]}), ["x"], ["x"], "cannot show 2 of 3 values of 'x'"),
        (pd.DataFrame({"x": [1.0, np.nan, np.inf]}), ["x"], ["x"], "cannot show 2 of 3 values of 'x'"),
    ],
)
def test_check_says_what_is_wrong(frame, columns, log_columns, message):
    with pytest.raises(ValueError, match=message):
        check(frame, columns, log_columns)


def test_check_lets_a_good_frame_and_an_absent_option_pass():
    assert check(pd.DataFrame({"x": [0.0, np.nan]}), ["x", None]) is None


def test_blank_refuses_an_axis_it_does_not_know():
    with pytest.raises(ValueError, match="'x', 'y' or 'xy', not 'z'"):
        blank(pd.DataFrame({"x": [1], "y": [1]}), "x", "y", title="t", log="z")


def test_panels_hold_their_own_rows_in_reading_order():
    frame = pd.DataFrame({"n": [1, 2, 3, 4, 5], "x": 1.0, "y": 1.0})
    figure, parts = blank(frame, "x", "y", title="t", panel="n")
    assert [part["n"].tolist() for _, part in parts] == [[1], [2], [3], [4], [5]]
    assert [tuple(place.values()) for place, _ in parts] == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]
    assert [note.text for note in figure.layout.annotations] == [f"n = {n}" for n in range(1, 6)]


def test_a_panel_with_a_name_needs_no_column_before_it():
    frame = pd.DataFrame({"x": [1, 2], "y": [1, 2], "n": ["few", "many"]})
    figure, _ = blank(frame, "x", "y", title="t", panel="n")
    assert [note.text for note in figure.layout.annotations] == ["few", "many"]


def test_every_panel_of_a_log_figure_is_log_and_shares_its_axes():
    frame = pd.DataFrame({"n": [1, 2], "x": [1.0, 30.0], "y": [1.0, 30.0]})
    figure, _ = blank(frame, "x", "y", title="t", panel="n", log="xy")
    for axis in (figure.layout.xaxis2, figure.layout.yaxis2):
        assert axis.type == "log" and axis.matches


@given(st.floats(-5, 5), st.floats(0.31, 3.2))
def test_log_ticks_lie_about_the_data_and_are_never_fewer_than_two(exponent, decades):
    low, high = 10**exponent, 10 ** (exponent + decades)
    figure, _ = blank(pd.DataFrame({"x": [low, high], "y": 1.0}), "x", "y", title="t", log="x")
    ticks = figure.layout.xaxis.tickvals
    if high / low < 2000:
        assert len(ticks) >= 2 and low / 1.3 < min(ticks) < max(ticks) < high * 1.3
    else:
        assert ticks is None and figure.layout.xaxis.dtick == 1


def test_a_narrow_log_axis_has_more_ticks():
    figure, _ = blank(pd.DataFrame({"x": [0.0095, 0.012], "y": 1.0}), "x", "y", title="t", log="x")
    assert figure.layout.xaxis.tickvals == (0.008, 0.009, 0.01, 0.012)


def test_ticks_are_written_out():
    frame = pd.DataFrame({"x": [11.0, 130.0], "y": [2e4, 3e6]})
    figure, _ = blank(frame, "x", "y", title="t", log="xy")
    assert figure.layout.xaxis.ticktext == ("10", "20", "50", "100")
    assert figure.layout.yaxis.ticktext == ("20k", "50k", "100k", "200k", "500k", "1M", "2M")


def test_axes_carry_the_suites_words_unless_told_otherwise():
    frame = pd.DataFrame({"tokens": [1], "nmse": [1]})
    figure, _ = blank(frame, "tokens", "nmse", title="t", labels={"nmse": "error"})
    assert figure.layout.xaxis.title.text == "training tokens"
    assert figure.layout.yaxis.title.text == "error"


def test_a_band_encloses_the_interval_and_is_cut_where_a_log_axis_ends():
    table = pd.DataFrame({"x": [1, 2], "mean": [1.0, 2.0], "low": [-1.0, 1.5], "high": [3.0, 2.5], "seeds": 3})
    linear, log = go.Figure(), go.Figure()
    add_band(linear, table, "x", ALONE, {}, "")
    add_band(log, table, "x", ALONE, {}, "y")
    assert list(zip(linear.data[0].x, linear.data[0].y, strict=True)) == [(1, 3.0), (2, 2.5), (2, 1.5), (1, -1.0)]
    assert log.data[0].y == (3.0, 2.5, 1.5, 0.1)


def test_whiskers_reach_the_interval_and_one_seed_has_none():
    table = pd.DataFrame({"mean": [1.0, 2.0], "low": [0.5, 2.0], "high": [2.0, 2.0], "seeds": [3, 1]})
    found = whiskers(table, ALONE, "")
    assert found["array"][0] == 1.0 and found["arrayminus"][0] == 0.5
    assert math.isnan(found["array"][1]) and math.isnan(found["arrayminus"][1])


@given(st.floats(1e-6, 1e6))
def test_plain_numbers_keep_six_digits(value):
    assert plain([value]) == pytest.approx([value], rel=5e-6)
    assert plain(np.array([1 / 3])) == [0.333333]
