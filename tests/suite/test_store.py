import base64
import io
import json
import re
import sys
from pathlib import Path

import nbformat
import pandas as pd
import plotly.graph_objects as go
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_output
from notebook_lint import is_stale, lint_outputs
from PIL import Image

from helpers.base.storage import ROOT
from helpers.suite import store as storing
from helpers.suite.store import (
    COLOURS,
    FIGURE,
    WIDGET_STATE,
    WIDGET_VIEW,
    _without_paths,
    hashes,
    in_palette,
    plain_table,
    store,
    store_exercises,
)


def stream(text: str, name: str = "stdout") -> nbformat.NotebookNode:
    return new_output("stream", name=name, text=text)


@pytest.fixture
def pair(write_notebook, tmp_path):
    """A committed notebook and an executed copy of it, as papermill leaves one; returns both paths."""
    committed = write_notebook("01_tiny", "print(1)", "2")
    run = nbformat.read(committed, as_version=4)
    run.metadata.suite = hashes(run) | {"scale": "laptop", "subject": "embedded", "seed": 0}
    run.metadata.papermill = {"input_path": str(committed)}
    run.cells[2].outputs = [stream("1\n")]
    run.cells[3].outputs = [new_output("execute_result", {"text/plain": "2"}, execution_count=9)]
    run.cells.insert(2, new_code_cell("seed = 7", metadata={"tags": ["injected-parameters"]}))
    for count, cell in enumerate(run.cells[1:], start=1):
        cell.execution_count = count
        cell.metadata.papermill = {"duration": 0.1}
    nbformat.write(run, tmp_path / "copy.ipynb")
    return committed, tmp_path / "copy.ipynb"


def edit(path: Path, change) -> None:
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)


def test_the_hashes_see_code_and_nothing_else(write_notebook):
    notebook = nbformat.read(write_notebook("01_tiny", "1", "2"), as_version=4)
    notebook.cells[3].metadata.tags = ["exercise"]
    before = hashes(notebook)
    notebook.cells[0].source = "# Another title"
    notebook.cells[2].outputs = [stream("1")]
    notebook.cells[2].execution_count = 5
    notebook.metadata.suite = {"seed": 1}
    notebook.cells.insert(2, new_code_cell("seed = 7", metadata={"tags": ["injected-parameters"]}))
    assert hashes(notebook) == before
    notebook.cells[4].source = "3"
    changed = hashes(notebook)
    assert {name for name in before if changed[name] != before[name]} == {"exercises_hash"}
    notebook.cells[3].source = "2"
    assert hashes(notebook)["source_hash"] != before["source_hash"]


def test_outputs_of_exercises_are_stored_alone(pair):
    committed, executed = pair
    edit(committed, lambda notebook: notebook.cells[2].metadata.update(tags=["exercise"]))
    edit(executed, lambda run: run.cells[3].metadata.update(tags=["exercise"]))
    edit(executed, lambda run: run.metadata.suite.update(hashes(run)))
    store(executed, committed)
    later = [stream("not attempted\n")]
    edit(committed, lambda notebook: notebook.cells[3].update(source="3"))  # other code may have changed meanwhile
    edit(executed, lambda run: (run.cells[3].update(outputs=later), run.metadata.suite.update(scale="smoke")))
    store_exercises(executed, committed)
    notebook = nbformat.read(committed, as_version=4)
    assert notebook.cells[2].outputs == later
    assert notebook.cells[3].outputs[0].data["text/plain"] == "2"
    assert notebook.metadata.suite["scale"] == "laptop" and is_stale(notebook)
    edit(committed, lambda notebook: notebook.cells[2].update(source="print(2)"))
    with pytest.raises(ValueError, match="has changed since it was run"):
        store_exercises(executed, committed)


def test_store_takes_outputs_and_hash_and_leaves_papermill_behind(pair):
    committed, executed = pair
    store(executed, committed)
    notebook = nbformat.read(committed, as_version=4)
    assert [cell.get("execution_count") for cell in notebook.cells] == [None, 1, 2, 3]
    assert notebook.cells[2].outputs == [stream("1\n")]
    assert notebook.cells[3].outputs[0].execution_count == 3
    assert notebook.metadata.kernelspec == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert "papermill" not in committed.read_text()
    assert not is_stale(notebook)


def test_storing_twice_gives_the_same_bytes(pair):
    committed, executed = pair
    store(executed, committed)
    first = committed.read_bytes()
    store(executed, committed)
    assert committed.read_bytes() == first


def test_an_edit_after_the_run_makes_it_stale_and_cannot_be_stored(pair):
    committed, executed = pair
    store(executed, committed)
    edit(committed, lambda notebook: notebook.cells[2].update(source="print(2)"))
    before = committed.read_bytes()
    assert is_stale(nbformat.read(committed, as_version=4))
    with pytest.raises(ValueError, match="copy.ipynb has changed since it was run"):
        store(executed, committed)
    assert committed.read_bytes() == before


def test_a_run_that_failed_or_never_was_cannot_be_stored(pair):
    committed, executed = pair
    edit(executed, lambda run: run.cells[3].update(outputs=[new_output("error", ename="E", evalue="", traceback=[])]))
    with pytest.raises(ValueError, match="stopped in cell 3"):
        store(executed, committed)
    edit(executed, lambda run: (run.cells[3].update(outputs=[]), run.cells[4].update(execution_count=None)))
    with pytest.raises(ValueError, match="stopped in cell 4"):
        store(executed, committed)
    with pytest.raises(ValueError, match="has no executed copy"):
        store(executed.with_name("missing.ipynb"), committed)


def test_folders_of_this_machine_are_taken_out_of_every_text(monkeypatch):
    monkeypatch.setattr(sys, "prefix", "/elsewhere/env")
    monkeypatch.setenv("HOME", "/people/ada")
    texts = [f"{ROOT}/data/models", f"<{ROOT}>", "at /elsewhere/env/lib/x.py:3", "/people/ada/.cache/y"]
    texts += ["/var/x/ipykernel_12/34.py:1: Warning"]
    output = _without_paths(new_output("display_data", {"application/json": {"rows": texts}}))
    cleaned = ["data/models", "<.>", "at lib/x.py:3", "~/.cache/y", "cell:1: Warning"]
    assert output["data"]["application/json"]["rows"] == cleaned


def test_base64_is_left_alone():
    image = f"iVBOR{ROOT}/iVBOR"
    output = _without_paths(new_output("display_data", {"image/png": image}))
    assert output["data"]["image/png"] == image


def widget(model: str, *children: str) -> dict:
    return {"model_name": model, "state": {"children": [f"IPY_MODEL_{child}" for child in children]}}


def test_widgets_are_kept_with_their_state_where_one_is_shown(pair):
    committed, executed = pair
    state = {"browser": widget("VBoxModel", "slider"), "slider": widget("IntSliderModel")}
    view = new_output("display_data", {WIDGET_VIEW: {"model_id": "browser"}})
    edit(executed, lambda run: run.metadata.update(widgets={WIDGET_STATE: {"state": state}}))
    store(executed, committed)
    assert "widgets" not in nbformat.read(committed, as_version=4).metadata
    edit(executed, lambda run: run.cells[3].update(outputs=[view]))
    store(executed, committed)
    notebook = nbformat.read(committed, as_version=4)
    assert notebook.cells[2].outputs == [view] and notebook.metadata.widgets[WIDGET_STATE].state.keys() == state.keys()
    assert lint_outputs(notebook) == []


def test_of_a_widget_that_has_html_the_html_is_kept(pair):
    committed, executed = pair
    view = new_output("display_data", {WIDGET_VIEW: {"model_id": "field"}, "text/html": "<p>its first reading</p>"})
    edit(executed, lambda run: run.metadata.update(widgets={WIDGET_STATE: {"state": {"field": widget("VBoxModel")}}}))
    edit(executed, lambda run: run.cells[3].update(outputs=[view]))
    store(executed, committed)
    notebook = nbformat.read(committed, as_version=4)
    assert [output.data for output in notebook.cells[2].outputs] == [{"text/html": "<p>its first reading</p>"}]
    assert "widgets" not in notebook.metadata


def figure(n):
    plotly = go.Figure(go.Scatter(y=list(range(n))), layout={"height": 300})
    return new_output("display_data", {FIGURE: json.loads(plotly.to_json()), "text/plain": f"{n} points"})


def as_png(image):
    image.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def test_a_table_is_stored_without_its_style_and_reads_the_same():
    frame = pd.DataFrame({"a b": [1.5, 2.0], "c": ["x  y", "<z>"]}, index=["first", "second"])
    html = frame._repr_html_()
    output = plain_table(NotebookNode(output_type="display_data", data=NotebookNode({"text/html": html})))
    stored = output.data["text/html"]
    assert len(stored) < len(html) - 300 and "style scoped" not in stored and "x&nbsp;&nbsp;y" in stored
    assert not re.search(r">\s+<", stored)
    said = [re.findall(r"<t[hd]>(.*?)</t[hd]>", each) for each in (html, stored)]
    assert said[0] == said[1] and len(said[0]) == 3 * 3
    page = "<p>a</p>\n  <style scoped>b</style>"
    kept = plain_table(NotebookNode(output_type="display_data", data=NotebookNode({"text/html": page})))
    assert kept.data["text/html"] == page


def test_each_figure_gets_an_image_in_a_palette_when_it_is_stored(pair, monkeypatch):
    committed, executed = pair
    gradient = as_png(Image.linear_gradient("L").resize((300, 300)).convert("RGB"))
    monkeypatch.setattr(storing, "pngs", lambda figures: [gradient] * len(figures))
    edit(executed, lambda run: run.cells[3].update(outputs=[figure(2), stream("a"), figure(3)]))
    store(executed, committed)
    shown = nbformat.read(committed, as_version=4).cells[2].outputs
    alts = [output.get("metadata", {}).get("image/png", {}).get("alt") for output in shown]
    assert alts == ["2 points", None, "3 points"]
    image = Image.open(io.BytesIO(base64.b64decode(shown[0].data["image/png"])))
    assert image.mode == "P" and len(image.getcolors()) <= COLOURS


def test_a_palette_keeps_what_is_drawn():
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste((213, 94, 0), (0, 0, 32, 32))  # TopK's orange, which 16 colours turned black
    found = Image.open(io.BytesIO(in_palette(as_png(picture)))).convert("RGB")
    assert found.getpixel((5, 5)) == (213, 94, 0) and found.getpixel((60, 60)) == (255, 255, 255)


def test_a_figure_is_one_line_of_the_file_and_reads_as_it_was(pair, monkeypatch):
    committed, executed = pair
    monkeypatch.setattr(storing, "pngs", lambda figures: [as_png(Image.new("RGB", (1, 1)))] * len(figures))
    edit(executed, lambda run: run.cells[3].update(outputs=[figure(500)]))
    store(executed, committed)
    lines = committed.read_text().splitlines()
    assert len(lines) < 120 and sum(FIGURE in line for line in lines) == 1
    assert nbformat.read(committed, as_version=4).cells[2].outputs[0].data[FIGURE] == figure(500).data[FIGURE]


def test_streams_that_touch_are_joined_and_bars_that_were_overwritten_gone(pair):
    committed, executed = pair
    edit(executed, lambda run: run.cells[3].update(outputs=[stream("a"), stream("b\n 10%\r 20%\n")]))
    store(executed, committed)
    assert nbformat.read(committed, as_version=4).cells[2].outputs == [stream("ab\n 20%\n")]
