"""Find the files of a causal language model, embedded, packaged, local or on the hub, and load them with transformers.

A model directory holds config.json, safetensors and tokenizer files, as `save_pretrained` writes them; embedded
subjects, directories of the reader's and snapshots of the hub are the same thing and are read by the same code. Pickled
weights and code from the hub are never fetched, let alone run. A hub model that is complete in the local cache is used
without asking the network.
"""

import contextlib
import copy
import json
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

    @cached_property
    def model(self) -> PreTrainedModel:
        """Frozen, on the CPU. Raises ValueError for weights that cannot be read or do not fit config.json."""
        return _model(self.folder, self.config, self.dtype)

    def first_blocks(self, n: int) -> PreTrainedModel:
        """The model without what follows its first n blocks, for which no memory is taken. Raises as `model` does."""
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = n
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:n]
        return _model(self.folder, config, self.dtype)


def load_pretrained(name_or_path: str | Path, dtype: torch.dtype = torch.float32) -> Pretrained:
    """Find an embedded or packaged subject by name, a directory by path, or a hub model by id.

    Raises what `packaged_folder` raises, FileNotFoundError for an incomplete directory, ConnectionError or
    PermissionError for a hub model that cannot be had, ValueError for an unknown name and a foreign tokenizer.
    """
    folder = model_directory(name_or_path)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "activation_function", None) == "gelu_new":
        config.activation_function = "gelu_pytorch_tanh"  # the same function in one pass over memory, not eight
    return Pretrained(folder, config, _tokenizer(folder, config), dtype)


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


def complete(folder: Path) -> Path:
    """The folder itself; FileNotFoundError if configuration, weights or tokenizer are missing in it."""
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
    return model.requires_grad_(False)


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
