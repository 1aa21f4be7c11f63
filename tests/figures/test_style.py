"""One look per method, and never two series that differ in colour alone."""

import pytest

from helpers.figures.style import GREYS, METHODS, WIDTH, faded, headline, looks


def test_no_two_methods_share_a_colour_a_symbol_or_both_line_and_pattern():
    for part in ("color", "symbol"):
        assert len({getattr(look, part) for look in METHODS.values()}) == len(METHODS)


def test_a_method_keeps_its_look_whatever_stands_beside_it():
    alone, among = looks(["TopK"]), looks(["ReLU", "resampling", "TopK", "none"])
    assert alone["TopK"] == among["TopK"] == METHODS["TopK"]


def test_other_series_get_looks_that_no_method_in_the_figure_has():
    found = looks(["resampling", "ReLU", "tied init"])
    assert found["ReLU"] == METHODS["ReLU"] and len(set(found.values())) == 3


def test_numbers_run_through_a_scale_in_their_order():
    found = looks([4096, 512, 1024])
    assert list(found) == [512, 1024, 4096]
    luminance = [sum(int(look.color[i : i + 2], 16) for i in (1, 3, 5)) for look in found.values()]
    assert luminance == sorted(luminance) and len(set(luminance)) == 3
    assert len({look.symbol for look in found.values()}) == 3


def test_more_series_than_colours_are_refused_and_the_greys_are_not_lent():
    names = [f"series {i}" for i in range(len(METHODS) - len(GREYS) + 1)]
    assert not {METHODS[grey] for grey in GREYS} & set(looks(names[:-1]).values())
    with pytest.raises(ValueError, match="8 series are too many to tell apart"):
        looks(names)


def test_faded_keeps_the_colour():
    assert faded("#0072B2", 0.5) == "rgba(0,114,178,0.5)"


def test_headline_wraps_and_says_how_high_it_is():
    short, low = headline("finding", "scale")
    long, high = headline("a finding " * 20, "scale")
    assert short.count("<br>") == 1 and "<b>finding</b>" in short
    assert long.count("<br>") > 1 and high > low
    assert max(len(line) for line in long.split("<br>")) < WIDTH / 6


def test_headline_does_not_break_an_equation():
    text, _ = headline("word " * 14 + "at L0 = 32")
    assert "L0\u00a0=\u00a032" in text
