"""A plotly figure as PNG bytes, for readers who see no JavaScript: one headless Chrome, opened at the first figure.

A browser for each image costs about two seconds, so one stays open until Python exits. Kaleido's own server waits for
ever when its browser does not start; here every wait has a limit, and where no Chrome is found there are no PNGs.
Nothing is fetched: plotly.js comes from the installed package, and MathJax (which kaleido would load from the
network) is off, so labels use Unicode, not TeX. `SUITE_PNG=0` in the environment turns PNGs off.
"""

import asyncio
import atexit
import contextlib
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import plotly.graph_objects as go

from helpers.figures.style import HEIGHT, WIDTH

PATIENCE = 60.0  # seconds for one image, the start of the browser included
ATTEMPTS = 2  # a browser can die when memory is short; a second one is worth a try, a third is not

logger = logging.getLogger(__name__)


class ChromeNotFound(Exception):
    """There is no Chrome on this machine, which is nothing to warn about."""


async def open_kaleido() -> Any:
    """Start Chrome and return the kaleido browser; raises ChromeNotFound where there is none."""
    from choreographer.browsers.chromium import Chromium  # here, because both are slow to import and seldom needed
    from kaleido import Kaleido

    if Chromium.find_browser(skip_local=False) is None:
        raise ChromeNotFound
    logging.getLogger("choreographer").setLevel(logging.ERROR)  # what matters of its warnings is said here
    browser = Kaleido(mathjax=False)
    await browser.open()
    return browser


class Exporter:
    """One browser in an event loop of its own thread, so that the loop a notebook already runs does not matter."""

    def __init__(self, open_browser: Callable[[], Awaitable[Any]] = open_kaleido, patience: float = PATIENCE):
        self.open_browser = open_browser
        self.patience = patience
        self.attempts = ATTEMPTS
        self.browser: Any = None
        self.loop: asyncio.AbstractEventLoop | None = None

    def __call__(self, figure: go.Figure) -> bytes | None:
        """The figure as PNG, or None where Chrome is missing, fails or takes too long. Never raises, warns once."""
        while self.attempts and os.environ.get("SUITE_PNG") != "0":
            try:
                return self._run(self._export(figure), self.patience)
            except ChromeNotFound:
                self.attempts = 0
            except Exception as error:  # whatever a browser does, the notebook goes on
                self._after(error)
        return None

    def close(self) -> None:
        """Close the browser; the next figure opens a new one."""
        browser, self.browser = self.browser, None
        if browser is not None:
            with contextlib.suppress(Exception):  # at exit there is nobody left to tell
                self._run(browser.close(), 10.0)

    async def _export(self, figure: go.Figure) -> bytes:
        if self.browser is None:
            self.browser = await self.open_browser()
        height = figure.layout.height or HEIGHT
        # at scale 1: JupyterLab shows an image at its own size until the pointer is on it
        return await self.browser.calc_fig(figure, opts={"format": "png", "width": WIDTH, "height": height})

    def _run(self, coroutine: Coroutine[Any, Any, Any], patience: float) -> Any:
        if self.loop is None:
            self.loop = asyncio.new_event_loop()
            threading.Thread(target=self.loop.run_forever, name="figures to PNG", daemon=True).start()
            atexit.register(self.close)
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result(patience)
        finally:
            future.cancel()  # does nothing to a finished one

    def _after(self, error: Exception) -> None:
        self.attempts -= 1
        self.close()
        if not self.attempts:
            name = type(error).__name__
            logger.warning("Figures get no PNG copy: Chrome did not answer (%s). SUITE_PNG=0 skips the attempt.", name)


export_png = Exporter()
