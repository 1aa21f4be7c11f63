"""A drawn trie: what is joined, what branches, and that every pattern can be read off."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from helpers.evaluation.trie import ANY, START, Trie
from helpers.figures.trie_drawing import GAP, LONGEST, VALUE, Branch, branches, draw

PATTERNS = [((1, 2, 3), 0.5), ((START, ANY, 3), 0.25), ((3,), 2.0), ((7, 8), 1.0)]


def test_branches_by_hand():
    assert branches(PATTERNS) == [
        Branch((3,), 2.0, [Branch((1, 2), 0.5, []), Branch((START, ANY), 0.25, [])]),
        Branch((7, 8), 1.0, []),
    ]


def spelt(below, tail=()):
    for branch in below:
        if branch.value is not None:
            yield (*branch.keys, *tail), branch.value
        yield from spelt(branch.below, (*branch.keys, *tail))


@given(st.dictionaries(st.lists(st.integers(-1, 3), min_size=1, max_size=5).map(tuple), st.floats(0.1, 1)))
def test_no_pattern_is_lost(patterns):
    assert dict(spelt(branches(list(patterns.items())))) == patterns


def test_a_figure_holds_each_run_and_each_value():
    figure = draw(Trie(PATTERNS), "t{}".format, title="A latent")
    assert list(figure.data[0].text) == ["t3", "t1 t2", "⊢ ∗", "t7 t8"]
    assert list(figure.data[1].text) == ["2", "0.5", "0.25", "1"]
    assert figure.data[0].x == (0, -len("t3") - VALUE - GAP, -len("t3") - VALUE - GAP, 0)  # a value has room
    assert len(figure.layout.shapes) == 2 and "A latent" in figure.layout.title.text
    assert figure.data[0].y[1:] == (0, 1, 2) and figure.data[0].y[0] == 0.5


def test_blanks_show_and_what_is_long_is_cut():
    texts = {1: " a\n", 2: '<b>"', 3: "x" * 60}
    drawn = draw(Trie([((i,), 1.0) for i in texts]), texts.get, title="A latent").data[0].text
    assert drawn[:2] == ("·a⏎", '&lt;b&gt;"') and drawn[2] == "…" + "x" * (LONGEST - 1)


def test_an_empty_trie_is_refused():
    with pytest.raises(ValueError, match="no patterns"):
        draw(Trie(), str, title="A latent")
