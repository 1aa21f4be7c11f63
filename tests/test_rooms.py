"""The rooms of `helpers`: every module lives in one, imports point one way, and the package's text lists them all."""

import ast
import re
from pathlib import Path

import pytest

import helpers
from helpers.base.storage import ROOT

HOUSE = ROOT / "helpers"
ROOMS = re.findall(r"^(\w+)  ", helpers.__doc__, re.MULTILINE)  # from the ground up
MODULES = sorted(path for path in HOUSE.rglob("*.py") if path.parent != HOUSE)


def rooms_imported(path: Path) -> set[str]:
    """Rooms whose modules a file names in an import, wherever it stands in the file."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("helpers.")}


def test_every_module_lives_in_a_room_that_the_package_lists():
    assert sorted(ROOMS) == sorted(path.name for path in HOUSE.iterdir() if (path / "__init__.py").is_file())
    assert [path.name for path in HOUSE.glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_a_room_imports_only_rooms_above_it(path):
    allowed = ROOMS[: ROOMS.index(path.parent.name) + 1]
    assert rooms_imported(path) <= set(allowed), f"{path.parent.name} may import {', '.join(allowed)}"


def test_an_import_that_points_upward_is_seen(tmp_path):
    module = tmp_path / "module.py"
    module.write_text(
        "import numpy\n\n\ndef late():\n    from helpers.suite.run import find\n    import helpers.text\n"
    )
    assert rooms_imported(module) == {"suite", "text"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_lives_in_it_and_what_it_may_use(room):
    text = ast.get_docstring(ast.parse((HOUSE / room / "__init__.py").read_text(encoding="utf-8")))
    assert text.count("\n") >= 3 and re.search(r"It may import|It imports no", text)


def test_the_tests_mirror_the_rooms():
    modules = {(path.parent.name, path.stem) for path in MODULES}
    tested = [(path.parent.name, path.stem[5:]) for room in ROOMS for path in (ROOT / "tests" / room).glob("test_*.py")]
    homeless = [(room, name) for room, name in tested if not {(room, name), (room, name.rpartition("_")[0])} & modules]
    assert homeless == [], "a test file is called test_<module>.py or test_<module>_<aspect>.py"
