"""The README's gallery: the figure of each notebook that carries its message, taken from the notebook's own outputs.

A notebook marks it by the cell tag `gallery`. The image is stored as data/gallery/<number>.png; its alt text is the
figure's title, which states the finding.
"""

import base64
from pathlib import Path

import nbformat

from helpers.base.storage import DATA, ROOT, write_atomic
from helpers.notebook.claims import NOTEBOOKS, fill

GALLERY = DATA / "gallery"


def pictures(notebooks: Path = NOTEBOOKS) -> dict[Path, tuple[str, bytes]]:
    """Notebook -> (title, PNG) of its cell tagged `gallery`, in reading order; notebooks without one are left out."""
    found = {}
    for path in sorted(notebooks.glob("[0-9][0-9]_*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            for output in cell.get("outputs", []) if "gallery" in cell.metadata.get("tags", []) else []:
                if "image/png" in output.get("data", {}):
                    found[path] = (output.data["text/plain"], base64.b64decode(output.data["image/png"]))
    return found


def markdown(notebooks: Path = NOTEBOOKS) -> str:
    """The pictures as links to their notebooks."""
    shown = [(path, path.name[:2], title) for path, (title, _) in pictures(notebooks).items()]
    return "\n\n".join(f"[![{title}](data/gallery/{number}.png)](notebooks/{p.name})" for p, number, title in shown)


def main() -> None:
    """Store the pictures and rewrite the README's gallery."""
    for path, (_, png) in pictures().items():
        write_atomic(GALLERY / f"{path.name[:2]}.png", png)
    readme = ROOT / "README.md"
    write_atomic(readme, fill(readme.read_text(encoding="utf-8"), "gallery", markdown()))


if __name__ == "__main__":
    main()
