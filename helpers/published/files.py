"""Tensors and settings out of other people's files. Only data is read: no code in a pickle is ever run."""

import json
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

SUFFIXES = (".safetensors", ".npz", ".pt")
WEIGHTS = {  # what libraries call the weights of a folder, and their settings; other files may lie beside them
    **dict.fromkeys(("sae_weights.safetensors", "sae.safetensors", "cc_weights.pt"), "cfg.json"),
    **dict.fromkeys(("params.safetensors", "params.npz", "model.safetensors"), "config.json"),
    **dict.fromkeys(("ae.pt", "model_final.pt"), "config.json"),
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
KINDS = {bool: "true or false", str: "a text", dict: "a dictionary"}
ROWS = 65_536  # checked at a time
COUNTS = ("stats_last_nonzero", "latents_mean_square")  # of training
COUNTS += ("num_tokens_since_fired", "num_batches_not_active")


class Files:
    """A file of weights and the settings beside it. What is taken out of them is checked.

    Raises ValueError, in the constructor too, for what is damaged, holds code, or is not as expected.
    """

    def __init__(self, path: Path, source: str):
        self.path, self.source = path, source
        self.settings = _settings(path)
        content = _content(path)
        if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
            raise ValueError(f"{path} holds a {type(content).__name__} and no named tensors: pass a saved state_dict")
        self.content = {_plain(name): value for name, value in content.items()}
        self.taken = set(COUNTS)
        if not any(isinstance(value, Tensor) for value in content.values()):
            raise ValueError(f"{path} holds no tensors by name, only {self.names}: pass a saved state_dict alone")

    def __contains__(self, name: str) -> bool:
        return name in self.content

    @property
    def place(self) -> str:
        """The end of the path, which in many releases says what a file is; with the repository in the hub's cache."""
        return "/".join(self.path.parts[-8:])

    @property
    def names(self) -> str:
        """The first of the tensors' names: a language model has hundreds."""
        return ", ".join([*self.content][:8]) + (", and more" if len(self.content) > 8 else "") or "none"

    def ndim(self, name: str) -> int:
        """0 for what is not there."""
        value = self.content.get(name)
        return value.ndim if isinstance(value, Tensor) else 0

    def dtype(self, name: str) -> str:
        return str(self.content[name].dtype).removeprefix("torch.")

    def shape(self, name: str, ndim: int) -> tuple[int, ...]:
        """Of a tensor of floats with so many axes."""
        if name not in self.content:
            raise ValueError(f"{self.path} has no tensor {name}, only {self.names}")
        self.taken.add(name)
        value = self.content[name]
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{name} in {self.path} is no dense tensor with values: save it as one")
        if value.dtype not in FLOATS:
            raise ValueError(f"{name} in {self.path} is {value.dtype}: weights must be floats of 16 bits or more")
        if value.ndim != ndim or not value.numel():
            raise ValueError(f"{name} in {self.path} has shape {tuple(value.shape)}, expected {ndim} axes, none empty")
        return tuple(value.shape)

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor in float32."""
        if self.shape(name, len(shape)) != shape:
            found = tuple(self.content[name].shape)
            raise ValueError(f"{name} in {self.path} has shape {found}, the other tensors ask for {shape}")
        value = self.content[name].float()
        if not all(part.isfinite().all() for part in value.split(ROWS)):
            raise ValueError(f"{name} in {self.path} holds values that are NaN or infinite: fetch it again")
        return value

    def number(self, name: str, otherwise: Any = None) -> float:
        """One number among the tensors, or `otherwise`, what the settings say of it."""
        self.taken.add(name)
        value = self.content.get(name, otherwise)
        value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"neither {self.path} nor the settings beside it say what {name} is: fetch both again")
        return value

    def setting(self, name: str, kind: type, otherwise: Any = None, among: dict[str, Any] | None = None) -> Any:
        """What the settings, or those `among` them, say of a name; `otherwise` where they say nothing.

        Raises ValueError for what is no `kind`.
        """
        value = (self.settings if among is None else among).get(name)
        if value is not None and not isinstance(value, kind):
            raise ValueError(
                f"{name} of {self.path} is said to be {value!r}, where {KINDS[kind]} is expected: fetch both again"
            )
        return otherwise if value is None else value

    def word(self, name: str, among: dict[str, Any] | None = None) -> str | None:
        """The same of a name that nothing is computed with, as text."""
        value = (self.settings if among is None else among).get(name)
        return None if value is None else str(value)

    def agree(self, said: dict[str, Any], found: dict[str, Any]) -> None:
        """Raise ValueError where settings or a path say something else than the tensors; None says nothing."""
        for name, value in found.items():
            if said.get(name) not in (None, value):
                raise ValueError(
                    f"{self.path} has {name} {value!r}, and what is said of it beside it or in its name is "
                    f"{said[name]!r}: they are not of one dictionary, fetch it again"
                )

    def require_all_taken(self, kind: str) -> None:
        """Raise ValueError for floats that nothing was computed with: another kind of dictionary has them."""
        left = [name for name, value in self.content.items() if isinstance(value, Tensor) and value.is_floating_point()]
        if left := [name for name in left if name not in self.taken]:
            raise self.cannot(f"{kind} has no tensor {left[0]}, so it is of another kind, which is not known here")

    def beside(self, name: str) -> dict[str, Any]:
        """Another JSON beside the file; nothing where there is none."""
        return _json(self.path.with_name(name))

    def cannot(self, reason: str) -> ValueError:
        return ValueError(f"{self.source} cannot be read as a dictionary of this suite: {reason}")


def weights_file(place: Path) -> Path:
    """The file with the weights, of a folder or of a path to it. Raises FileNotFoundError or ValueError."""
    if place.is_file():
        if place.suffix not in SUFFIXES:
            raise ValueError(f"{place} is no file of weights: these end in {', '.join(SUFFIXES)}")
        return place
    known = [place / name for name in WEIGHTS if (place / name).is_file()]
    found = known or sorted(path for path in place.glob("*") if path.suffix in SUFFIXES and path.is_file())
    if not found:
        files = [path for path in place.rglob("*") if path.suffix in SUFFIXES and path.is_file()]
        inner = sorted({str(path.parent.relative_to(place)) for path in files})
        remedy = f"name one of its folders, such as {', '.join(inner[:3])}" if inner else "fetch it again"
        raise FileNotFoundError(f"{place} holds no weights, which end in {', '.join(SUFFIXES)}: {remedy}")
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:4])
        raise ValueError(f"{place} holds {len(found)} files of weights: name one of them, such as {names}")
    return found[0]


def _settings(weights: Path) -> dict[str, Any]:
    """The JSON beside a file of weights; nothing where there is none."""
    names = (f"{weights.stem}_cfg.json", WEIGHTS.get(weights.name, "cfg.json"), "cfg.json", "config.json")
    return next(filter(None, (_json(weights.with_name(name)) for name in names)), {})


def _json(path: Path) -> dict[str, Any]:
    """What a file says by name; nothing where there is none."""
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read, perhaps only half was written: fetch it again ({error})") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__} where settings by name are expected")
    return settings


def _plain(name: str) -> str:
    """Without what torch.compile and DataParallel put before names."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _content(path: Path) -> Any:
    with path.open("rb") as file:
        begin = file.read(24)
    if not begin:
        raise ValueError(f"{path} is empty: fetch it again")
    if begin.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a pointer of Git LFS and not the file itself: fetch it with `git lfs pull`")
    if path.suffix == ".npz" and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no archive of arrays, perhaps only half was written: fetch it again")
    try:
        match path.suffix:
            case ".safetensors":
                with safetensors.safe_open(path, "pt") as file:
                    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            case ".npz":
                with np.load(path, allow_pickle=False) as arrays:
                    return {name: torch.from_numpy(_native(arrays[name])) for name in arrays}
            case _:
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and plain values, and code in a file is never run: fetch "
            "it again, or have its owner save the state_dict alone"
        ) from None
    except OSError:
        raise
    except Exception as error:  # readers of damaged bytes raise whatever they stumble over
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} cannot be read, perhaps only half was written: fetch it again ({reason})") from None


def _native(array: np.ndarray) -> np.ndarray:
    """In this machine's order of bytes, which torch asks for."""
    array = np.asarray(array)
    return array.astype(array.dtype.newbyteorder("="), copy=False)
