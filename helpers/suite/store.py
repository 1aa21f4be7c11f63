"""What the repository keeps of a run: cleaned outputs with one image per figure, and hashes of the code.

    source hash      sha256 of the code cells, without those tagged `exercise`: what all results depend on
    exercises hash   sha256 of the code cells tagged `exercise`: random small inputs, so of no scale or subject

Prose, outputs and metadata never change them. A run writes both into the executed copy; `store` takes them along into
notebooks/, and `store_exercises` the second alone, from a run at any scale. A committed notebook whose code has another
hash is stale.

Figures get their PNG here, and not in the run: readers need no Chrome. A palette of 128 colours takes a quarter of the
bytes and shows no difference.
"""

import asyncio
import base64
import hashlib
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import kaleido
import nbformat
from choreographer.errors import BrowserFailedError, ChromeNotFoundError
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from nbformat import NotebookNode
from PIL import Image

from helpers.base.storage import ROOT, write_atomic
from helpers.figures.style import HEIGHT, WIDTH

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
FIGURE = "application/vnd.plotly.v1+json"
HASHES = ("source_hash", "exercises_hash")
COLOURS = 128
BASE64 = {"image/png", "image/jpeg", "bdata"}  # long, and a path found in one would be chance
ADDED_BY_PAPERMILL = {"injected-parameters", "papermill-error-cell-tag"}
KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}


def hashes(notebook: NotebookNode) -> dict[str, str]:
    """`source_hash` and `exercises_hash` of a notebook, as at the module's head, without the cells papermill added."""
    code = [cell for cell in own_cells(notebook.cells) if cell.cell_type == "code"]
    parts = {"source_hash": [cell.source for cell in code if not is_exercise(cell)]}
    parts |= {"exercises_hash": [cell.source for cell in code if is_exercise(cell)]}
    return {name: hashlib.sha256(json.dumps(sources).encode()).hexdigest() for name, sources in parts.items()}


def is_exercise(cell: NotebookNode) -> bool:
    """True for a cell that nothing of a notebook's results depends on."""
    return "exercise" in cell.metadata.get("tags", [])


def own_cells(cells: list[NotebookNode]) -> list[NotebookNode]:
    """The cells of the notebook itself, without those papermill adds to an executed copy."""
    return [cell for cell in cells if not ADDED_BY_PAPERMILL.intersection(cell.metadata.get("tags", []))]


def store(executed: Path, committed: Path) -> None:
    """Copy outputs of `executed` into `committed`, cell by cell id, cleaned, with execution counts from 1.

    Raises ValueError, and changes nothing, if the executed copy is missing, failed or belongs to an older source, and
    RuntimeError where there is a figure and no Chrome.
    """
    notebook, run = nbformat.read(committed, as_version=4), read_storable(executed, committed)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    _take_outputs(code, run, code)
    notebook.metadata = NotebookNode(KERNEL | {"suite": run.metadata.suite} | _widgets(run, code))
    write_atomic(committed, compact(notebook))


def store_exercises(executed: Path, committed: Path) -> None:
    """Copy the outputs of cells tagged `exercise` alone, from a run at any scale. Raises what `store` raises."""
    notebook, run = nbformat.read(committed, as_version=4), read_storable(executed, committed, ("exercises_hash",))
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    _take_outputs([cell for cell in code if is_exercise(cell)], run, code)
    notebook.metadata.suite["exercises_hash"] = run.metadata.suite["exercises_hash"]
    write_atomic(committed, compact(notebook))


def _take_outputs(cells: list[NotebookNode], run: NotebookNode, code: list[NotebookNode]) -> None:
    """Give `cells` their outputs in `run`, cleaned and with images, and all `code` its execution counts from 1."""
    run, _ = CoalesceStreamsPreprocessor().preprocess(run, {})
    outputs = {cell.id: cell.get("outputs", []) for cell in own_cells(run.cells)}
    for cell in cells:
        cell.outputs = [nbformat.from_dict(_without_paths(plain_table(_still(output)))) for output in outputs[cell.id]]
    for count, cell in enumerate((cell for cell in code if cell.source.strip()), start=1):
        cell.execution_count = count
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
    add_images([output for cell in cells for output in cell.outputs])


def read_storable(executed: Path, committed: Path, of: Sequence[str] = HASHES) -> NotebookNode:
    """The executed copy, or ValueError if it is missing, stopped early, or ran other code by the hashes `of`."""
    if not executed.exists():
        raise ValueError(f"{executed.name} has no executed copy in {executed.parent}; run it before storing it.")
    run = nbformat.read(executed, as_version=4)
    suite = run.metadata.get("suite", {})
    if stopped := suite.get("stopped_in") or unfinished_cell(run):
        raise ValueError(f"{executed.name} stopped in cell {stopped}; mend it and run it again before storing it.")
    here = hashes(nbformat.read(committed, as_version=4))
    if any(suite.get(name) != here[name] for name in of):
        raise ValueError(f"{executed.name} has changed since it was run; run it again before storing it.")
    return run


def unfinished_cell(run: NotebookNode) -> int | None:
    """Number (from 1) of the first code cell that failed or did not end, or None if all ran."""
    for number, cell in enumerate(own_cells(run.cells), start=1):
        if cell.cell_type == "code" and cell.source.strip():
            ended = cell.metadata.get("papermill", {}).get("status", "completed") == "completed"
            if failed(cell) or cell.execution_count is None or not ended:
                return number
    return None


def failed(cell: NotebookNode) -> bool:
    """True if a code cell holds an error among its outputs."""
    return any(output.output_type == "error" for output in cell.get("outputs", []))


def compact(notebook: NotebookNode) -> str:
    """The notebook as JSON with a line per line of source, and one for each piece of data in an output.

    A figure is then one line, not a line per number; nbformat reads it like any other.
    """
    plain, pieces = json.loads(nbformat.writes(notebook)), []
    for cell in plain["cells"]:
        for output in cell.get("outputs", []):
            for kind, value in output.get("data", {}).items():
                if isinstance(value, dict):
                    pieces.append(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
                    output["data"][kind] = f"\0{len(pieces) - 1}\0"
    text = json.dumps(plain, ensure_ascii=False, indent=1)
    return re.sub(r'"\\u0000(\d+)\\u0000"', lambda match: pieces[int(match[1])], text) + "\n"


# ---- images


def add_images(outputs: list[NotebookNode]) -> None:
    """Give each plotly figure among the outputs a PNG, all from one browser."""
    figures = [output for output in outputs if FIGURE in output.get("data", {})]
    for output, png in zip(figures, pngs([output.data[FIGURE] for output in figures]), strict=True):
        output.data["image/png"] = base64.b64encode(in_palette(png)).decode()
        output.metadata["image/png"] = {"alt": output.data["text/plain"], "width": WIDTH}


def pngs(figures: list[dict]) -> list[bytes]:
    """Figures (plotly's JSON) as PNGs. Nothing is fetched: MathJax, which kaleido would load, is off.

    Raises RuntimeError where Chrome is missing or fails.
    """
    try:
        return asyncio.run(_drawn(figures)) if figures else []
    except (ChromeNotFoundError, BrowserFailedError) as error:
        raise RuntimeError(
            f"no PNG can be made of the figures ({error}): install Chromium, then store again"
        ) from error


async def _drawn(figures: list[dict]) -> list[bytes]:
    async with kaleido.Kaleido(mathjax=False) as browser:
        sizes = [{"width": WIDTH, "height": figure["layout"].get("height", HEIGHT)} for figure in figures]
        drawn = [{key: figure[key] for key in ("data", "layout")} for figure in figures]
        return [await browser.calc_fig(f, opts={"format": "png"} | size) for f, size in zip(drawn, sizes, strict=True)]


def in_palette(png: bytes) -> bytes:
    """The same picture in `COLOURS` colours."""
    few = Image.open(io.BytesIO(png)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    few.save(file := io.BytesIO(), "PNG", optimize=True)
    return file.getvalue()


# ---- what is of this machine


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
    home = Path.home()
    return text.replace(str(ROOT), ".").replace(f"{home}/", "~/" if len(home.parts) > 1 else f"{home}/")


def _still(output: NotebookNode) -> NotebookNode:
    """Of a widget that says in HTML what it shows, the HTML: nbconvert takes the widget, which is blank offline."""
    if "text/html" in output.get("data", {}):
        output.data.pop(WIDGET_VIEW, None)
    return output


def plain_table(output: NotebookNode) -> NotebookNode:
    """A table of pandas without its style, which readers of notebooks have, and without blanks between its tags."""
    html = output.get("data", {}).get("text/html", "")
    if 'class="dataframe' in html:
        html = re.sub(r"<style scoped>.*?</style>", "", html, flags=re.DOTALL)
        output.data["text/html"] = re.sub(r">\s+<", "><", html)
    return output


def _widgets(run: NotebookNode, code: list[NotebookNode]) -> dict:
    """The metadata entry with the state of the widgets, or nothing where none is shown."""
    state = run.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    if not any(WIDGET_VIEW in output.get("data", {}) for cell in code for output in cell.outputs):
        return {}
    kept = {model: _without_paths(entry) for model, entry in state.items()}
    return {"widgets": {WIDGET_STATE: {"state": kept, "version_major": 2, "version_minor": 0}}}
