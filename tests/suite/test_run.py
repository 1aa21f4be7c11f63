"""One notebook in a process of its own: its parameters, its kernel, its end, and what is left of it."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import joblib
import nbformat
import psutil
import pytest
import torch

from helpers.notebook.run import plain
from helpers.suite import run as notebooks
from helpers.suite.run import Outcome, execute, name_of, refuse_wrong_parameters, summary
from helpers.suite.run import run as run_all
from helpers.suite.store import hashes, read_storable

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


@pytest.mark.parametrize(("said", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_asleep_unless_the_user_said_how(run, tmp_path, monkeypatch, said, expected):
    monkeypatch.setenv("OMP_WAIT_POLICY", said) if said else monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert run("import os\nos.environ['OMP_WAIT_POLICY']").error == ""
    shown = nbformat.read(tmp_path / "copy.ipynb", as_version=4).cells[-1].outputs[0].data["text/plain"]
    assert shown == repr(expected)


def test_the_executed_copy_carries_its_parameters_and_the_hashes_of_what_ran(write_notebook, tmp_path):
    edit = "from pathlib import Path\npath = Path('notebooks/01_tiny.ipynb')"
    edit = f"import os\nos.chdir({str(tmp_path)!r})\n{edit}"
    edit += "\npath.write_text(path.read_text().replace('print(1)', 'print(2)'))"
    path = write_notebook("01_tiny", edit, "print(1)")
    before = hashes(nbformat.read(path, as_version=4))
    execute(path, SMOKE, tmp_path / "copy.ipynb", 60.0)
    assert hashes(nbformat.read(path, as_version=4)) != before
    assert nbformat.read(tmp_path / "copy.ipynb", as_version=4).metadata.suite == before | SMOKE


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


@pytest.fixture
def run_to_its_limit(run):
    """A limit is short, or as long as a busy machine takes to reach a cell."""
    return lambda source: next(found for limit_s in (5, 20, 60) if (found := run(source, limit_s=limit_s)).cell)


def test_a_kernel_that_outlives_its_time_is_killed(run_to_its_limit):
    outcome = run_to_its_limit("import time\ntime.sleep(300)")
    assert outcome.cell == 3
    assert re.match(r"TimeoutError: stopped after (0.0833|0.333|1) minutes, its limit; raise", outcome.error)
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


def test_what_a_notebook_started_ends_with_it(run_to_its_limit, tmp_path):
    child = "import subprocess, sys\np = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])"
    run_to_its_limit(f"{child}\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid))\np.wait()")
    pid = int((tmp_path / "pid").read_text())
    assert not runs(pid)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_copies_of_what_was_under_way_in_every_lane(write_notebook, tmp_path, sign):
    tells = f"import os, time\nopen({str(tmp_path)!r} + f'/{{lane}}.started', 'w').write(str(os.getpid()))"
    paths = [
        str(write_notebook(f"0{lane}_tiny", "6 * 7", f"lane = {lane}\n{tells}\ntime.sleep(60)")) for lane in (1, 2)
    ]
    paths += [str(write_notebook("03_tiny", "1"))]
    code = f"""
import signal
from pathlib import Path
from helpers.suite import run
signal.signal(signal.SIGINT, signal.default_int_handler)
run.lanes = lambda scale: 2
run.run([Path(path) for path in {paths}], {SMOKE}, Path({str(tmp_path)!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while len(list(tmp_path.glob("*.started"))) < 2 and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.2)  # until the numbers are written
    process.send_signal(sign)
    assert process.wait(30) == 0
    copies = [nbformat.read(path, as_version=4) for path in sorted(tmp_path.glob("embedded-smoke/*.ipynb"))]
    assert [copy.metadata.suite.stopped_in for copy in copies] == [4, 4]
    assert copies[1].cells[-2].outputs[0].data["text/plain"] == "42"
    assert not any(runs(int(path.read_text())) for path in tmp_path.glob("*.started"))


def runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_notebooks_run_side_by_side_and_outcomes_keep_their_order(write_notebook, tmp_path, monkeypatch, capsys):
    """Each waits for the other, which would never come if they ran in turn; the first ends last."""
    monkeypatch.setattr(notebooks, "lanes", lambda scale: 2)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    meets = f"from pathlib import Path\nfolder = Path({str(tmp_path)!r})\n(folder / name).touch()\n"
    meets += "import os, time\nwhile not (folder / other).exists(): time.sleep(0.05)\ntime.sleep(wait)"
    share = "os.environ['OMP_NUM_THREADS'], os.environ['LOKY_MAX_CPU_COUNT']"
    paths = [
        write_notebook("01_tiny", f"name, other, wait = 'a', 'b', 1\n{meets}", share),
        write_notebook("02_tiny", f"name, other, wait = 'b', 'a', 0\n{meets}", share),
    ]
    outcomes = run_all(paths, SMOKE, tmp_path, 0.5)
    assert [(outcome.path, outcome.error) for outcome in outcomes] == [(path, "") for path in paths]
    said = [line[:9] for line in capsys.readouterr().out.splitlines()]
    assert said == ["▶ 01_tiny", "▶ 02_tiny", "✔ 02_tiny", "✔ 01_tiny"]
    for copy in tmp_path.glob("embedded-smoke/*.ipynb"):
        assert nbformat.read(copy, as_version=4).cells[-1].outputs[0].data["text/plain"] == "('3', '3')"


@pytest.mark.parametrize(
    ("scale", "cores", "threads", "free_gb", "expected"),
    [
        ("laptop", 2, None, 16, 2),
        ("laptop", 8, None, 16, 4),  # 4 GB each
        ("smoke", 8, None, 16, 8),
        ("laptop", 8, "4", 99, 2),  # a notebook is as many threads as the user wants
        ("laptop", 2, "4", 99, 1),
        ("laptop", 4, None, 1, 1),
        ("paper", 8, None, 999, 1),
    ],
)
def test_lanes_are_as_many_as_cores_and_memory_hold(scale, cores, threads, free_gb, expected, monkeypatch):
    for name in notebooks.THREADS:
        monkeypatch.delenv(name, raising=False)
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr(torch, "get_num_threads", lambda: int(threads or cores))
    monkeypatch.setattr(joblib, "cpu_count", lambda: cores)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free_gb * 2**30))
    assert notebooks.lanes(scale) == expected
    if threads and expected > 1:
        assert notebooks.share_of_cores(expected)["OMP_NUM_THREADS"] == threads
    assert notebooks.share_of_cores(1) == {}


def test_a_system_without_hangups_runs_notebooks_too(monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP")  # as on Windows
    before = signal.getsignal(signal.SIGTERM)
    with notebooks._signals_interrupt():
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is before


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
    outcomes = [Outcome(a, 0.5), Outcome(b, 1.0, "ValueError: k is too large", 12, "sae = train()")]
    text = summary(outcomes, [a, b, b], 1.1)
    assert text.splitlines()[:2] == [
        "1 of 3 notebooks ran to the end, in 1.1 minutes.",
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
