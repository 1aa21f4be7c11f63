"""What the repository keeps of a run: cleaned outputs, and the hash of the source that made them.

    source hash = sha256([(cell type, source), ...])

It covers what a reader edits and nothing else, so outputs and metadata never change it. A run writes it into the
executed copy; `store` takes it along into notebooks/. A committed notebook whose source has another hash is stale.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from helpers.base.storage import ROOT, write_atomic

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
BASE64 = {"image/png", "image/jpeg", "bdata"}  # long, and a path found in one would be chance
ADDED_BY_PAPERMILL = {"injected-parameters", "papermill-error-cell-tag"}
KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}


def source_hash(notebook: NotebookNode) -> str:
    """sha256 over the cell types and sources of `notebook`, without the cells papermill added."""
    cells = [[cell.cell_type, cell.source] for cell in own_cells(notebook.cells)]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def own_cells(cells: list[NotebookNode]) -> list[NotebookNode]:
    """The cells of the notebook itself, without those papermill adds to an executed copy."""
    return [cell for cell in cells if not ADDED_BY_PAPERMILL.intersection(cell.metadata.get("tags", []))]


def is_stale(notebook: NotebookNode) -> bool:
    """True if the outputs of a committed notebook come from another source than the one it shows now."""
    return notebook.metadata.get("suite", {}).get("source_hash") != source_hash(notebook)


def store(executed: Path, committed: Path) -> None:
    """Copy outputs and execution counts of `executed` into `committed`, cell by cell id, cleaned.

    Raises ValueError, and changes nothing, if the executed copy is missing, failed or belongs to an older source.
    """
    notebook, run = nbformat.read(committed, as_version=4), read_storable(executed, committed)
    views = _copy_outputs(run, notebook)
    notebook.metadata = NotebookNode(KERNEL | {"suite": run.metadata.suite} | _widgets(run, views))
    write_atomic(committed, nbformat.writes(notebook) + "\n")


def read_storable(executed: Path, committed: Path) -> NotebookNode:
    """The executed copy, or ValueError if it is missing, did not reach its end, or ran another source."""
    if not executed.exists():
        raise ValueError(f"{executed.name} has no executed copy in {executed.parent}; run it before storing it.")
    run = nbformat.read(executed, as_version=4)
    suite = run.metadata.get("suite", {})
    if stopped := suite.get("stopped_in") or unfinished_cell(run):
        raise ValueError(f"{executed.name} stopped in cell {stopped}; mend it and run it again before storing it.")
    if suite.get("source_hash") != source_hash(nbformat.read(committed, as_version=4)):
        raise ValueError(f"{executed.name} has changed since it was run; run it again before storing it.")
    return run


def unfinished_cell(run: NotebookNode) -> int | None:
    """Number (from 1) of the first code cell that failed or was never run, or None if all were."""
    for number, cell in enumerate(own_cells(run.cells), start=1):
        if cell.cell_type == "code" and cell.source.strip() and (cell.execution_count is None or failed(cell)):
            return number
    return None


def failed(cell: NotebookNode) -> bool:
    """True if a code cell holds an error among its outputs."""
    return any(output.output_type == "error" for output in cell.get("outputs", []))


def _copy_outputs(run: NotebookNode, notebook: NotebookNode) -> list[str]:
    """Fill `notebook` from `run`, counting executions from 1; return the widget models that are still shown."""
    outputs = {cell.id: cell.get("outputs", []) for cell in own_cells(run.cells)}
    progress = _progress_bars(run)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        cell.outputs = clean_outputs(output for output in outputs[cell.id] if _view(output) not in progress)
    for count, cell in enumerate((cell for cell in code if cell.source.strip()), start=1):
        cell.execution_count = count
    _number_results(code)
    return [view for cell in code for output in cell.outputs if (view := _view(output))]


def _number_results(code: list[NotebookNode]) -> None:
    for cell in code:
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = cell.execution_count


# ---- outputs


def clean_outputs(outputs: Iterable[NotebookNode]) -> list[NotebookNode]:
    """Outputs as a reader should see them: streams joined, progress bars at their last state, no machine paths."""
    runs = (list(run) for _, run in groupby(outputs, key=lambda output: output.get("name")))
    kept = [output for run in runs for output in (_joined(run) if "name" in run[0] else run)]
    kept = [nbformat.from_dict(_without_paths(output)) for output in kept]
    return [output for output in kept if output.get("text", "-").strip()]


def _joined(streams: list[NotebookNode]) -> list[NotebookNode]:
    text = "".join(stream.text for stream in streams)
    return [nbformat.v4.new_output("stream", name=streams[0].name, text=last_state(text))]


def last_state(text: str) -> str:
    """What a terminal would still show: of each line, only what follows its last carriage return.

    A bar below another bar, which goes down a line and up again, is gone when it is done.
    """
    text = re.sub(r"\n\r[^\n]*\x1b\[A", "", text)
    return re.sub(r"[^\n]*\r(?!\n)|\x1b\[A", "", text)


def _without_paths(value):
    """`value`, a JSON value, with this machine's folders taken out of every string that is not base64."""
    if isinstance(value, dict):
        return {key: item if key in BASE64 else _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return without_machine(value) if isinstance(value, str) else value


def without_machine(text: str) -> str:
    """`text` with the repository and the installation as relative paths, and the home folder as ~."""
    text = re.sub(r"/[^\s\"'<>]{1,200}/ipykernel_\d+/\d+\.py", "cell", text)
    for folder in (ROOT, Path(sys.prefix), Path(sys.base_prefix)):
        text = text.replace(f"{folder}/", "")
    return _tilde(text.replace(str(ROOT), "."))


def _tilde(text: str) -> str:
    home = Path.home()
    return text.replace(f"{home}/", "~/") if len(home.parts) > 1 else text


# ---- widgets


def _view(output: NotebookNode) -> str | None:
    """Id of the widget model that an output shows, if it shows one."""
    return output.get("data", {}).get(WIDGET_VIEW, {}).get("model_id")


def _state(run: NotebookNode) -> dict:
    return run.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})


def _progress_bars(run: NotebookNode) -> set[str]:
    """Models that tqdm draws in a notebook: a row that holds a bar. They say nothing once the run is over."""
    state = _state(run)
    bars = {model for model, entry in state.items() if entry.get("model_name") == "FloatProgressModel"}
    return {
        model
        for model, entry in state.items()
        if entry.get("model_name") == "HBoxModel" and bars.intersection(_references(entry))
    }


def _widgets(run: NotebookNode, views: list[str]) -> dict:
    """The metadata entry with the state of every widget still shown, or nothing where none is."""
    state, progress = _state(run), _progress_bars(run)
    noise = _reachable(state, progress)
    kept = {model: _without_paths(entry) for model, entry in state.items() if model not in noise}
    if not views or not kept:
        return {}
    return {"widgets": {WIDGET_STATE: {"state": kept, "version_major": 2, "version_minor": 0}}}


def _reachable(state: dict, roots: Iterable[str]) -> set[str]:
    seen, todo = set(), list(roots)
    while todo:
        model = todo.pop()
        if model not in seen:
            seen.add(model)
            todo += _references(state.get(model, {}))
    return seen


def _references(entry: dict) -> list[str]:
    return re.findall(r"IPY_MODEL_(\w+)", json.dumps(entry))
