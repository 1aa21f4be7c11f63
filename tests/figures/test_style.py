"""One look per method, and never two series that differ in colour alone."""

import itertools

import numpy as np
import pytest
from plotly.colors import get_colorscale

from helpers.figures.style import (
    FAINT,
    INK,
    METHODS,
    OTHERS,
    SAME,
    WIDTH,
    contrast,
    faded,
    headline,
    looks,
    sampled,
    text_on,
)


def test_no_two_methods_share_a_colour_a_symbol_or_both_line_and_pattern():
    for part in ("color", "symbol"):
        assert len({getattr(look, part) for look in METHODS.values()}) == len(METHODS)


def test_a_method_keeps_its_look_whatever_stands_beside_it():
    alone, among = looks(["TopK"]), looks(["ReLU", "resampling", "TopK", "none"])
    assert alone["TopK"] == among["TopK"] == METHODS["TopK"]


def test_other_series_never_have_the_look_of_a_method():
    colours = {look.color for look in METHODS.values()}
    assert not colours & {look.color for look in OTHERS} and len({look.color for look in OTHERS}) == len(OTHERS)
    found = looks(["measured", "ReLU", "with a floor"])
    assert found["ReLU"] == METHODS["ReLU"] and found["measured"] in OTHERS and found["with a floor"] in OTHERS


def test_a_method_by_another_name_has_the_same_look():
    assert looks(["L1 crosscoder", "BatchTopK crosscoder"]) == {
        "L1 crosscoder": METHODS["ReLU"],
        "BatchTopK crosscoder": METHODS["BatchTopK"],
    }
    assert set(SAME.values()) <= set(METHODS) and not set(SAME) & set(METHODS)


def test_variants_of_a_method_share_its_colour_and_differ_in_symbol_and_dash():
    found = looks(["TopK, refined", "TopK", "ReLU, as trained", "ReLU, refined", "diff-SAE + Latent Scaling"])
    assert found["TopK"] == METHODS["TopK"] and found["ReLU, as trained"] == METHODS["ReLU"]
    for variant, method in (("TopK, refined", "TopK"), ("ReLU, refined", "ReLU")):
        look = found[variant]
        assert (look.color, look.symbol) == (METHODS[method].color, f"{METHODS[method].symbol}-open")
        assert look.pattern != METHODS[method].pattern
    assert found["diff-SAE + Latent Scaling"] == METHODS["diff-SAE"] and len(set(found.values())) == 5


def test_lines_of_the_autoencoders_and_of_the_others_are_told_apart():
    for some in (list(METHODS.values()), OTHERS):
        for a, b in itertools.combinations(some, 2):
            apart = sum(abs(int(a.color[i : i + 2], 16) - int(b.color[i : i + 2], 16)) for i in (1, 3, 5))
            assert apart > 25, (a, b)


def test_text_and_marks_stand_out_from_white():
    assert min(contrast(text, "#FFFFFF") for text in (INK, FAINT)) >= 4.5
    assert min(contrast(look.color, "#FFFFFF") for look in (*METHODS.values(), *OTHERS)) >= 3


def test_text_on_any_shade_of_a_scale_has_a_contrast_of_at_least_four_and_a_half():
    assert contrast("#000000", "#FFFFFF") == pytest.approx(21)
    assert contrast("#767676", "#FFFFFF") == pytest.approx(4.54, abs=0.01)
    shades = sampled("Cividis", np.linspace(0, 1, 101))
    assert shades[0] == get_colorscale("Cividis")[0][1].lower()
    assert min(contrast(text_on(shade), shade) for shade in shades) >= 4.5


def test_a_name_is_not_broken_at_its_hyphen():
    text, _ = headline("word " * 11 + "docs-gemma2-base")
    assert "docs-gemma2-base" in text


def test_numbers_run_through_a_scale_in_their_order():
    found = looks([4096, 512, 1024])
    assert list(found) == [512, 1024, 4096]
    luminance = [sum(int(look.color[i : i + 2], 16) for i in (1, 3, 5)) for look in found.values()]
    assert luminance == sorted(luminance) and len(set(luminance)) == 3
    assert len({look.symbol for look in found.values()}) == 3


def test_more_series_than_colours_are_refused():
    names = [f"series {i}" for i in range(len(OTHERS) + 1)]
    assert list(looks(names[:-1]).values()) == list(OTHERS)
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


def test_headline_breaks_between_the_parts_of_a_subtitle():
    text, _ = headline("finding", "part " * 18 + "· upright line at the end")
    assert "upright\u00a0line\u00a0at\u00a0the\u00a0end" in text
