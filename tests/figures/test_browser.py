"""A record by a slow twin, random before top, everything escaped, and a browser whose buttons turn its pages."""

import re

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays

from helpers.figures import browser
from helpers.figures.browser import LatentBrowser, latent_record, page

WORDS = np.array([["the", " cat", "\n", " sat"], [" on", " a", " mat", "."], [" <b>", "&", '"', "\t"]])
ACTS = np.array([[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.5, 0.0, 4.0, 0.0]])


def test_a_record_by_hand(monkeypatch):
    monkeypatch.setattr(browser, "BINS", 4)
    record = latent_record(7, ACTS, WORDS, context=1)
    assert (record.latent, record.n_tokens, record.density) == (7, 12, 4 / 12)
    assert (record.mean, record.maximum) == (7.5 / 4, 4.0)
    assert record.histogram == (1, 1, 1, 1)  # 0.5 | 1 | 2 | 4: bins are closed below
    assert [window.tokens for window in record.top] == [("&", '"', "\t"), ("the", " cat", "\n")]
    assert record.top[0].activations == (0.0, 4.0, 0.0) and record.top[0].at == 1


@given(
    arrays(float, st.tuples(st.integers(1, 6), st.integers(1, 8)), elements=st.sampled_from([0.0, 0.0, 0.5, 1.0, 3.0]))
)
def test_a_record_equals_loops_over_the_tokens(acts):
    tokens = np.arange(acts.size).reshape(acts.shape)
    record = latent_record(0, acts, tokens, n_top=2, n_random=3, context=2)
    positive = [float(value) for value in acts.ravel() if value > 0]
    assert record.density == pytest.approx(len(positive) / acts.size)
    assert record.mean == pytest.approx(sum(positive) / max(len(positive), 1))
    assert sum(record.histogram) == len(positive)
    firing = [row for row in range(len(acts)) if max(acts[row]) > 0]
    assert len(record.top) == min(2, len(firing)) and len(record.random) == min(3, len(firing))
    peaks = sorted((max(acts[row]) for row in firing), reverse=True)
    assert [window.activations[window.at] for window in record.top] == peaks[:2]
    for window in (*record.top, *record.random):
        first = int(window.tokens[0])
        assert window.activations[window.at] > 0
        assert window.activations == tuple(acts.ravel()[first : first + len(window.tokens)])
        assert len({int(token) // acts.shape[1] for token in window.tokens}) == 1  # never across two windows


def test_random_windows_are_distinct_follow_the_seed_and_ignore_strength():
    acts = np.eye(40)[:, :10] + 0.0
    acts = np.where(np.arange(10) == 3, np.linspace(1, 9, 40)[:, None], 0.0)
    tokens = np.arange(400).reshape(40, 10)
    drawn = [latent_record(1, acts, tokens, n_random=5, seed=seed).random for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({window.tokens for window in drawn[0]}) == 5
    means = [np.mean([w.activations[w.at] for w in latent_record(1, acts, tokens, seed=s).random]) for s in range(40)]
    assert np.mean(means) == pytest.approx(5.0, abs=0.5)  # the mean of all, far from the top's 8.6


def test_ids_are_decoded_only_where_they_are_shown():
    seen = []
    ids = np.arange(12).reshape(3, 4)
    record = latent_record(0, ACTS, ids, decode=lambda i: seen.append(i) or f"<{i}>", n_random=0, n_top=1, context=1)
    assert record.top[0].tokens == ("<9>", "<10>", "<11>") and seen == [9, 10, 11]


@pytest.mark.parametrize(
    ("acts", "tokens", "message"),
    [
        (ACTS, WORDS[:2], r"\(3, 4\) and tokens \(2, 4\) must both be"),
        (ACTS[0], WORDS[0], "must both be"),
        (ACTS[:0], WORDS[:0], "not empty"),
        (np.where(ACTS == 2, np.nan, ACTS), WORDS, "NaN or infinite"),
    ],
)
def test_bad_arrays_are_refused(acts, tokens, message):
    with pytest.raises(ValueError, match=message):
        latent_record(0, acts, tokens)


def test_random_windows_come_before_the_top():
    html = page(latent_record(0, ACTS, WORDS))
    assert 0 < html.index("Random positive activations") < html.index("Top activations")


def test_text_is_escaped_and_its_white_space_is_seen():
    html = page(latent_record(0, ACTS, WORDS, promoted=["<script>"]))
    assert "·&lt;b&gt;" in html and "&amp;" in html and "&quot;" in html and "⇥" in html and "⏎" in html
    assert "<script" not in html and " <b>" not in re.sub(r"<[^>]*style[^>]*>", "", html)


def test_a_page_has_inline_styles_only_and_both_colours_wherever_there_is_text():
    html = page(latent_record(0, ACTS, WORDS))
    assert not re.search(r"<(style|script|svg|link|img)|\bid=", html)
    assert re.findall(r'class="([^"]*)"', html) == ["mathjax_ignore tex2jax_ignore"]  # two dollar signs are no formula
    for style in re.findall(r'<(?:p|div|mark|code)[^>]*style="([^"]*)"', html):
        assert "background" in style and re.search(r"(^|;)color:", style)


def test_stronger_activations_are_darker_and_their_value_is_in_the_tooltip():
    html = page(latent_record(0, ACTS, WORDS, n_random=0))
    shade = {value: color for color, value in re.findall(r'background:#(\w+);[^"]*" title="([\d.]+)"', html)}
    assert set(shade) == {"0.5", "1", "2", "4"}
    blue = [int(shade[value][4:], 16) for value in ("0.5", "1", "2", "4")]
    assert blue == sorted(blue, reverse=True) and blue[-1] == 0


def test_the_picked_token_is_marked_and_silent_tokens_are_not():
    html = page(latent_record(0, ACTS, WORDS, n_random=0, n_top=1))
    assert html.count("<u>") == 1 and "<b><u>&quot;</u></b>" in html
    assert html.count("<mark") == 2  # 0.5 and 4


def test_a_latent_that_never_fires_has_a_page():
    record = latent_record(3, np.zeros((2, 4)), WORDS[:2])
    assert (record.density, record.mean, record.maximum, record.top, record.random) == (0, 0, 0, (), ())
    assert page(record).count(">none<") == 2


@pytest.fixture
def records():
    return [latent_record(latent, ACTS, WORDS) for latent in (5, 17, 3, 99)]


def test_menu_and_buttons_turn_the_pages(records):
    browser = LatentBrowser(records)
    assert "Latent 5<" in browser.page.value
    browser.menu.value = 2
    assert "Latent 3<" in browser.page.value
    browser.forth.click()
    browser.forth.click()
    assert "Latent 5<" in browser.page.value
    browser.back.click()
    assert "Latent 99<" in browser.page.value and browser.menu.value == 3


def test_one_output_holds_the_widget_and_the_static_pages(records, monkeypatch):
    shown = []
    monkeypatch.setattr("helpers.figures.browser.display", shown.append)
    browser = LatentBrowser(records, n_static=3)
    browser.show()
    assert shown == [browser]
    bundle = browser._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == browser.model_id
    html = bundle["text/html"]
    assert [latent for latent in (5, 17, 3, 99) if f"<b>Latent {latent}</b>" in html] == [5, 17, 3]
    assert html.index("Latent 5<") < html.index("<details") and html.count("<details") == 2


def test_a_browser_of_nothing_is_refused():
    with pytest.raises(ValueError, match="got no records"):
        LatentBrowser([])
