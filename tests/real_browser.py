"""A page in a real Chromium, driven through its DevTools by choreographer, which kaleido brings along."""

import asyncio
import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from choreographer import Browser
from choreographer.errors import ChromeNotFoundError


class RealPage:
    """What a reader does: click, type, press, point, look. Errors of the console are kept in `errors`."""

    def __init__(self, runner: asyncio.Runner, tab):
        self.runner, self.tab, self.errors = runner, tab, []
        for event in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
            tab.subscribe(event, self._kept)
        for domain in ("Runtime", "Log", "Page"):
            self.send(f"{domain}.enable")

    def send(self, command: str, **params) -> dict:
        answer = self.runner.run(self.tab.send_command(command, params))
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, page: Path | str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """A file, or an address."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        self.until("document.readyState === 'complete'")

    def value(self, script: str):
        """What an expression is worth, a promise awaited."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 20) -> None:
        for _ in range(int(seconds / 0.02)):
            if self.value(script):
                return
            self.runner.run(asyncio.sleep(0.02))
        raise AssertionError(f"still not true after {seconds} s: {script}")

    def click(self, selector: str, dx: float | None = None, dy: float | None = None) -> None:
        """Press the mouse on the middle of an element, or at (dx, dy) from its corner."""
        at = self.point(selector, dx, dy)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, **at, button="left", clickCount=1)

    def point(self, selector: str, dx: float | None = None, dy: float | None = None) -> dict:
        """Move the mouse there."""
        box = self.value(
            f"(() => {{ const node = document.querySelector({selector!r}); node.scrollIntoView({{block: 'center'}});"
            "const {x, y, width, height} = node.getBoundingClientRect(); return {x, y, width, height}; })()"
        )
        x = box["x"] + (box["width"] / 2 if dx is None else dx)
        y = box["y"] + (box["height"] / 2 if dy is None else dy)
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        return {"x": x, "y": y}

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    async def _kept(self, event: dict) -> None:
        self.errors.append(event["params"])


@contextmanager
def real_page() -> Iterator[RealPage]:
    """A page, closed at the end; skips the test where there is no browser."""
    with asyncio.Runner() as runner:
        try:
            browser = runner.run(_opened())
        except ChromeNotFoundError:
            pytest.skip("no Chrome or Chromium is installed to look at the page with")
        try:
            yield RealPage(runner, browser.get_tab())
        finally:
            runner.run(browser.close())


async def _opened() -> Browser:
    return await Browser()
