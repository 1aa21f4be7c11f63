import base64
import io
from pathlib import Path

import nbformat
import notebook_lint
import pytest
from nbformat.v4 import new_code_cell, new_output
from notebook_lint import SIZE_LIMIT, lint
from PIL import Image

from helpers.suite.store import WIDGET_STATE, WIDGET_VIEW


def png(mode: str) -> str:
    Image.new(mode, (2, 2)).save(file := io.BytesIO(), "PNG")
    return base64.b64encode(file.getvalue()).decode()


PNG = png("P")


@pytest.fixture
def notebook(write_notebook):
    """A notebook that keeps the contract: its path."""
    path = write_notebook("01_tiny", "print(1)")
    change(path, outputs=[new_output("display_data", {"image/png": PNG})])
    return path


def change(path, cell: int = 2, **values) -> None:
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[cell].update(values)
    nbformat.write(notebook, path)


def test_a_notebook_that_keeps_the_contract_has_no_problems(notebook):
    assert lint(notebook) == []


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("!ls", "cell 3 is not plain Python"),
        ("%matplotlib inline", "cell 3 is not plain Python"),
        ("import pip", "cell 3 installs something"),
        ("get_ipython().system('x')", "cell 3 installs something"),
        ("open('/home/ada/x')", "cell 3 names an absolute path"),
        ("open('/tmp/x')", "cell 3 names an absolute path"),
        ("open(r'C:\\Users\\ada')", "cell 3 names an absolute path"),
    ],
)
def test_code_tied_to_one_machine(notebook, source, problem):
    change(notebook, source=source)
    assert [problem in sentence for sentence in lint(notebook)] == [True]


def test_the_folder_of_the_repository_is_found_wherever_it_lies(notebook, monkeypatch):
    monkeypatch.setattr(notebook_lint, "ROOT", Path("/projects/suite"))
    shown = new_output("display_data", {"image/png": PNG})
    change(notebook, source="open('/projects/suite/x')")
    assert "cell 3 names an absolute path" in lint(notebook)[0]
    change(notebook, source="1", outputs=[shown, new_output("stream", name="stdout", text="/projects/suite/x")])
    assert "the output of cell 3 names a folder of one machine" in lint(notebook)[0]


@pytest.mark.parametrize("source", ["a / home / b", "'see example.org/home/x'", "x = 'pipeline'", "r'E:\\mathbb{R}'"])
def test_code_that_only_looks_like_it(notebook, source):
    change(notebook, source=source)
    assert lint(notebook) == []


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ('scale = "laptop"\nsubject = "embedded"', "should say seed = 0"),
        ('scale = "smoke"\nsubject = "embedded"\nseed = 0', "should say scale = 'laptop'"),
        ('scale = "laptop"\nsubject = "embedded"\nseed = 0\nsteps = 3', "parameter steps is not one of"),
        ('scale = "laptop"\nsubject = "embedded"\nseed = 0\nimport os', "only `name = literal`, not `import os`"),
        ('scale = "laptop"\nsubject = "embedded"\nseed = 0\nx = f()  # why', "only `name = literal`, not `x = f()`"),
    ],
)
def test_the_parameters_cell(notebook, parameters, problem):
    change(notebook, cell=1, source=parameters)
    assert [problem in sentence for sentence in lint(notebook)] == [True]


def test_a_further_parameter_is_fine_with_a_comment(notebook):
    change(notebook, cell=1, source='scale = "laptop"\nsubject = "embedded"\nseed = 0\ntrain = False  # takes hours')
    assert lint(notebook) == []


def test_one_first_parameters_cell(write_notebook, notebook):
    change(notebook, metadata={"tags": ["parameters"]})
    assert "exactly one cell, the first code cell, should be tagged `parameters`; 2 are" in lint(notebook)[0]
    change(notebook, cell=1, metadata={})
    assert "1 are tagged" in lint(notebook)[0]


def test_outputs(notebook):
    change(notebook, outputs=[])
    assert lint(notebook) == ["notebooks/01_tiny.ipynb: it holds no outputs; run `make reference`."]
    change(notebook, outputs=[new_output("stream", name="stdout", text="1")])
    assert "no output is a PNG" in lint(notebook)[0]
    shown = new_output("display_data", {"image/png": PNG})
    change(notebook, outputs=[shown, new_output("error", ename="E", evalue="", traceback=[])])
    assert "cell 3 holds a stored error" in lint(notebook)[0]
    change(notebook, outputs=[shown, new_output("stream", name="stdout", text="x\nNotImplementedError: y")])
    assert "cell 3 holds a stored error" in lint(notebook)[0]
    change(notebook, outputs=[shown, new_output("stream", name="stderr", text="/a/lib/site-packages/x.py: hm")])
    assert "the output of cell 3 names a folder of one machine" in lint(notebook)[0]


def test_a_solution_needs_outputs_but_no_figure(notebook):
    change(notebook, outputs=[new_output("stream", name="stdout", text="✔")])
    (notebook.parent / "solutions").mkdir()
    assert "no output is a PNG" in lint(notebook)[0]
    assert lint(notebook.rename(notebook.parent / "solutions" / notebook.name)) == []


def test_widgets_need_their_state(notebook):
    views = [new_output("display_data", {WIDGET_VIEW: {"model_id": "a"}, "image/png": PNG})]
    change(notebook, outputs=views)
    assert "shows a widget whose state is not stored" in lint(notebook)[0]
    node = nbformat.read(notebook, as_version=4)
    node.metadata.widgets = {WIDGET_STATE: {}}
    nbformat.write(node, notebook)
    assert "widget metadata has no `state`" in lint(notebook)[0]
    node.metadata.widgets = {WIDGET_STATE: {"state": {"a": {}}}}
    nbformat.write(node, notebook)
    assert lint(notebook) == []


def test_name_size_and_kernel(notebook):
    assert "two digits, an underscore" in lint(notebook.rename(notebook.with_name("01_tiny-Copy1.ipynb")))[0]
    notebook = notebook.with_name("01_tiny-Copy1.ipynb").rename(notebook)
    node = nbformat.read(notebook, as_version=4)
    node.metadata.kernelspec.name = "my-env"
    nbformat.write(node, notebook)
    assert "kernelspec should be python3" in lint(notebook)[0]
    change(notebook, cell=0, source="x" * SIZE_LIMIT)
    assert "it has 4.0 MB, more than 4 MB" in lint(notebook)[0]


@pytest.mark.parametrize("ids", ['"id": "cell-2"', '"name": "none"'])
def test_every_cell_needs_an_id_of_its_own(notebook, ids):
    notebook.write_text(notebook.read_text().replace('"id": "cell-1"', ids))
    assert "every cell needs an id of its own" in lint(notebook)[0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (" 50%|#####     | 1/2 [00:03<00:03]", "shows a progress bar"),
        ("{'L1': 0.10250000655651093}", "prints 0.10250000655651093 in full"),
        ("x" * 121, "prints a line of 121 characters"),
        ("NMSE 0.1025, 50% | 1\n" + "x" * 120, ""),
    ],
)
def test_outputs_a_reader_can_read(notebook, text, problem):
    shown = nbformat.read(notebook, as_version=4).cells[2].outputs
    for output in (new_output("stream", text=text), new_output("execute_result", {"text/plain": text})):
        change(notebook, outputs=[*shown, output])
        assert [problem in sentence for sentence in lint(notebook)] == [True] * bool(problem)


def test_images_have_a_palette(notebook):
    for mode, problems in (("P", 0), ("RGB", 1)):
        change(notebook, outputs=[new_output("display_data", {"image/png": png(mode)})])
        assert len(lint(notebook)) == problems


def test_the_cell_of_the_gallery_shows_a_figure(notebook):
    change(notebook, metadata={"tags": ["gallery"]})
    assert lint(notebook) == []
    change(notebook, outputs=[new_output("stream", text="1")])
    assert "cell 3 is tagged `gallery` and shows no figure" in lint(notebook)[-1]


def test_links_lead_somewhere(notebook):
    (notebook.parent / "there.ipynb").touch()
    change(notebook, 0, source='[a](there.ipynb#part) [b](gone.ipynb) [c](https://example.org) <img src="no.png">')
    assert [sentence.partition(" links to ")[2] for sentence in lint(notebook)] == [
        "gone.ipynb, which is not there.",
        "no.png, which is not there.",
    ]


@pytest.mark.parametrize(
    ("own", "exercise", "problem"),
    [
        ("x = 1", "x = 2", "cell 4 is an exercise's and overwrites x"),
        ("x = 1", "def x():\n    pass", "overwrites x"),
        ("def x():\n    pass", "for x in range(3):\n    pass", "overwrites x"),
        ("import math as x", "import cmath as x", "overwrites x"),
        ("print(x)", "x = 2", "cell 3 uses x, which an exercise defines"),
        ("x = 1", "def mine(x):\n    return [x for x in x]", ""),  # names of a function are its own
        ("def f(x):\n    y = x\n    return y", "x = y = 1", ""),
    ],
)
def test_the_notebook_and_its_exercises_share_no_names(notebook, own, exercise, problem):
    change(notebook, source=own)
    node = nbformat.read(notebook, as_version=4)
    node.cells.append(new_code_cell(exercise, metadata={"tags": ["exercise"]}))
    nbformat.write(node, notebook)
    assert [problem in sentence for sentence in lint(notebook)] == [True] * bool(problem)
