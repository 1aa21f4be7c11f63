"""One notebook in a process of its own: its parameters, its kernel, its end, and what is left of it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from helpers.suite.run import Outcome, execute, name_of, refuse_wrong_parameters, summary
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
    outcome = run("import time\ntime.sleep(300)", limit_s=6)
    assert outcome.cell == 3
    assert outcome.error.startswith("TimeoutError: stopped after 0.1 minutes")
    assert outcome.minutes < 0.5


def test_a_notebook_that_ends_itself_early_has_failed(run):
    outcome = run("import sys\nsys.exit(0)", "2")
    assert (outcome.cell, outcome.error.partition(":")[0]) == (3, "SystemExit")


@pytest.mark.parametrize("name", ["build{1}", "{{name}}"])
def test_braces_in_a_path_are_just_braces(write_notebook, tmp_path, name):
    path = tmp_path / name / "01_tiny.ipynb"
    path.parent.mkdir()
    path.write_bytes(write_notebook("01_tiny", "1").read_bytes())
    assert execute(path, SMOKE, tmp_path / name / "out" / "copy.ipynb", 60.0).error == ""
    assert (tmp_path / name / "out" / "copy.ipynb").exists()


def test_a_kernel_of_the_same_name_elsewhere_is_not_taken(run, tmp_path, monkeypatch):
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    foreign = {"argv": argv, "display_name": "x", "language": "python", "env": {"FOREIGN": "yes"}}
    for name in ("python3", "suite"):
        spec = tmp_path / "share" / "kernels" / name / "kernel.json"
        spec.parent.mkdir(parents=True)
        spec.write_text(json.dumps(foreign))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share"))
    run("import os, sys\n(os.environ.get('FOREIGN'), sys.executable)")
    shown = nbformat.read(tmp_path / "copy.ipynb", as_version=4).cells[-1].outputs[0].data["text/plain"]
    assert shown == repr((None, sys.executable))


def test_what_a_notebook_started_ends_with_it(run, tmp_path):
    child = "import subprocess, sys\np = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])"
    run(f"{child}\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid))\np.wait()", limit_s=6)
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_the_copy_of_what_was_under_way(write_notebook, tmp_path, sign):
    waits = f"open({str(tmp_path / 'started')!r}, 'w').close()\nimport time; time.sleep(60)"
    path = write_notebook("01_tiny", "6 * 7", waits)
    arguments = f"[Path({str(path)!r})], {SMOKE}, Path({str(tmp_path)!r})"
    code = f"from pathlib import Path; from helpers.suite.run import run; run({arguments})"
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {code}"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (tmp_path / "started").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(sign)
    process.wait(30)
    copy = nbformat.read(tmp_path / "embedded-smoke" / "01_tiny.ipynb", as_version=4)
    assert copy.cells[-2].outputs[0].data["text/plain"] == "42" and copy.metadata.suite.stopped_in == 4


TYPED = 'scale = "laptop"\nsubject = "embedded"\nseed = 0\ntrain = False  # on request\nlr = 1e-3  # as in lr=1e-3'


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"train": "no"}, "train is 'no'; 01_tiny.ipynb expects a bool, such as False"),
        ({"train": 1}, "expects a bool"),
        ({"seed": True}, "seed is True; 01_tiny.ipynb expects a int"),
        ({"lr": "fast"}, "expects a float"),
        ({"scale": "huge"}, "scale 'huge' is unknown; choose smoke or laptop or paper."),
    ],
)
def test_a_parameter_has_the_type_of_its_default(write_notebook, wrong, sentence):
    path = write_notebook("01_tiny", "1", parameters=TYPED)
    refuse_wrong_parameters(path, SMOKE | {"train": True, "lr": 1})
    with pytest.raises(ValueError, match=sentence):
        refuse_wrong_parameters(path, SMOKE | wrong)


def test_the_summary_names_notebook_cell_and_error():
    a, b = (Path(f"notebooks/0{i}_x.ipynb") for i in range(2))
    text = summary([Outcome(a, 0.5), Outcome(b, 1.0, "ValueError: k is too large", 12, "sae = train()")], [a, b, b])
    assert text.splitlines()[:2] == [
        "1 of 3 notebooks ran to the end, in 1.5 minutes.",
        "✘ 01_x, cell 12 `sae = train()`: ValueError: k is too large",
    ]
    assert str(Outcome(a, 0.1, "RuntimeError: no kernel")) == "✘ 00_x: RuntimeError: no kernel"
    assert name_of(Path("notebooks/solutions/00_x.ipynb")) == "solutions/00_x"


def test_unknown_parameters_are_refused(write_notebook):
    path = write_notebook("01_tiny", "1")
    with pytest.raises(ValueError, match="01_tiny.ipynb has no parameter sacle; its parameters are scale, seed, subj"):
        refuse_wrong_parameters(path, {"sacle": "smoke"})


def test_a_notebook_without_its_parameters_cell_is_refused(write_notebook):
    with pytest.raises(ValueError, match="has 0 cells tagged `parameters`, not one"):
        refuse_wrong_parameters(write_notebook("01_tiny", "1", tags=()), {})
    with pytest.raises(ValueError, match="lacks seed, subject"):
        refuse_wrong_parameters(write_notebook("01_tiny", "1", parameters='scale = "laptop"'), {})
