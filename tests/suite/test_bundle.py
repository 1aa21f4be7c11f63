"""The workshop's bundle: what is in it, and that it installs without a network. `tests/benchmarks/offline_bundle.py`
installs the real one."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from helpers.suite import bundle
from helpers.suite.bundle import build, cleared, collect_wheels, scripts

BACKEND = """import zipfile
def build_editable(folder, *_):
    about = "Metadata-Version: 2.1\\nName: tiny\\nVersion: 1\\n"
    with zipfile.ZipFile(f"{folder}/tiny-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny-1.dist-info/METADATA", about)
        wheel.writestr("tiny-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("tiny-1.dist-info/RECORD", "")
    return "tiny-1-py3-none-any.whl"
"""
PROJECT = '[project]\nname = "tiny"\nversion = "1"\n[build-system]\nrequires = []\nbuild-backend = "backend"\n'
PROJECT += 'backend-path = ["."]\n'


def stand_in(requirements: Path, wheels: Path) -> None:
    """A wheel by hand in place of the pins: the package `standin`, a module that holds the number 7."""
    tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    about = {"METADATA": "Metadata-Version: 2.1\nName: standin\nVersion: 1.0\n", "WHEEL": tags, "RECORD": ""}
    files = {"standin.py": "seven = 7\n"} | {f"standin-1.0.dist-info/{name}": text for name, text in about.items()}
    with zipfile.ZipFile(wheels / "standin-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(zipfile.ZipInfo(name), text)  # dated 1980


@pytest.fixture
def repository(tmp_path):
    """A small suite in git: pins, an executed notebook, a doctor; and a file that is not committed."""
    root = tmp_path / "repository"
    (root / "helpers" / "suite").mkdir(parents=True)
    cell = v4.new_code_cell("1", outputs=[v4.new_output("stream", text="1")], execution_count=3)
    nbformat.write(v4.new_notebook(cells=[cell]), root / "00_tiny.ipynb")
    (root / "requirements.txt").write_text("standin==1.0\n")
    (root / "pyproject.toml").write_text(PROJECT)
    (root / "backend.py").write_text(BACKEND)
    (root / "helpers" / "suite" / "doctor.py").write_text("import standin\nprint('Ready:', standin.seven)\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "all"]):
        subprocess.run([*git, *command], cwd=root, check=True)
    (root / "mine.txt").touch()
    return root


def test_it_holds_the_commit_the_wheels_and_the_scripts_in_order(repository, tmp_path):
    path = build(tmp_path / "out", repository, stand_in)
    with zipfile.ZipFile(path) as bundle:
        names = [name.removeprefix(f"{path.stem}/") for name in bundle.namelist()]
        notebook = nbformat.reads(bundle.read(f"{path.stem}/00_tiny.ipynb").decode(), as_version=4)
    assert names == [
        *("00_tiny.ipynb", "START.md", "backend.py", "helpers/suite/doctor.py", "install.ps1", "install.sh"),
        *("pyproject.toml", "requirements.txt", "wheels/standin-1.0-py3-none-any.whl"),
    ]
    assert notebook.cells[0].outputs == [] and notebook.cells[0].execution_count is None
    assert notebook.cells[0].source == "1"


def test_the_same_commit_gives_the_same_bytes(repository, tmp_path):
    first, second = (build(tmp_path / name, repository, stand_in).read_bytes() for name in ("a", "b"))
    assert first == second


def test_a_build_that_breaks_off_leaves_what_was_there(repository, tmp_path, monkeypatch):
    whole = build(tmp_path / "out", repository, stand_in)
    before = whole.read_bytes()

    def breaks(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "out", repository, breaks)
    monkeypatch.setattr(bundle, "_add", breaks)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "out", repository, stand_in)
    assert [path.read_bytes() for path in (tmp_path / "out").iterdir()] == [before]


def test_cleared_keeps_all_that_a_reader_edits():
    cell = v4.new_code_cell("x", metadata={"tags": ["parameters"]}, outputs=[v4.new_output("stream", text="é")])
    notebook = v4.new_notebook(cells=[v4.new_markdown_cell("é"), cell], metadata={"widgets": {}, "suite": {"seed": 0}})
    found = nbformat.reads(cleared(nbformat.writes(notebook).encode()).decode(), as_version=4)
    assert found.cells[0] == notebook.cells[0] and found.metadata == {"suite": {"seed": 0}}
    assert found.cells[1] == cell | {"outputs": []}


def test_a_torch_for_a_gpu_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, check: (tmp_path / "nvidia_cudnn-9.whl").touch())
    with pytest.raises(ValueError, match="1 packages for a GPU, such as nvidia_cudnn-9.whl; let PIP_EXTRA_INDEX_URL"):
        collect_wheels(tmp_path / "requirements.txt", tmp_path)


# ---- the scripts


def installed(folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """`bash install.sh` in an unpacked bundle, with an index that cannot be reached and an empty home."""
    (folder.parent / "home").mkdir(exist_ok=True)
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_RETRIES": "0", "HOME": str(folder.parent / "home")}
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    command = ["bash", str(folder / "install.sh")]
    return subprocess.run(command, capture_output=True, text=True, env=clean | nowhere | variables)


@pytest.fixture
def unpacked(repository, tmp_path):
    path = build(tmp_path / "out", repository, stand_in)
    shutil.unpack_archive(path, tmp_path / "laptop")
    return tmp_path / "laptop" / path.stem


def test_it_installs_without_a_network_and_asks_the_doctor(unpacked):
    run = installed(unpacked, PYTHON=sys.executable)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0] == "Ready: 7"
    assert (unpacked / ".venv" / ".ready").exists()


def test_another_python_is_one_clear_sentence(unpacked):
    script = unpacked / "install.sh"
    script.write_text(script.read_text().replace(f"{sys.version_info[:2]}"[1:-1], "2, 7"))
    run = installed(unpacked, PYTHON=sys.executable)
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    assert run.stderr.startswith(f"This bundle is for Python {sys.version_info[0]}.{sys.version_info[1]} on ")
    assert not (unpacked / ".venv").exists()


def test_every_blank_is_filled_and_both_scripts_do_the_same():
    texts = {name: content.decode() for name, content in scripts().items()}
    assert sorted(texts) == ["START.md", "install.ps1", "install.sh"]
    assert [name for name, text in texts.items() if re.search(r"@[A-Z]+@", text)] == []
    steps = [re.findall(r"-m (venv|pip|helpers\S+)(.*)", texts[name]) for name in ("install.sh", "install.ps1")]
    assert steps[0] == steps[1] and [step[0] for step in steps[0]] == ["venv", "pip", "helpers.suite.doctor"]
    check = re.search(r'-c "(.+)"', texts["install.ps1"])[1]
    assert '"' not in check and subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_the_powershell_script_is_balanced_and_uses_what_every_windows_has():
    text = scripts()["install.ps1"].decode()
    assert all(text.count(left) == text.count(right) for left, right in ("()", "{}", "[]")) and text.isascii()
    cmdlets = set(re.findall(r"\b[A-Z][a-z]+-[A-Z][A-Za-z]+\b", text))
    assert cmdlets == {"Set-Location", "Get-Command", "Write-Host", "Join-Path"}
    assert not re.search(r"&&|\|\||\?\?", text)  # newer than 5.1
