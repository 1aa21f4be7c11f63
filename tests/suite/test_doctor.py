"""The doctor names what is wrong and how to mend it, also where nothing is installed."""

import re
import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

from helpers.base.storage import MODELS, cache_dir
from helpers.suite import doctor
from helpers.suite.doctor import Finding, examine, wrong_pins


def test_a_pin_is_wrong_if_it_is_absent_or_another_version_and_holds_here():
    there = version("packaging")
    text = f'packaging=={there}\nnumpy==0.1\nno-such-package==1.0\nother==2.0; python_version < "3"\n# numpy==9'
    assert wrong_pins(text) == {"numpy": (np.__version__, "0.1"), "no-such-package": ("absent", "1.0")}


def test_the_status_tells_whether_something_needed_is_wrong(monkeypatch, capsys):
    def fine():
        return Finding("fine")

    def unneeded():
        return Finding("no browser", "install one", needed=False)

    def bad():
        return Finding("old", "renew it")

    monkeypatch.setattr(doctor, "CHECKS", (fine, unneeded))
    assert doctor.main() == 0
    assert capsys.readouterr().out == "✔ fine\n· no browser\n    → install one\n\nReady.\n"
    monkeypatch.setattr(doctor, "CHECKS", (bad, fine))
    assert doctor.main() == 1
    assert capsys.readouterr().out == "✘ old\n    → renew it\n✔ fine\n\n1 of 2 to be mended.\n"


def test_a_check_that_breaks_or_hangs_is_a_finding():
    def breaks():
        raise ImportError("no libgomp")

    def hangs():
        raise subprocess.TimeoutExpired("python", 10)

    assert examine(breaks) == Finding("breaks: ImportError: no libgomp", doctor.INSTALL)
    assert examine(hangs).remedy.startswith("ask again")


@pytest.mark.parametrize(("free_gb", "well"), [(2.9, False), (3.1, True)])
def test_three_gigabytes_of_memory_are_asked_for(monkeypatch, free_gb, well):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free_gb * 2**30))
    assert (doctor.memory().remedy == "") is well


def test_a_cut_or_missing_model_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    assert doctor.models().seen == "models missing or cut short: all"
    for name in ("whole", "cut", "bare"):
        folder = tmp_path / "data" / "models" / name
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
        if name != "bare":
            save_file({"w": np.ones(9)}, folder / "model.safetensors")
    cut = tmp_path / "data" / "models" / "cut" / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    assert doctor.models().seen == "models missing or cut short: bare, cut"


def test_the_models_of_the_suite_are_whole():
    assert doctor.models() == Finding(f"{len(list(MODELS.iterdir()))} language models, whole")


def test_a_cache_that_cannot_be_is_named_and_its_disk_is_still_measured(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(doctor, "probed", lambda: ("2", 1, str(tmp_path / "file" / "cache")))
    assert "SUITE_CACHE" in doctor.cache().remedy and "GB of disk free" in doctor.disk().seen
    monkeypatch.setattr(doctor, "probed", lambda: ("2", 1, str(tmp_path / "cache")))
    assert doctor.cache() == Finding(f"{tmp_path / 'cache'} can be written to")


def test_a_kernel_starts_and_torch_and_the_cache_are_found_in_a_process_of_their_own():
    assert doctor.jupyter() == Finding("Jupyter starts a kernel")
    assert doctor.torch().remedy == "" and doctor.cache_folder() == cache_dir()


def test_where_nothing_is_installed_every_line_names_a_remedy():
    bare = "import runpy, sys; sys.path.insert(0, '.'); sys.executable = 'no-python'; "
    bare += "runpy.run_module('helpers.suite.doctor', run_name='__main__')"
    command = [sys.executable, "-I", "-S", "-c", bare]
    run = subprocess.run(command, cwd=doctor.ROOT, capture_output=True, text=True, encoding="utf-8")
    assert run.returncode == 1 and run.stderr == ""
    assert run.stdout.count("✘") == 8 and not re.search(r"✘[^\n]*\n(?!    → )", run.stdout)
