"""CONTRIBUTING.md names what is there, and each of its recipes stays short."""

import importlib
import re

import pytest

from helpers.base.storage import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
NAMED = {
    "helpers.notebook.run": ["Run"],
    "helpers.dictionaries.sweeps": ["ACTIVATIONS"],
    "helpers.published.load": ["LAYOUTS"],
    "helpers.diffing.methods": ["Method", "STANDARD", "of_crosscoder", "of_directions", "of_sae"],
}


def test_files_and_folders_that_it_names_exist():
    names = set(re.findall(r"\]\(([^)]+)\)|\b((?:tests|helpers)/[\w/]+(?:\.py)?)", TEXT))
    missing = [name for pair in names for name in pair if name and not (ROOT / name).exists()]
    assert names and missing == []


def test_commands_are_those_of_the_makefile():
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    called = set(re.findall(r"(?:^|`)make ([a-z]+)", TEXT, re.MULTILINE))
    assert called and called <= set(targets)


@pytest.mark.parametrize("module", NAMED)
def test_names_that_it_gives_are_in_their_modules(module):
    found = importlib.import_module(module)
    assert [name for name in NAMED[module] if not hasattr(found, name) or not re.search(rf"\b{name}\b", TEXT)] == []


@pytest.mark.parametrize(
    "title", ["a notebook", "an architecture", "a diffing method", "a layout of published dictionaries"]
)
def test_a_recipe_has_fewer_than_ten_lines(title):
    recipe = re.search(rf"^## Add {title}\n\n(.+?)\n\n##", TEXT, re.MULTILINE | re.DOTALL)[1]
    assert len(recipe.splitlines()) < 10
