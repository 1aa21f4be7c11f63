"""One file for a workshop without a network, for this system and Python: `python -m helpers.suite.bundle`.

    topk-workshop-<system>-<machine>-py<version>.zip
        START.md install.sh install.ps1     from helpers/suite/bundled, with the system and the Python filled in
        wheels/                             every pin, torch in its CPU build
        ...                                 the commit's files, notebooks without outputs

One commit and the same wheels give the same bytes. Caches are not in it: a text's tokens take seconds to make,
activations are large for the time they save, and what a notebook trains is what it shows.
"""

import io
import json
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from helpers.base.storage import OUT, ROOT, written_aside

SCRIPTS = Path(__file__).parent / "bundled"
DATE = (1980, 1, 1, 0, 0, 0)  # of every file: the earliest that a zip can say


def main() -> int:
    """Build the bundle of the checked-out commit in out/; the return value is the exit status."""
    try:
        path = build(OUT)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{path}: {path.stat().st_size / 1e6:.0f} MB. Unpack it; START.md says the rest.")
    return 0


def build(folder: Path, root: Path = ROOT, collect: Callable[[Path, Path], None] | None = None) -> Path:
    """Write the bundle of the commit checked out in `root` into `folder`; it is there whole or not at all.

    collect(requirements, wheels): puts a wheel for each line of a file into a folder, `collect_wheels` by default.
    """
    path = Path(folder) / f"topk-workshop-{sys.platform}-{platform.machine()}-py{_version()}.zip"
    files = dict(committed(root)) | scripts()
    with tempfile.TemporaryDirectory() as wheels:
        (collect or collect_wheels)(Path(root) / "requirements.txt", Path(wheels))
        with written_aside(path) as aside, zipfile.ZipFile(aside, "w") as bundle:
            for name, content in sorted(files.items()):
                _add(bundle, f"{path.stem}/{name}", content, zipfile.ZIP_DEFLATED)
            for wheel in sorted(Path(wheels).glob("*.whl")):  # compressed already
                _add(bundle, f"{path.stem}/wheels/{wheel.name}", wheel.read_bytes(), zipfile.ZIP_STORED)
    return path


def _add(bundle: zipfile.ZipFile, name: str, content: bytes, compression: int) -> None:
    entry = zipfile.ZipInfo(name, DATE)
    entry.external_attr = 0o644 << 16
    bundle.writestr(entry, content, compression)


def committed(root: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files of the commit checked out in `root`, notebooks without their outputs.

    Raises CalledProcessError outside of a git repository.
    """
    archive = subprocess.run(
        ["git", "archive", "--format=tar", "HEAD"], cwd=root, check=True, capture_output=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for entry in files:
            if entry.isfile():
                content = files.extractfile(entry).read()
                yield entry.name, cleared(content) if PurePosixPath(entry.name).suffix == ".ipynb" else content


def cleared(notebook: bytes) -> bytes:
    """A notebook's JSON without outputs, counts and the state of widgets."""
    content = json.loads(notebook)
    content["metadata"].pop("widgets", None)
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()


def scripts() -> dict[str, bytes]:
    """START.md and the two ways to install, for this system and this Python."""
    here = (sys.platform, platform.machine(), *sys.version_info[:2])
    check = f"import platform, sys; sys.exit((sys.platform, platform.machine(), *sys.version_info[:2]) != {here})"
    words = {"@PYTHON@": _version(), "@PLATFORM@": f"{platform.system()} {platform.machine()}", "@CHECK@": check}
    texts = {file.name: file.read_text(encoding="utf-8") for file in SCRIPTS.iterdir() if file.is_file()}
    for word, filled in words.items():
        texts = {name: text.replace(word, filled) for name, text in texts.items()}
    return {name: text.encode() for name, text in texts.items()}


def collect_wheels(requirements: Path, wheels: Path) -> None:
    """A wheel for each line, and for what those need on this system alone; what has no wheel is built.

    Raises CalledProcessError where one cannot be had, and ValueError where torch is a build for a GPU.
    """
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--wheel-dir", str(wheels), "--requirement", str(requirements)], check=True)
    if gpu := sorted(wheel.name for wheel in wheels.glob("nvidia_*.whl")):
        raise ValueError(
            f"torch came with {len(gpu)} packages for a GPU, such as {gpu[0]}; let PIP_EXTRA_INDEX_URL name "
            "the index of torch's CPU builds, and build again"
        )


def _version() -> str:
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


if __name__ == "__main__":
    sys.exit(main())
