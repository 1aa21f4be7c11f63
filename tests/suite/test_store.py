import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_output

from helpers.base.storage import ROOT
from helpers.suite.lint import lint_outputs
from helpers.suite.store import WIDGET_STATE, WIDGET_VIEW, clean_outputs, is_stale, last_state, source_hash, store


def stream(text: str, name: str = "stdout") -> nbformat.NotebookNode:
    return new_output("stream", name=name, text=text)


@pytest.fixture
def pair(write_notebook, tmp_path):
    """A committed notebook and an executed copy of it, as papermill leaves one; returns both paths."""
    committed = write_notebook("01_tiny", "print(1)", "2")
    run = nbformat.read(committed, as_version=4)
    run.metadata.suite = {"source_hash": source_hash(run), "scale": "laptop", "subject": "embedded", "seed": 0}
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


def test_the_hash_sees_sources_and_types_and_nothing_else(write_notebook):
    notebook = nbformat.read(write_notebook("01_tiny", "1"), as_version=4)
    before = source_hash(notebook)
    notebook.cells[2].outputs = [stream("1")]
    notebook.cells[2].execution_count = 5
    notebook.metadata.suite = {"seed": 1}
    notebook.cells.insert(2, new_code_cell("seed = 7", metadata={"tags": ["injected-parameters"]}))
    assert source_hash(notebook) == before
    notebook.cells[3].source = "2"
    assert source_hash(notebook) != before
    notebook.cells[3].source = "1"
    notebook.cells[3].cell_type = "markdown"
    assert source_hash(notebook) != before


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
    edit(committed, lambda notebook: notebook.cells[0].update(source="# Another title"))
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


def test_a_progress_bar_is_reduced_to_its_last_state():
    assert last_state("a\r 10%\r 20%\nb\r\nc") == " 20%\nb\r\nc"
    assert last_state("  0%|  |\r100%|##|\n\x1b[A") == "100%|##|\n"
    assert last_state("\r 50%\n\r 17%\x1b[A\n\r 99%\x1b[A\n\r    \x1b[A\r100%\n") == "100%\n"


def test_streams_are_joined_where_they_touch_and_empty_ones_dropped():
    figure = new_output("display_data", {"text/plain": "Figure"})
    outputs = clean_outputs([stream("a"), stream("b\n"), figure, stream("c"), stream("\r   \r \n", "stderr")])
    assert outputs == [stream("ab\n"), figure, stream("c")]


def test_folders_of_this_machine_are_taken_out_of_every_text(monkeypatch):
    monkeypatch.setattr(sys, "prefix", "/elsewhere/env")
    monkeypatch.setenv("HOME", "/people/ada")
    texts = [f"{ROOT}/data/models", f"<{ROOT}>", "at /elsewhere/env/lib/x.py:3", "/people/ada/.cache/y"]
    texts += ["/var/x/ipykernel_12/34.py:1: Warning"]
    (output,) = clean_outputs([new_output("display_data", {"application/json": {"rows": texts}})])
    cleaned = ["data/models", "<.>", "at lib/x.py:3", "~/.cache/y", "cell:1: Warning"]
    assert output.data["application/json"]["rows"] == cleaned


def test_base64_is_left_alone():
    image = f"iVBOR{ROOT}/iVBOR"
    (output,) = clean_outputs([new_output("display_data", {"image/png": image})])
    assert output.data["image/png"] == image


def widget(model: str, *children: str) -> dict:
    return {"model_name": model, "state": {"children": [f"IPY_MODEL_{child}" for child in children]}}


def test_widgets_are_kept_with_their_state_and_progress_widgets_dropped(pair):
    committed, executed = pair
    state = {"row": widget("HBoxModel", "bar", "label"), "bar": widget("FloatProgressModel"), "label": widget("HTML")}
    state |= {"browser": widget("VBoxModel", "slider"), "slider": widget("IntSliderModel")}
    views = [new_output("display_data", {WIDGET_VIEW: {"model_id": model}}) for model in ("row", "browser")]
    edit(executed, lambda run: run.metadata.update(widgets={WIDGET_STATE: {"state": state}}))
    edit(executed, lambda run: run.cells[3].update(outputs=views))
    store(executed, committed)
    notebook = nbformat.read(committed, as_version=4)
    assert notebook.cells[2].outputs == views[1:]
    assert notebook.metadata.widgets[WIDGET_STATE].state.keys() == {"browser", "slider"}
    assert lint_outputs(notebook) == []


def test_no_widget_metadata_where_no_widget_is_shown(pair):
    committed, executed = pair
    state = {"row": widget("HBoxModel", "bar"), "bar": widget("FloatProgressModel")}
    edit(executed, lambda run: run.metadata.update(widgets={WIDGET_STATE: {"state": state}}))
    store(executed, committed)
    assert "widgets" not in nbformat.read(committed, as_version=4).metadata
