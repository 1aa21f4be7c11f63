"""One notebook in a process of its own: its parameters, its kernel, its end, and what is left of it."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from helpers.notebook.run import plain
from helpers.suite.run import Outcome, execute, name_of, refuse_wrong_parameters, summary
from helpers.suite.run import run as run_all
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


@pytest.mark.parametrize("name", ["build{1}", "{{name}}", 'it\'s "new" [v1] 100% $HOME;\u00e9\u65e5\U0001f642'])
def test_a_path_may_hold_any_sign(write_notebook, tmp_path, name):
    path = tmp_path / name / "01_tiny.ipynb"
    path.parent.mkdir()
    path.write_bytes(write_notebook("01_tiny", "1").read_bytes())
    assert execute(path, SMOKE, tmp_path / name / "out" / "copy.ipynb", 60.0).error == ""
    assert (tmp_path / name / "out" / "copy.ipynb").exists()


def test_kernels_and_settings_of_the_users_own_jupyter_are_not_taken(run, tmp_path, monkeypatch):
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    foreign = {"argv": argv, "display_name": "x", "language": "python", "env": {"FOREIGN": "yes"}}
    for name in ("python3", "suite"):
        spec = tmp_path / "share" / "kernels" / name / "kernel.json"
        spec.parent.mkdir(parents=True)
        spec.write_text(json.dumps(foreign))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share"))
    for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "own"))
    startup = tmp_path / "own" / "profile_default" / "startup" / "00.py"
    startup.parent.mkdir(parents=True)
    startup.write_text("import os; os.environ['FOREIGN'] = 'yes'")
    (tmp_path / "own" / "jupyter_config.json").write_text('{"KernelSpecManager": {"allowed_kernelspecs": ["other"]}}')
    before = list(tmp_path.joinpath("own").rglob("*"))
    assert run("import os, sys\n(os.environ.get('FOREIGN'), sys.executable)").error == ""
    assert list(tmp_path.joinpath("own").rglob("*")) == before
    shown = nbformat.read(tmp_path / "copy.ipynb", as_version=4).cells[-1].outputs[0].data["text/plain"]
    assert shown == repr((None, sys.executable))


def test_what_a_notebook_started_ends_with_it(run, tmp_path):
    child = "import subprocess, sys\np = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])"
    run(f"{child}\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid))\np.wait()", limit_s=6)
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
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


def test_a_signal_that_is_ignored_stays_so(write_notebook, tmp_path):
    sends = "import os, psutil, signal\nos.kill(psutil.Process().parent().ppid(), signal.SIGHUP)"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        (outcome,) = run_all([write_notebook("01_tiny", sends)], SMOKE, tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert outcome.error == ""


def test_a_notebook_ends_when_its_runner_is_killed(write_notebook, tmp_path):
    tells = f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(f'{{os.getpid()}} {{os.getppid()}}')\n"
    path = write_notebook(
        "01_tiny", f"{tells}os.rename({str(tmp_path / 'pid')!r}, {str(tmp_path / 'pids')!r})\ntime.sleep(99)"
    )
    code = (
        f"from pathlib import Path; from helpers.suite.run import run; run([Path({str(path)!r})], {SMOKE}, Path('x'))"
    )
    runner = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (tmp_path / "pids").exists() and runner.poll() is None:
        time.sleep(0.05)
    runner.kill()
    runner.wait()
    left = [psutil.Process(int(pid)) for pid in (tmp_path / "pids").read_text().split()]
    _, alive = psutil.wait_procs(left, timeout=20)
    assert [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []


def test_a_copy_that_cannot_be_written_fails_its_notebook_alone(write_notebook, tmp_path):
    paths = [write_notebook("01_tiny", "1"), write_notebook("02_tiny", "2")]
    (tmp_path / "embedded-smoke" / "01_tiny.ipynb").mkdir(parents=True)
    first, second = run_all(paths, SMOKE, tmp_path)
    assert first.error.startswith("OSError: could not write") and second.error == ""


@pytest.mark.parametrize(
    "value", [1e-05, math.inf, "yes", "null", "1e3", 'it\'s "a": {b} # \\ \n', "\U0001f642", [(1, "on")]]
)
def test_a_parameter_arrives_as_it_was_given(write_notebook, tmp_path, value):
    path = write_notebook("01_tiny", "given", parameters=f"{TYPED}\ngiven = {type(value)()!r}")
    assert execute(path, SMOKE | {"given": value}, tmp_path / "copy.ipynb", 60.0).error == ""
    shown = nbformat.read(tmp_path / "copy.ipynb", as_version=4).cells[-1].outputs[0].data["text/plain"]
    assert shown == str(plain(value) if isinstance(value, list) else repr(value))


@pytest.mark.parametrize("minutes", [0, -1, math.nan, math.inf])
def test_a_limit_is_a_positive_number_of_minutes(write_notebook, tmp_path, minutes):
    with pytest.raises(ValueError, match="give a positive number"):
        run_all([write_notebook("01_tiny", "1")], SMOKE, tmp_path, minutes)


TYPED = 'scale = "laptop"\nsubject = "embedded"\nseed = 0\ntrain = False  # on request\nlr = 1e-3  # as in lr=1e-3'


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"train": "no"}, "train is 'no'; 01_tiny.ipynb expects a bool, such as False"),
        ({"train": 1}, "expects a bool"),
        ({"seed": True}, "seed is True; 01_tiny.ipynb expects a int"),
        ({"lr": "fast"}, "expects a float"),
        ({"seed": -1}, "seed -1 is unknown; choose one from 0 to 2147483647."),
        ({"seed": 2**31}, "choose one from 0"),
        ({"seed": 1.0}, "expects a int"),
        ({"scale": ""}, "choose smoke or laptop or paper"),
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
