"""Every notebook at smoke scale with its models on a pretended device: minutes each, so on request."""

import pytest
from pretend_gpu import run_notebook

from helpers.suite.run import find


@pytest.mark.parametrize("path", find(), ids=lambda path: path.stem)
def test_a_notebook_runs_there(path, tmp_path, monkeypatch):
    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path))
    assert run_notebook(path)["run"].path.is_file()
