"""The README's gallery shows the figures of the committed notebooks."""

import base64

import nbformat
from nbformat import v4

from helpers.base.storage import ROOT
from helpers.notebook.claims import fill
from helpers.suite.gallery import GALLERY, markdown, pictures


def test_the_readme_and_its_pictures_are_current():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert fill(readme, "gallery", markdown()) == readme, (
        "run `python -m helpers.suite.gallery` and commit what it changed"
    )
    stored = {path.stem: path.read_bytes() for path in GALLERY.glob("*.png")}
    assert stored == {path.name[:2]: png for path, (_, png) in pictures().items()}


def test_only_the_tagged_figure_is_taken(tmp_path):
    data = {"image/png": base64.b64encode(b"tagged").decode(), "text/plain": "TopK wins"}
    shown, other = (v4.new_code_cell(outputs=[v4.new_output("display_data", data)]) for _ in range(2))
    shown.metadata["tags"] = ["gallery"]
    nbformat.write(v4.new_notebook(cells=[other, shown]), tmp_path / "02_x.ipynb")
    nbformat.write(v4.new_notebook(cells=[other]), tmp_path / "03_y.ipynb")
    assert pictures(tmp_path) == {tmp_path / "02_x.ipynb": ("TopK wins", b"tagged")}
    assert markdown(tmp_path) == "[![TopK wins](data/gallery/02.png)](notebooks/02_x.ipynb)"
