"""PNGs come from one browser that stays open; whatever goes wrong with it, the caller gets None, soon, and one line."""

import asyncio
import logging
import time

import plotly.graph_objects as go
import pytest

from helpers.figures.png import ATTEMPTS, ChromeNotFound, Exporter

FIGURE = go.Figure(layout={"height": 300})


class FakeBrowser:
    def __init__(self):
        self.asked, self.closed = [], False

    async def calc_fig(self, figure, opts):
        self.asked.append(opts)
        return b"png"

    async def close(self):
        self.closed = True


class BrokenBrowser(FakeBrowser):
    async def calc_fig(self, figure, opts):
        raise RuntimeError("the tab is gone")


class HangingBrowser(FakeBrowser):
    async def calc_fig(self, figure, opts):
        await asyncio.sleep(60)


@pytest.fixture
def make(monkeypatch):
    """Returns make(browser class or exception): an exporter, and the list of browsers it has opened."""
    monkeypatch.delenv("SUITE_PNG", raising=False)
    exporters = []

    def build(kind, patience: float = 10.0):
        opened = []

        async def open_browser():
            if issubclass(kind, Exception):
                opened.append(None)
                raise kind
            opened.append(kind())
            return opened[-1]

        exporters.append(Exporter(open_browser, patience))
        return exporters[-1], opened

    yield build
    for exporter in exporters:
        exporter.close()


def test_one_browser_serves_all_figures_at_their_height(make):
    export, opened = make(FakeBrowser)
    assert export(FIGURE) == export(FIGURE) == b"png"
    assert len(opened) == 1
    assert [opts["height"] for opts in opened[0].asked] == [300, 300]


def test_it_works_inside_a_running_loop_as_in_a_notebook(make):
    export, _ = make(FakeBrowser)

    async def cell():
        return export(FIGURE)

    assert asyncio.run(cell()) == b"png"


def test_close_closes_the_browser_and_the_next_figure_opens_another(make):
    export, opened = make(FakeBrowser)
    export(FIGURE)
    export.close()
    assert opened[0].closed and export(FIGURE) == b"png" and len(opened) == 2


def test_without_chrome_there_is_no_image_no_second_look_and_no_word(make, caplog):
    export, opened = make(ChromeNotFound)
    assert export(FIGURE) is None and export(FIGURE) is None
    assert len(opened) == 1 and not caplog.records


def test_a_failing_browser_is_replaced_once_and_then_given_up_with_one_line(make, caplog):
    export, opened = make(BrokenBrowser)
    with caplog.at_level(logging.INFO):
        assert [export(FIGURE) for _ in range(3)] == [None] * 3
    assert len(opened) == ATTEMPTS and all(browser.closed for browser in opened)
    assert [record.getMessage() for record in caplog.records] == [
        "Figures get no PNG copy: Chrome did not answer (RuntimeError). SUITE_PNG=0 skips the attempt."
    ]


def test_a_browser_that_dies_once_costs_nothing(make, caplog):
    export, opened = make(FakeBrowser)
    export(FIGURE)
    opened[0].calc_fig = BrokenBrowser().calc_fig
    assert export(FIGURE) == b"png" and len(opened) == 2 and not caplog.records


def test_a_browser_that_hangs_is_not_waited_for(make):
    export, opened = make(HangingBrowser, patience=0.05)
    start = time.monotonic()
    assert export(FIGURE) is None and len(opened) == ATTEMPTS
    assert time.monotonic() - start < 2


def test_the_environment_turns_images_off(make, monkeypatch):
    export, opened = make(FakeBrowser)
    monkeypatch.setenv("SUITE_PNG", "0")
    assert export(FIGURE) is None and not opened
