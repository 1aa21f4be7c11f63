"""Text as a reader sees it: nothing vanishes, nothing turns the line, half a character is its bytes."""

import re
from html import unescape

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import tokenizers
from hypothesis import given
from nbconvert.filters import markdown2html
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.evaluation.trie import Trie
from helpers.figures import plots
from helpers.figures.browser import latent_record, page
from helpers.figures.tokens import code_block, in_line, token_text, visible
from helpers.figures.trie_drawing import draw


@pytest.fixture(scope="module")
def tiny():
    """A byte-level tokenizer that has learnt one pair: a space and the first byte of a dash."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate([*alphabet, "Ġâ"])}, [("Ġ", "â")]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


PARTS = ["a", "·<E2>", "<80>", "<94>", "<", "b"]  # of "a —<b"


def test_half_a_character_is_shown_by_its_bytes(tiny):
    assert [token_text(tiny, i) for i in tiny("a —<b").input_ids] == PARTS
    assert [token_text(tiny, np.int64(i)) for i in tiny("é�").input_ids] == ["<C3>", "<A9>", "<EF>", "<BF>", "<BD>"]


def test_a_token_looks_the_same_in_browser_and_figure(tiny):
    ids = np.array([tiny("a —<b").input_ids])
    html = page(
        latent_record(0, np.ones(ids.shape), ids, lambda token: token_text(tiny, token), n_random=0, n_quarter=0)
    )
    cells = re.sub("<[^>]*>", " ", html.split("Top activations")[1]).split()
    assert cells == ["a", "·&lt;E2&gt;", "&lt;80&gt;", "&lt;94&gt;", "&lt;", "b"]
    figure = draw(Trie([(tuple(ids[0].tolist()), 1.0)]), lambda token: token_text(tiny, token), title="A latent")
    assert figure.data[0].text == ("a ·&lt;E2&gt; &lt;80&gt; &lt;94&gt; &lt; b",)


@pytest.mark.parametrize(("piece", "shown"), [("<0xE2>", "<E2>"), ("\ufffd", "\ufffd")])
def test_bytes_and_the_sign_itself_of_another_vocabulary(piece, shown):
    class Sentencepiece:
        def decode(self, ids):
            return "\ufffd"

        def convert_ids_to_tokens(self, token):
            return piece

    assert token_text(Sentencepiece(), 0) == shown


@pytest.mark.parametrize(
    "char",
    "\u200b\u200d\ufeff\xad\u202e\u2066\u200f\x00\x08\x0c\x1b\x85\u2028\xa0\u3000\ud800\u034f\u115f\u2800\u3164\ufe0f\U000e0100",
)
def test_a_character_that_shows_nothing_is_shown_by_its_code(char):
    assert visible(f"a{char}b") == f"a[U+{ord(char):04X}]b"
    visible(f"a{char}b").encode()  # half a surrogate pair could not be stored


def test_white_space_has_signs_and_letters_stay():
    assert visible(" x\n\té🙂") == "·x⏎⇥é🙂"
    assert visible("\u0301a") == "◌\u0301a"  # else the accent would stand on the token before


@given(st.text())
def test_what_is_visible_stays_as_it_is(text):
    assert visible(visible(text)) == visible(text)


def test_tokens_stand_from_left_to_right():
    assert in_line(["אב", "a", "\u0639"], "|") == "אב\u200e|a|\u0639\u200e"
    figure = draw(Trie([((1, 2), 1.0)]), {1: "א", 2: "ב"}.get, title="A latent")
    assert figure.data[0].text == ("א\u200e ב\u200e",)
    record = latent_record(0, np.ones((1, 2)), np.array([["א", "ב"]]), n_random=0, n_quarter=0)
    assert page(record).count("\u200e") == 2


@pytest.mark.parametrize("text", ["~~~~\n# a heading", "a\n~~~~~~~\n$1 <b> $2", "```", "", "*a* ~ \x1b[31m"])
def test_a_code_block_holds_whatever_it_is_given(text):
    html = markdown2html(code_block(text))
    assert html.count("<pre>") == 1 and not re.search("<h1|<p>|<b>|<em>", html)
    assert unescape(re.sub("<[^>]*>", "", html)).strip() == text.replace("\x1b", "[U+001B]")


def test_titles_are_text(monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "display", lambda bundle, **_: shown.append(bundle))
    frame = pd.DataFrame({"x": [1.0, 2.0], "y": [1.0, 2.0]})
    plots.show(plots.curves(frame, "x", "y", title="P(<b>) & $5", subtitle="from $5 to $6, p < 0.1"))
    assert "<b>P(&lt;b&gt;) &amp; $5</b><br>" in shown[0]["application/vnd.plotly.v1+json"]["layout"]["title"]["text"]
    assert shown[0]["text/plain"] == "P(<b>) & $5 from $5 to $6, p < 0.1"


def test_dollar_signs_are_no_formula_in_figures_and_tables(monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "display", lambda bundle, **_: shown.append(bundle))
    frame = pd.DataFrame({"x": [1.0, 2.0], "y": [1.0, 2.0]})
    plots.show(plots.curves(frame, "x", "y", title="A"))
    assert shown[0]["application/vnd.plotly.v1+json"]["config"]["typesetMath"] is False
    assert 'class="dataframe tex2jax_ignore mathjax_ignore"' in pd.DataFrame({"a": ["$x$"]})._repr_html_()
