"""Random before top, everything escaped, and one output that is plain pages without scripts and a file by itself."""

import base64
import gzip
import hashlib
import json
import re

import numpy as np
import pytest

from helpers.figures.browser import SCRIPT, LatentBrowser, dialogue_page, page
from helpers.figures.records import Direction, latent_record
from helpers.figures.style import contrast

WORDS = np.array([["the", " cat", "\n", " sat"], [" on", " a", " mat", "."], [" <b>", "&", '"', "\t"]])
ACTS = np.array([[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.5, 0.0, 4.0, 0.0]])


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
    for style in re.findall(r'<(?:p|div|mark|code|table|tr|th|td|summary)[^>]*style="([^"]*)"', html):
        assert "background" in style and re.search(r"(^|;)color:", style)


def test_a_screen_reader_finds_headings():
    found = re.findall(
        r'<p role="heading" aria-level="(\d)"[^>]*><b>([^<]*)</b></p>', page(latent_record(7, ACTS, WORDS))
    )
    assert found[:3] == [("2", "Latent 7"), ("3", "Random positive activations"), ("3", "Top activations")]


def test_text_is_read_against_every_shade():
    html = page(latent_record(0, ACTS, WORDS, densities=np.array([0.1, 0.4, 0.5])))
    pairs = set(re.findall(r"color:(#\w{6});background:(#\w{6})", html))
    pairs |= {(text, ground) for ground, text in re.findall(r"background:(#\w{6});color:(#\w{6})", html)}
    assert len(pairs) > 4 and min(contrast(*pair) for pair in pairs) >= 4.5


def test_a_dialogue_has_a_line_for_each_turn_and_only_what_is_positive_is_coloured(monkeypatch):
    texts = ["<start_of_turn>", "<i>", "$x$", "<start_of_turn>", "no"]
    monkeypatch.setattr("helpers.figures.browser.token_text", lambda tokenizer, token: texts[token])
    html = dialogue_page(np.arange(5), np.array([0.0, 2.0, -1.0, 0.0, 0.5]), None, "nats")
    lines = re.findall(r"<p style[^>]*>(.*?)</p>", html)
    assert [re.sub("<[^>]*>", "", line) for line in lines] == [
        "&lt;start_of_turn&gt;&lt;i&gt;$x$",
        "&lt;start_of_turn&gt;no",
    ]
    assert re.findall('title="([^"]*)"', html) == ["2", "0.5"] and "<i>" not in html


def test_stronger_activations_are_darker_and_their_value_is_in_the_tooltip():
    html = page(latent_record(0, ACTS, WORDS, n_random=0))
    shade = {value: color for color, value in re.findall(r'background:#(\w+);[^"]*" title="([\d.]+)"', html)}
    assert set(shade) == {"0.5", "1", "2", "4"}
    blue = [int(shade[value][4:], 16) for value in ("0.5", "1", "2", "4")]
    assert blue == sorted(blue, reverse=True) and blue[-1] == 0


def test_the_picked_token_is_marked_and_silent_tokens_are_not():
    html = page(latent_record(0, ACTS, WORDS, n_random=0, n_top=1, n_quarter=0))
    assert html.count("<u>") == 1 and "<b><u>&quot;</u></b>" in html
    assert html.count("<mark") == 2  # 0.5 and 4


def test_a_latent_that_never_fires_has_a_page():
    record = latent_record(3, np.zeros((2, 4)), WORDS[:2])
    assert (record.density, record.mean, record.maximum, record.top, record.random) == (0, 0, 0, (), ())
    assert page(record).count(">none<") == 2 and "quarter" not in page(record)


def test_a_page_shows_whatever_is_known():
    both = [Direction("base", 0.5, ("a",), ("<i>",)), Direction("chat", 2.0, neighbours=((12, 0.75),))]
    facts = {"best probe": "topic <1>", "Δ": 0.9371}
    html = page(latent_record(0, ACTS, WORDS, directions=both, facts=facts, densities=np.array([0.01, 4 / 12, 0.5])))
    assert "Denser than 33% of all latents: 0.01" in html and html.count('title="this latent"') == 1
    assert "best probe: <b>topic &lt;1&gt;</b> · Δ: <b>0.937</b>." in html
    cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", html)
    cells = [re.sub("<[^>]*>", "", cell) for cell in cells]
    assert cells[:6] == ["", "base", "chat", "Decoder norm", "0.5", "2"]
    assert cells[6:] == [
        *("Makes likelier", "a", ""),
        *("Makes less likely", "&lt;i&gt;", ""),
        *("Closest latents", "", "12 (0.75)"),
    ]


def test_effects_are_in_the_tooltips_and_the_largest_is_written_out():
    effects = np.zeros(ACTS.shape)
    effects[0] = [0.0, 0.25, -0.5, 0.0]
    html = page(latent_record(0, ACTS[:1], WORDS[:1], effects=effects[:1], n_random=0, n_quarter=0))
    assert 'title="2, loss without it +0.25 nats">' in html
    assert '<span title="0, loss without it -0.5 nats">⏎</span>' in html
    assert "(largest effect: -0.5 nats at ⏎)" in html


@pytest.fixture
def records():
    facts = {5: {"Δ": 0.5}, 17: {"Δ": np.float32(0.25), "probe": "</script>"}, 3: {"Δ": float("nan")}, 99: {"Δ": 1}}
    return [latent_record(np.int64(latent), ACTS, WORDS, facts=known) for latent, known in facts.items()]


def unpacked(html):
    packs = re.findall(r'<script type="text/plain">([^<]*)</script>', html)
    return [json.loads(gzip.decompress(base64.b64decode(pack))) for pack in packs]


def test_one_output_holds_the_static_pages_and_all_pages_packed(records, monkeypatch):
    shown = []
    monkeypatch.setattr("helpers.figures.browser.display", shown.append)
    browser = LatentBrowser(records, n_static=3)
    browser.show()
    assert shown == [browser] and repr(browser) == "LatentBrowser of 4 latents"
    html = browser._repr_html_()
    assert [latent for latent in (5, 17, 3, 99) if f"<b>Latent {latent}</b>" in html] == [5, 17, 3]
    assert html.index("Latent 5<") < html.index("<details><summary>Latent")
    index, pages = unpacked(html)
    assert pages == [page(record) for record in records]
    assert [latent["numbers"]["latent"] for latent in index["latents"]] == [5, 17, 3, 99]


def test_the_index_has_numbers_to_sort_by_and_words_to_search(records):
    index, _ = unpacked(LatentBrowser(records)._repr_html_())
    first, second, third, _ = index["latents"]
    assert first["numbers"] == {"latent": 5, "density": 4 / 12, "maximum": 4.0, "Δ": 0.5}
    assert first["at"] == '"' and set(first["words"].split()) == {"·cat", "·sat", "·<b>", '"'}
    assert second["numbers"]["Δ"] == 0.25 and second["words"].endswith("</script>")
    assert third["numbers"]["Δ"] is None  # JSON has no NaN


def test_many_pages_are_packed_apart(records):
    _, *packs = unpacked(LatentBrowser(records * 40)._repr_html_())
    assert [len(pack) for pack in packs] == [64, 64, 32]


def test_the_file_fetches_nothing_and_runs_no_script_but_ours(records, tmp_path):
    path = LatentBrowser(records).export_html(tmp_path / "latents.html")
    html = path.read_text(encoding="utf-8")
    (script,) = re.findall("<script>(.*?)</script>", html, re.DOTALL)
    assert script == SCRIPT
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in html
    assert not re.search(r"https?://|\b(src|href)=", html)


def test_a_browser_of_nothing_and_an_axis_of_nothing_are_refused(records):
    with pytest.raises(ValueError, match="got no records"):
        LatentBrowser([])
    with pytest.raises(ValueError, match="No record has a number 'probe' among its facts"):
        LatentBrowser(records, scatter=("Δ", "probe"))
