"""The exported file in a real browser, used as a reader uses it; skipped, with the reason, where there is none."""

import nbformat
import numpy as np
import pytest
from nbconvert import HTMLExporter
from real_browser import real_page

from helpers.figures import browser
from helpers.figures.browser import LatentBrowser
from helpers.figures.browser import page as page_of
from helpers.figures.records import Direction, latent_record

EVIL = "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 1'>$x^2$"
WORDS = np.array([["the", " cat", "\n", " sat"], [" on", " a", " mat", "."], [EVIL, "&", '"', "\t"]])
ACTS = np.array([[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.5, 0.0, 4.0, 0.0]])
DELTA = {5: 0.5, 17: 0.1, 3: 0.9, 99: float("nan")}
LIST, SEARCH, SORT = ("select[size]", "input[type=search]", "select:not([size])")
READY = f"!!document.querySelector('{SEARCH}')"
LISTED = f"[...document.querySelector('{LIST}').options].map(option => option.textContent.split(' ')[0]).join(' ')"
TITLE = "document.querySelector('[tabindex] b').textContent"
READOUT = "document.querySelectorAll('[role=status]')[1].textContent"


@pytest.fixture(scope="module")
def chromium():
    with real_page() as page:
        yield page


@pytest.fixture(scope="module")
def browser_of_four():
    def record(latent, scale):
        near = [Direction(neighbours=((3, 0.5), (1000, 0.4)))] if latent == 5 else []
        facts = {"Δ": DELTA[latent], "ν": 1 - DELTA[latent], "probe": f"topic {latent}"}
        return latent_record(latent, scale * ACTS, WORDS, directions=near, facts=facts)

    return LatentBrowser([record(latent, 1 + i) for i, latent in enumerate(DELTA)], scatter=("Δ", "ν"))


@pytest.fixture(scope="module")
def exported(browser_of_four, tmp_path_factory):
    return browser_of_four.export_html(tmp_path_factory.mktemp("page") / "latents.html")


@pytest.fixture
def page(chromium, exported):
    """The file, freshly opened; no test leaves an error in the console."""
    chromium.errors.clear()
    chromium.open(exported)
    chromium.until(READY)
    yield chromium
    assert not chromium.errors and not chromium.value("window.ran")


def test_it_opens_on_the_first_latent_with_all_listed(page):
    assert page.value(TITLE) == "Latent 5"
    assert page.value(LISTED) == "3 5 17 99"
    assert page.value("document.body.textContent.includes('4 of 4 latents')")


def test_text_is_shown_and_not_run(page):
    assert page.value("document.body.textContent").count(EVIL.replace(" ", "·")) >= 2
    assert page.value("document.querySelectorAll('img').length") == 0


def test_a_latent_is_chosen_with_mouse_or_arrows(page):
    page.value(f"document.querySelector('{LIST}').focus()")
    page.press("ArrowDown", 40)
    page.until(f"{TITLE} === 'Latent 17'")
    page.press("ArrowUp", 38)
    page.until(f"{TITLE} === 'Latent 5'")
    page.click(LIST, dx=20, dy=10)  # the first row
    page.until(f"{TITLE} === 'Latent 3'")


def test_a_search_keeps_what_has_all_its_words_and_says_when_nothing_has(page):
    page.click(SEARCH)
    page.type("TOPIC 17")
    assert page.value(LISTED) == "17" and page.value("document.body.textContent.includes('1 of 4 latents')")
    page.value(f"document.querySelector('{SEARCH}').select()")
    page.type("9999")
    assert page.value(LISTED) == ""
    assert "No latent matches “9999”: try a number" in page.value("document.body.textContent")


def test_what_has_no_value_is_last_in_either_order(page):
    def choose(field, value):
        node = f"document.querySelectorAll('{SORT}')[{field}]"
        page.value(f"{node}.value = '{value}', {node}.dispatchEvent(new Event('change'))")
        return page.value(LISTED)

    assert choose(0, "Δ") == "17 5 3 99"
    assert choose(1, "down") == "3 5 17 99"
    assert choose(0, "maximum") == "99 3 17 5"


def test_a_token_is_read_by_pointing_at_it_and_by_arrow_keys(page):
    page.point("mark[title='2']")
    page.until(f"{READOUT} === '“·cat”: 2'")
    page.value("document.querySelector('[tabindex]').focus()")
    page.press("ArrowRight", 39)
    seen = page.value(READOUT)
    page.press("ArrowRight", 39)
    assert page.value(READOUT) != seen and page.value("document.querySelectorAll('[style*=outline]').length") == 1
    page.press("ArrowLeft", 37)
    assert page.value(READOUT) == seen


def test_a_close_latent_is_a_link_if_it_is_there(page):
    assert page.value("[...document.querySelectorAll('button')].map(b => b.textContent).join()") == "3"
    page.click("button")
    page.until(f"{TITLE} === 'Latent 3'")


def test_a_point_of_the_scatter_opens_its_latent(page):
    label = page.value("document.querySelector('canvas').ariaLabel")
    assert "Scatter of ν over Δ, 3 latents; 1 without a value are not drawn" in label
    width = page.value("document.querySelector('canvas').clientWidth")
    across = 62 + (width - 62 - 14) * (0.9 - 0.1 + 0.024) / (0.8 + 0.048)  # margins of 3 % around 0.1 ... 0.9
    page.click("canvas", dx=across, dy=12 + (300 - 12 - 44) * (0.8 + 0.024) / (0.8 + 0.048))
    page.until(f"{TITLE} === 'Latent 3'")
    page.click("canvas", dx=width / 2 + 90, dy=40)  # far from any
    assert page.value(TITLE) == "Latent 3"


def test_all_controls_are_reached_by_tab(page):
    seen = []
    for _ in range(8):
        page.press("Tab", 9)
        seen.append(page.value("document.activeElement.tagName + (document.activeElement.size || '')"))
    assert seen[:6] == ["INPUT20", "SELECT", "SELECT", "SELECT22", "DIV", "BUTTON"]


def test_no_key_goes_to_jupyterlab(page):
    focusable = "input, select, button, [tabindex]"  # Lumino asks the focused element and then those around it
    assert page.value(f"[...document.querySelectorAll('{focusable}')].every(n => 'lmSuppressShortcuts' in n.dataset)")


def test_in_the_html_of_nbconvert_it_is_live_without_a_kernel_or_the_network(chromium, browser_of_four, tmp_path):
    output = nbformat.v4.new_output("display_data", {"text/html": browser_of_four._repr_html_(), "text/plain": ""})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("browser.show()", outputs=[output])])
    (tmp_path / "page.html").write_text(HTMLExporter().from_notebook_node(notebook)[0], encoding="utf-8")
    chromium.send("Network.enable")
    chromium.send("Network.setBlockedURLs", urls=["http://*", "https://*"])
    chromium.open(tmp_path / "page.html")
    chromium.until(READY)
    assert chromium.value(LISTED) == "3 5 17 99"
    chromium.send("Network.disable")


def test_without_scripts_the_first_pages_are_there(page, exported):
    page.send("Emulation.setScriptExecutionDisabled", value=True)
    page.open(exported)
    assert page.value("document.body.innerText").split("\n\n")[:2] == ["LatentBrowser of 4 latents", "Latent 5"]
    page.send("Emulation.setScriptExecutionDisabled", value=False)


def test_8192_latents_are_seen_within_two_seconds(chromium, tmp_path, monkeypatch):
    few = [latent_record(j, ACTS * (1 + j), WORDS, facts={"Δ": j / 64}, n_quarter=1) for j in range(64)]
    one = page_of(few[0])
    monkeypatch.setattr(browser, "page", lambda record: one)  # to draw them all takes longer than the test may
    path = LatentBrowser(few * 128, scatter=("Δ", "density")).export_html(tmp_path / "many.html")
    chromium.open(path)
    chromium.until(READY)
    assert chromium.value("document.querySelectorAll('option').length") > 8192
    assert chromium.value("performance.getEntriesByName('latents-shown')[0].startTime") < 2000
