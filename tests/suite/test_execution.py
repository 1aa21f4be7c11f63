import nbformat
import pytest

from helpers.suite.execution import execute, refuse_unknown_parameters
from helpers.suite.store import read_storable, source_hash

SMOKE = {"scale": "smoke", "subject": "embedded", "seed": 3}


@pytest.fixture
def run(write_notebook, tmp_path):
    def run(*sources: str, limit_s: float = 60.0):
        path = write_notebook("01_tiny", *sources)
        return execute(path, SMOKE, tmp_path / "copy.ipynb", limit_s)

    return run


def test_parameters_reach_the_cells_and_helpers_can_be_imported(run, tmp_path):
    outcome = run("import helpers.base.storage\n(scale, subject, seed)")
    copy = nbformat.read(tmp_path / "copy.ipynb", as_version=4)
    assert outcome.error == ""
    assert copy.cells[-1].outputs[0].data["text/plain"] == "('smoke', 'embedded', 3)"


def test_the_executed_copy_carries_its_parameters_and_the_hash_of_what_ran(write_notebook, tmp_path):
    edit = "from pathlib import Path\npath = Path('notebooks/01_tiny.ipynb')"
    edit = f"import os\nos.chdir({str(tmp_path)!r})\n{edit}\npath.write_text(path.read_text().replace('title', 'name'))"
    path = write_notebook("01_tiny", edit)
    before = source_hash(nbformat.read(path, as_version=4))
    execute(path, SMOKE, tmp_path / "copy.ipynb", 60.0)
    assert "# A name" in path.read_text()
    assert nbformat.read(tmp_path / "copy.ipynb", as_version=4).metadata.suite == {"source_hash": before, **SMOKE}


def test_a_failing_cell_is_named_as_a_reader_counts_and_its_copy_is_kept(run, tmp_path):
    outcome = run("1", "\nint('x')  # here\n2", "3")
    assert (outcome.cell, outcome.source) == (4, "int('x')  # here")
    assert outcome.error == "ValueError: invalid literal for int() with base 10: 'x'"
    assert nbformat.read(tmp_path / "copy.ipynb", as_version=4).cells[-1].execution_count is None


def test_a_kernel_that_dies_is_reported_and_its_copy_says_so(run, tmp_path):
    outcome = run("import os, time\ntime.sleep(0.5)  # so that the cell has its number\nos._exit(1)")
    assert (outcome.cell, outcome.source) == (3, "import os, time")
    assert outcome.error == "DeadKernelError: the kernel died; too little memory is the usual reason"
    with pytest.raises(ValueError, match="stopped in cell 3"):
        read_storable(tmp_path / "copy.ipynb", outcome.path)


def test_a_kernel_that_outlives_its_time_is_killed(run):
    outcome = run("import time\ntime.sleep(300)", limit_s=1.5)
    assert outcome.cell == 3
    assert outcome.error.startswith("TimeoutError: stopped after 0.025 minutes")
    assert outcome.minutes < 0.5


def test_a_notebook_that_ends_itself_early_has_failed(run):
    outcome = run("import sys\nsys.exit(0)", "2")
    assert (outcome.cell, outcome.error.partition(":")[0]) == (3, "SystemExit")


def test_unknown_parameters_are_refused(write_notebook):
    path = write_notebook("01_tiny", "1")
    with pytest.raises(ValueError, match="01_tiny.ipynb has no parameter sacle; its parameters are scale, seed, subj"):
        refuse_unknown_parameters(path, {"sacle": "smoke"})


def test_a_notebook_without_its_parameters_cell_is_refused(write_notebook):
    with pytest.raises(ValueError, match="has 0 cells tagged `parameters`, not one"):
        refuse_unknown_parameters(write_notebook("01_tiny", "1", tags=()), {})
    with pytest.raises(ValueError, match="lacks seed, subject"):
        refuse_unknown_parameters(write_notebook("01_tiny", "1", parameters='scale = "laptop"'), {})
