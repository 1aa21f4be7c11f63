"""The contract of a notebook: the same parameters everywhere, nothing tied to one machine, outputs a reader can see.

Every rule is a function from a notebook to sentences; a sentence says which cell breaks it and what to do. The rules
about outputs hold for the notebooks in notebooks/; a solution needs outputs but no figure.
"""

import ast
import base64
import json
import re
import symtable
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from helpers.base.storage import ROOT
from helpers.suite.run import PARAMETERS, parameter_cells
from helpers.suite.store import FIGURE, WIDGET_STATE, WIDGET_VIEW, failed, hashes, is_exercise

SIZE_LIMIT = 4_000_000  # bytes; code-hosting sites show nothing of a notebook much above it
MACHINE_PATH = re.compile(
    r"(?<![\w.:/~])/(?:home|Users|root|tmp|private|mnt|media|opt|usr|var|srv)/"  # a folder at the root of a disk
    r"|[A-Z]:[\\/]+Users"
)
BAR = re.compile(r"\d%\|")
RAW_FLOAT = re.compile(r"\d\.\d{7,}")
PAGE = 120  # characters of a printed line
INSTALLATION_PATH = re.compile(r"(?<![\w.~-])/[^\s\"'<>]{1,200}/(?:site-packages|dist-packages|ipykernel_\d+)/")


def is_stale(notebook: NotebookNode) -> bool:
    """True if the outputs of a committed notebook come from other code than it shows now."""
    stored = notebook.metadata.get("suite", {})
    return any(stored.get(name) != here for name, here in hashes(notebook).items())


def lint(path: Path) -> list[str]:
    """What is wrong with a notebook as it would be committed, one sentence each; an empty list if nothing is."""
    problems = [*_name(path), *_size(path), *_ids(path)] or _lint_cells(path)
    return [f"{path.parent.name}/{path.name}: {problem}" for problem in problems]


def _lint_cells(path: Path) -> list[str]:
    notebook = nbformat.read(path, as_version=4)
    outputs = lint_outputs(notebook) or ([] if path.parent.name == "solutions" else _figure(notebook))
    return [*lint_source(notebook), *_links(path, notebook), *outputs]


def lint_source(notebook: NotebookNode) -> list[str]:
    """The rules about what an author writes."""
    rules = (_parameters, _python, _paths, _kernel, _exercises, _overwritten)
    return [problem for rule in rules for problem in rule(notebook)]


def lint_outputs(notebook: NotebookNode) -> list[str]:
    """The rules about what a run leaves behind."""
    rules = (_has_outputs, _errors, _output_paths, _readable, _palette, _widgets, _gallery)
    return [problem for rule in rules for problem in rule(notebook)]


def _code(notebook: NotebookNode) -> Iterator[tuple[int, NotebookNode]]:
    """Code cells with their number, counting every cell from 1."""
    return ((number, cell) for number, cell in enumerate(notebook.cells, start=1) if cell.cell_type == "code")


# ---- the file


def _name(path: Path) -> Iterator[str]:
    if not re.fullmatch(r"\d\d_[a-z0-9_]+\.ipynb", path.name):
        yield "its name should be two digits, an underscore and lower-case words, as in 02_relu_against_topk.ipynb."


def _size(path: Path) -> Iterator[str]:
    size = path.stat().st_size
    if size > SIZE_LIMIT:
        yield f"it has {size / 1e6:.1f} MB, more than {SIZE_LIMIT / 1e6:.0f} MB; show fewer points or fewer figures."


def _ids(path: Path) -> Iterator[str]:
    """Outputs are stored by cell id. Read from the bare file, because nbformat quietly mends ids as it reads."""
    ids = [cell.get("id") for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    if None in ids or len(set(ids)) < len(ids):
        yield "every cell needs an id of its own; save it once with JupyterLab."


# ---- source


def _parameters(notebook: NotebookNode) -> Iterator[str]:
    tagged, code = parameter_cells(notebook), [cell for _, cell in _code(notebook)]
    if len(tagged) != 1 or tagged != code[:1]:
        yield f"exactly one cell, the first code cell, should be tagged `parameters`; {len(tagged)} are tagged."
    else:
        yield from _assignments(tagged[0].source)


def _assignments(source: str) -> Iterator[str]:
    """Only `name = literal`; the three of the suite with their defaults; others explained by a comment."""
    found = {}
    for statement in _statements(source) or []:
        try:
            (target,) = statement.targets
            found[target.id] = ast.literal_eval(statement.value)
        except (AttributeError, TypeError, ValueError):
            yield f"the parameters cell should hold only `name = literal`, not `{ast.unparse(statement)}`."
    for name, default in PARAMETERS.items():
        if found.get(name) != default:
            yield f"the parameters cell should say {name} = {default!r}."
    for name in found.keys() - PARAMETERS.keys():
        if not re.search(rf"^{name}\b.*#\s*\S", source, re.MULTILINE):
            yield f"parameter {name} is not one of {', '.join(PARAMETERS)}; say what it does in a comment on its line."


def _statements(source: str) -> list[ast.stmt] | None:
    """The statements of a cell, or None if it is not plain Python."""
    try:
        return ast.parse(source).body
    except SyntaxError:
        return None


def _python(notebook: NotebookNode) -> Iterator[str]:
    for number, cell in _code(notebook):
        if _statements(cell.source) is None:
            yield f"cell {number} is not plain Python; no shell lines and no magics."
        if re.search(r"\bpip\b|\bget_ipython\b", cell.source):
            yield f"cell {number} installs something or calls the shell; put the package in requirements.txt."


def _paths(notebook: NotebookNode) -> Iterator[str]:
    for number, cell in enumerate(notebook.cells, start=1):
        if MACHINE_PATH.search(cell.source) or str(ROOT) in cell.source:
            yield f"cell {number} names an absolute path; use the folders of helpers.base.storage."


def _kernel(notebook: NotebookNode) -> Iterator[str]:
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        yield "its kernelspec should be python3."


def _exercises(notebook: NotebookNode) -> Iterator[str]:
    """What is tagged `exercise` may be left blank, so nothing else stands on it."""
    trees = [(number, cell, ast.Module(_statements(cell.source) or [], [])) for number, cell in _code(notebook)]
    own = {name for _, cell, tree in trees if is_exercise(cell) for name in _bound(tree)}
    others = {name for _, cell, tree in trees if not is_exercise(cell) for name in _bound(tree)}
    for number, cell, tree in trees:
        if is_exercise(cell):
            continue
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        if called := sorted(used & {"exercise", "check_answer"}):
            yield f"cell {number} calls {called[0]}, so it belongs to an exercise; tag it `exercise`."
        if missing := sorted(used & (own - others)):
            yield f"cell {number} uses {missing[0]}, which an exercise defines; a reader may leave that blank."


def _bound(tree: ast.Module) -> Iterator[str]:
    """All names that a cell gives a meaning: assigned, defined, imported, or an argument."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.alias(name=name, asname=other):
                yield other or name
            case ast.arg(arg=name):
                yield name


def _overwritten(notebook: NotebookNode) -> Iterator[str]:
    """A name of the notebook's own is none of an exercise's: a cell that is run again would read the wrong one."""
    assigned = [(number, is_exercise(cell), set(_assigned(cell.source))) for number, cell in _code(notebook)]
    own = {name for _, exercise, names in assigned if not exercise for name in names}
    for number, exercise, names in assigned:
        if exercise and (taken := sorted(names & own)):
            yield f"cell {number} is an exercise's and overwrites {taken[0]} of the notebook; choose another name."


def _assigned(source: str) -> Iterator[str]:
    """The global names that a cell gives a meaning: assigned, defined or imported outside of any function."""
    cell = symtable.symtable(source if _statements(source) is not None else "", "cell", "exec")
    return (name.get_name() for name in cell.get_symbols() if name.is_assigned() or name.is_imported())


# ---- outputs


def _has_outputs(notebook: NotebookNode) -> Iterator[str]:
    if not any(cell.outputs for _, cell in _code(notebook)):
        yield "it holds no outputs; run `make reference`."


def _figure(notebook: NotebookNode) -> Iterator[str]:
    if not any("image/png" in output.get("data", {}) for _, cell in _code(notebook) for output in cell.outputs):
        yield "no output is a PNG, so a code-hosting site shows no figure; run `make reference` where a Chrome is."


def _gallery(notebook: NotebookNode) -> Iterator[str]:
    for number, cell in _code(notebook):
        shown = any("image/png" in output.get("data", {}) for output in cell.outputs)
        if "gallery" in cell.metadata.get("tags", []) and not shown:
            yield f"cell {number} is tagged `gallery` and shows no figure; tag the one that does."


def _errors(notebook: NotebookNode) -> Iterator[str]:
    for number, cell in _code(notebook):
        printed = "".join(output.text for output in cell.outputs if output.output_type == "stream")
        if failed(cell) or re.search("^NotImplementedError", printed, re.MULTILINE):
            yield f"cell {number} holds a stored error; mend it and run `make reference`."


def _output_paths(notebook: NotebookNode) -> Iterator[str]:
    for number, cell in _code(notebook):
        text = str(cell.outputs)
        if INSTALLATION_PATH.search(text) or str(ROOT) in text:
            yield f"the output of cell {number} names a folder of one machine; store it with `make reference`."


def _readable(notebook: NotebookNode) -> Iterator[str]:
    """What a reader should not have to read: progress bars, floats in full, tables and lines wider than the page."""
    for number, cell in _code(notebook):
        for output in cell.outputs:
            if FIGURE not in output.get("data", {}):  # its text is for a screen reader
                text = output.get("text") or output.get("data", {}).get("text/plain", "")
                yield from (f"cell {number} {problem}" for problem in _unreadable(text))


def _unreadable(text: str) -> Iterator[str]:
    if BAR.search(text):
        yield "shows a progress bar; store it with `make reference`, where bars are off."
    if found := RAW_FLOAT.search(text):
        yield f"prints {found[0]} in full; round it."
    if (longest := max(map(len, text.splitlines()), default=0)) > PAGE:
        yield f"prints a line of {longest} characters, wider than a page of {PAGE}; wrap it, or show fewer columns."


def _palette(notebook: NotebookNode) -> Iterator[str]:
    """Byte 25 of a PNG is its colour type, 3 for a palette."""
    for number, cell in _code(notebook):
        images = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
        if any(base64.b64decode(image)[25:26] not in (b"\x03", b"") for image in images):
            yield f"the image of cell {number} has no palette; store it with `make reference`."


def dead_links(text: str, folder: Path) -> list[str]:
    """Links of a Markdown text in `folder` to files of the repository that are not there."""
    found = re.findall(r"(?:\]\(|(?:src|href)=\")([^)\s\"#]+)", text)
    return [
        link for link in found if "://" not in link and not link.startswith("mailto:") and not (folder / link).exists()
    ]


def _links(path: Path, notebook: NotebookNode) -> Iterator[str]:
    for number, cell in enumerate(notebook.cells, start=1):
        for link in dead_links(cell.source, path.parent) if cell.cell_type == "markdown" else []:
            yield f"cell {number} links to {link}, which is not there."


def _widgets(notebook: NotebookNode) -> Iterator[str]:
    """Code-hosting sites refuse the whole notebook when the widget metadata lacks its `state` key."""
    widgets = notebook.metadata.get("widgets")
    if widgets is not None and "state" not in widgets.get(WIDGET_STATE, {}):
        yield "its widget metadata has no `state`; store it with `make reference`."
    models = (widgets or {}).get(WIDGET_STATE, {}).get("state", {})
    for number, cell in _code(notebook):
        views = (output.get("data", {}).get(WIDGET_VIEW, {}).get("model_id") for output in cell.outputs)
        if any(view and view not in models for view in views):
            yield f"cell {number} shows a widget whose state is not stored; store it with `make reference`."
