"""Browser, explorer and a field for one's own text in JupyterLab, with a kernel, used as a reader uses them.

Skipped, with the reason, where there is no browser.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest
from real_browser import real_page

from helpers.base.storage import ROOT

IMPORTS = """
import types, numpy as np, pandas as pd, scipy.sparse, torch
from twins import save_tiny
from helpers.dictionaries.autoencoders import TopK
from helpers.dictionaries.crosscoders import Crosscoder
from helpers.dictionaries.pair_collection import Heldout
from helpers.figures.explorer import OwnText, diff_explorer
from helpers.subjects.subject import load_subject
subject = load_subject(save_tiny("tiny", "gemma2"))
"""
EXPLORER = """
ids = np.array(subject.tokenizer("the cat sat <b>$x$").input_ids)
table = pd.DataFrame({"delta": [0.5, 0.9, 0.1], "nu_error": [0.5, 0.1, 0.9], "nu_reconstruction": 0.5, "cosine": 1.0})
table = table.assign(rate=0.1, **{"class": ["shared", "chat-only", "base-only"]})
reading = Heldout(torch.zeros(len(ids), 2, 1), ids, *(ids * 0,) * 4)
code = scipy.sparse.csr_array(np.eye(len(ids), 3, -1) + np.eye(len(ids), 3, -4))
pair = types.SimpleNamespace(base=subject, chat=subject)
diff_explorer(Crosscoder(subject.d_model, 3, TopK(2)), table, code, reading, pair).show()
"""
FIELD = """
def encode(ids):
    return torch.nn.functional.one_hot(ids[0] % 6, 6) * (1.0 + ids[0][:, None])
OwnText(subject.tokenizer, encode, 12, "cat")
"""
CELLS = (IMPORTS, EXPLORER, FIELD)
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "apputils-extension/themes": {"theme": "JupyterLab Dark"},
}
TOKEN = "of this test"
CONNECTED = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.connectionStatus === 'connected'"
LIST, SEARCH, ORDER, CANVAS = (
    f".latent-browser {part}" for part in ("select[size]", "[type=search]", "label:nth-of-type(3) select", "canvas")
)
LISTED = f"[...document.querySelector('{LIST}').options].map(option => option.textContent.split(' ')[0]).join(' ')"
TITLE = "document.querySelector('.latent-browser [tabindex] b').textContent"
READ = "[...document.querySelectorAll('.widget-html-content')].map(n => n.textContent).join(' ')"


@contextlib.contextmanager
def lab(folder):
    """The address of a JupyterLab on one small notebook, with a kernel and settings of its own."""
    for name, value in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    cells = [nbformat.v4.new_code_cell(source.strip()) for source in CELLS]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "small.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {f"JUPYTER_{name}_DIR": str(folder / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    own |= {f"JUPYTERLAB_{name.upper()}_DIR": str(folder / name) for name in ("settings", "workspaces")}
    own |= {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))), "JUPYTER_TOKEN": TOKEN}
    options = [f"--port={port}", f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True"]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", *options]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log)
    try:
        start_kernel(f"http://127.0.0.1:{port}/api/sessions")
        yield f"http://127.0.0.1:{port}/lab/tree/small.ipynb"
    finally:
        server.terminate()
        server.wait()


def start_kernel(address):
    """As soon as the server answers, so that the page finds it running."""
    wanted = {"path": "small.ipynb", "name": "small", "type": "notebook", "kernel": {"name": "python3"}}
    headers = {"Authorization": f"token {TOKEN}", "Content-Type": "application/json"}
    for _ in range(300):
        with contextlib.suppress(ConnectionRefusedError, urllib.error.URLError):
            urllib.request.urlopen(urllib.request.Request(address, json.dumps(wanted).encode(), headers))
            return
        time.sleep(0.1)
    raise AssertionError("JupyterLab did not start")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The notebook after all of its cells ran, in the dark theme."""
    with real_page() as page, lab(tmp_path_factory.mktemp("lab")) as address:
        page.send("Network.enable")
        page.send("Network.setExtraHTTPHeaders", headers={"Authorization": f"token {TOKEN}"})
        page.open(address, width=1366, height=768, dark=True)
        page.until(CONNECTED, 60)
        page.value("window.jupyterapp.commands.execute('notebook:run-all-cells'), 1")
        page.until(f"!!document.querySelector('{SEARCH}') && !!document.querySelector('.jp-OutputArea textarea')", 60)
        yield page


@pytest.fixture(autouse=True)
def no_error(page):
    yield
    kinds = [part.get("type") or part.get("entry", part).get("level", "exception") for part in page.errors]
    assert not {"error", "exception"}.intersection(kinds), page.errors


def write(page, selector, text):
    page.click(selector)
    page.value("document.activeElement.select()")
    page.type(text)


def test_the_list_is_searched_sorted_and_chosen_from(page):
    assert page.value(LISTED) == "0 1 2"
    write(page, SEARCH, "base-only")
    assert page.value(LISTED) == "2"
    write(page, SEARCH, " ")
    page.value(f"document.querySelector('{ORDER}').focus()")
    page.press("ArrowDown", 40)
    page.until(f"{LISTED} === '2 1 0'")
    page.click(LIST, dx=20, dy=10)
    page.until(f"{TITLE} === 'Latent 2'")


def test_keys_go_to_the_browser_and_not_to_the_notebook(page):
    page.value(f"document.querySelector('{LIST}').focus()")
    page.press("ArrowDown", 40)
    page.until(f"{TITLE} === 'Latent 1'")
    for _ in range(2):  # twice d would delete a cell
        page.press("d", 68)
    assert page.value("document.querySelectorAll('.jp-CodeCell').length") == len(CELLS)


def test_a_click_on_a_dot_opens_its_latent(page):
    width, height = page.value(
        f"(({{clientWidth, clientHeight}}) => [clientWidth, clientHeight])(document.querySelector('{CANVAS}'))"
    )
    page.click(CANVAS, dx=62 + (width - 62 - 14) / 2, dy=12 + (height - 12 - 44) / 2)  # the middle of the axes
    page.until(f"{TITLE} === 'Latent 0'")
    assert "chat" in page.value("document.querySelector('.latent-browser th[scope=col]:last-child').textContent")


def test_a_token_is_read_by_pointing_at_it(page):
    page.point(".latent-browser [role=region] mark[title='1']")
    page.until("document.querySelectorAll('.latent-browser [role=status]')[1].textContent.endsWith(': 1')")


def test_a_text_is_typed_and_read_and_what_is_wrong_is_said(page):
    assert "Latent" in page.value(READ)
    write(page, ".jp-OutputArea textarea", "<b>dog")
    page.click(".jp-OutputArea .jupyter-button")
    page.until(f"{READ}.includes('<b>dog')")
    write(page, ".jp-OutputArea .widget-text input", "17")
    page.click(".jp-OutputArea .jupyter-button")
    page.until(f"{READ}.includes('There is no latent 17')")


def test_markup_and_mathematics_are_shown_as_they_are(page):
    assert "<b>$x$" in page.value("document.querySelector('.latent-browser').textContent")
    assert page.value("document.querySelectorAll('mjx-container, .MathJax').length") == 0
