"""Find the files of a causal language model, embedded, packaged, local or on the hub, and load them with transformers.

A model directory holds config.json, safetensors and tokenizer files, as `save_pretrained` writes them; embedded
subjects, directories of the reader's and snapshots of the hub are the same thing and are read by the same code. Pickled
weights and code from the hub are never fetched, let alone run. A hub model that is complete in the local cache is used
without asking the network.

A directory may hold a low-rank difference instead of weights; its config.json says of which model:

    {"low_rank_of": "gemma-3-270m-q4"}

It is read as that model with the difference merged. Where $SUITE_GEMMA names a Gemma of the reader's own, it takes the
packaged one's place.
"""

import contextlib
import copy
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from helpers.base.hub import snapshot
from helpers.base.storage import MODELS
from helpers.subjects.low_rank import FILE, load_differences, merge
from helpers.subjects.packaged import GEMMA, packaged_folder

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them is needed
HUB_FILES = {  # chat templates are *.jinja in newer repositories
    "allow_patterns": ["*.json", "*.jinja", "*.safetensors", "merges.txt", "tokenizer.model"],
    "ignore_patterns": "*/*",
}


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A model's files. Weights are read when they are asked for."""

    folder: Path
    config: Any
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    low_rank: Path | None = None  # the directory of a difference that is merged into the weights of `folder`

    @property
    def folders(self) -> tuple[Path, ...]:
        return (self.folder,) if self.low_rank is None else (self.folder, self.low_rank)

    @cached_property
    def model(self) -> PreTrainedModel:
        """Frozen, on the CPU. Raises ValueError for weights that cannot be read or do not fit config.json."""
        return self._merged(_model(self.folder, self.config, self.dtype))

    def first_blocks(self, n: int) -> PreTrainedModel:
        """The model without what follows its first n blocks, for which no memory is taken. Raises as `model` does."""
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = n
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:n]
        return self._merged(_model(self.folder, config, self.dtype), only_present=True)

    def _merged(self, model: PreTrainedModel, only_present: bool = False) -> PreTrainedModel:
        """The model with the difference, or with as much of it as there are blocks."""
        if self.low_rank is not None:
            found, present = load_differences(self.low_rank), dict(model.named_modules())
            chosen = {name: part for name, part in found.items() if name.rpartition(".")[0] in present}
            merge(model, chosen if only_present else found)
        return model


def load_pretrained(name_or_path: str | Path, dtype: torch.dtype = torch.float32) -> Pretrained:
    """Find an embedded or packaged subject by name, a directory by path, or a hub model by id.

    Raises what `packaged_folder` raises, FileNotFoundError for an incomplete directory, ConnectionError or
    PermissionError for a hub model that cannot be had, ValueError for an unknown name and a foreign tokenizer.
    """
    folder, low_rank = model_directory(name_or_path), None
    if (folder / FILE).is_file():
        folder, low_rank = _base_of(folder), folder
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "activation_function", None) == "gelu_new":
        config.activation_function = "gelu_pytorch_tanh"  # the same function in one pass over memory, not eight
    return Pretrained(folder, config, _tokenizer(folder, config), dtype, low_rank)


def own_gemma() -> str:
    """The Gemma to study: what $SUITE_GEMMA names, a directory or a hub id, or else the packaged one."""
    return os.path.expanduser(os.environ.get("SUITE_GEMMA", "")) or GEMMA.name


def model_directory(name_or_path: str | Path) -> Path:
    """Directory of an embedded or packaged subject (name), of a path, or of a hub model (id, fetched if need be)."""
    name = str(name_or_path)
    if name == GEMMA.name:
        return complete(packaged_folder(GEMMA))
    for folder in (MODELS / name, Path(name)):
        if folder.is_dir():
            return complete(folder)
    if re.fullmatch(r"[^/.~][^/]*/[^/]+", name):
        return snapshot(name, complete, 'use subject="embedded"', **HUB_FILES)
    embedded = sorted(path.name for path in MODELS.glob("*") if path.is_dir())
    raise ValueError(
        f'there is no subject "{name}": give an embedded one ({", ".join(embedded) or "none is installed"}), '
        f"{GEMMA.name}, the path of a model directory, or a hub id such as openai-community/gpt2"
    )


def _base_of(folder: Path) -> Path:
    """Directory of the model that the difference in `folder` belongs to."""
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["low_rank_of"]
    return model_directory(own_gemma() if name == GEMMA.name else name)


def complete(folder: Path) -> Path:
    """The folder itself; FileNotFoundError if configuration, weights or tokenizer are missing in it.

    A low-rank difference needs a configuration alone.
    """
    if (folder / FILE).is_file() and (folder / "config.json").is_file():
        return folder
    index = folder / "model.safetensors.index.json"
    weights = (
        set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if index.is_file()
        else {"model.safetensors"}
    )
    missing = [name for name in ("config.json", *sorted(weights)) if not (folder / name).is_file()]
    missing += [] if any((folder / name).is_file() for name in TOKENIZERS) else [" or ".join(TOKENIZERS)]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}: save model and tokenizer there with save_pretrained, or fetch again"
        )
    return folder


def _tokenizer(folder: Path, config: Any) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    known = tokenizer.added_tokens_decoder.items()
    beyond = [i for i, token in known if token.special and i >= config.vocab_size]  # Gemma 3 has one, for images
    n_entries = len(tokenizer) - len(beyond)
    if not len(tokenizer.all_special_ids) < n_entries <= config.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {n_entries} entries where the model has {config.vocab_size}: save the "
            "model's own tokenizer there with save_pretrained"
        )
    return tokenizer


def _model(folder: Path, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    try:
        with _silent():
            safe = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
            model, report = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, **safe)
    except SafetensorError as error:
        raise ValueError(f"the weights in {folder} cannot be read ({error}): fetch or save the model again") from None
    if report["missing_keys"]:
        raise ValueError(
            f"the weights in {folder} do not fit config.json, {len(report['missing_keys'])} are missing, first "
            f"{sorted(report['missing_keys'])[0]}: save the model again"
        )
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(_contiguous)
    return model.requires_grad_(False)


def _contiguous(head: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Of a slice of each row, such as the last positions, torch multiplies with a copy of the weights for each row."""
    return tuple(arg.contiguous() for arg in args)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without transformers' progress bar, and its warning of weights that were left out."""
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
