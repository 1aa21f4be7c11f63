"""How the tests run: offline, on the CPU, with the same examples every time, and the slow notebooks last."""

import os
import warnings
from pathlib import Path

# Before torch and huggingface_hub are imported; the kernels of notebooks inherit these.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a second one buys little, and tests run beside each other
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import nbformat
import pytest
from hub_server import live_hub  # noqa: F401 (a fixture for all)
from huggingface_hub import constants
from hypothesis import HealthCheck, settings
from tiny_shelf import open_shelf  # noqa: F401 (a fixture for all)

from helpers.suite.run import lanes

settings.register_profile(
    "suite", derandomize=True, deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")

PARAMETERS = 'scale = "laptop"\nsubject = "embedded"\nseed = 0'


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name == "test_notebooks.py")  # stable: the rest keeps its order


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Tests run as many at a time as notebooks do: each worker may have one under way."""
    return lanes("smoke")


@pytest.fixture(autouse=True)
def results_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test writes results into the repository."""
    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty hub cache, offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.fixture
def write_notebook(tmp_path: Path):
    """Returns write(name, *sources): a small notebook with a parameters cell and these code cells, in tmp_path."""

    def write(name: str, *sources: str, parameters: str = PARAMETERS, tags: tuple[str, ...] = ("parameters",)) -> Path:
        v4 = nbformat.v4
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        cells = [v4.new_markdown_cell("# A title"), v4.new_code_cell(parameters, metadata={"tags": list(tags)})]
        cells += [v4.new_code_cell(source) for source in sources]
        for number, cell in enumerate(cells):
            cell.id = f"cell-{number}"
        path = tmp_path / "notebooks" / f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            nbformat.write(v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
        return path

    return write
