"""The command line, without a notebook: what it shows, and how it ends where something stops it."""

import os
import subprocess
import sys

import pytest

from helpers.base.storage import ROOT
from helpers.suite import __main__ as cli


def test_the_claims_shown_are_those_of_the_scale_that_ran(monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "run", lambda *_: [])
    monkeypatch.setattr(cli.claims, "table", lambda *where: asked.append(where[1:]) or [])
    assert cli.main(["run", "--set", "scale=smoke"]) == 0
    assert asked == [("embedded", "smoke")]


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "no space"), 2)])
def test_what_stops_a_command_is_no_traceback(monkeypatch, error, code):
    monkeypatch.setattr(cli, "find", lambda *_: (_ for _ in ()).throw(error))
    assert cli.main(["run"]) == code


def test_a_terminal_without_the_marks_is_no_reason_to_stop():
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    code = "from helpers.suite import __main__ as cli; cli.run = lambda *_: []; cli.main(['run'])"
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert "? 0 reproduced" in ran.stdout and ran.stderr == ""
