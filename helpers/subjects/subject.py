"""Load a language model to study, and read or replace its residual stream at one site.

A subject is a frozen causal language model cut at the residual stream after block `layer`,

    x_layer = block_layer( ... block_0(embed(tokens))),    logits = unembed( ... block_{layer+1}(x_layer)),

and the four things done with the cut are its methods: `residuals` stops there, `resume` goes on from there, `splice`
runs through and replaces, `logits` and `losses` leave the model alone. The site is `blocks.{layer}.hook_resid_post` in
TransformerLens's names, layer 8 of 12 in GPT-2 small (Gao et al. 2024, section 2.1), 13 of 26 in Gemma-2-2B.

Embedded and packaged subjects, directories and hub models are loaded by the same code, from a Hugging Face directory of
config.json, safetensors and tokenizer. Everything here that is TransformerLens's stays behind this module.
"""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import BlockBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.base.checks import require_finite
from helpers.subjects.model_files import Pretrained, load_pretrained, own_gemma
from helpers.subjects.packaged import GEMMA

ROWS_A_PASS = 16  # about 2,000 tokens stay near the processor
LOGITS_A_PASS = 2**26  # numbers: 0.27 GB in float32, two rows of 128 tokens for Gemma's vocabulary of 262,144
SUBJECTS = {  # by family, what a notebook's `subject` parameter stands for
    "gpt2": {"embedded": "docs-gpt2", "hub": "openai-community/gpt2", "gemma": GEMMA.name},
    "gemma2-base": {"embedded": "docs-gemma2-base", "hub": "google/gemma-2-2b", "gemma": GEMMA.name},
    "gemma2-chat": {"embedded": "docs-gemma2-chat", "hub": "google/gemma-2-2b-it", "gemma": "gemma-3-270m-chat"},
}
CONTEXTS = {  # tokens a row that a dictionary of one model reads, by a notebook's `subject` and scale
    "embedded": {"smoke": 64, "laptop": 128, "paper": 64},
    "hub": {"smoke": 64, "laptop": 64, "paper": 64},  # of GPT-2 in the paper: Gao et al. 2024, section 2.1
    "gemma": {"smoke": 64, "laptop": 128, "paper": 1024},  # of Gemma Scope 2
}
CHAT_MARK = {"gemma2-base": "", "gemma2-chat": "-it"}  # how Google names the models of a pair


@dataclass(eq=False)
class Subject:
    """A frozen language model and its site. Token ids are integers (B, T), residuals float32 (B, T, d_model),
    logits float32 (B, T, n_vocab).

    Gradients reach what the caller brings, the residuals to resume from and what `replace` uses, and nothing else.
    """

    name: str
    folders: tuple[Path, ...]  # config.json, safetensors, tokenizer; then of its low-rank difference, if it is one
    layer: int
    n_layers: int
    d_model: int
    n_vocab: int
    context: int  # longest sequence the model reads, in tokens
    device: torch.device
    dtype: torch.dtype  # what the model computes in
    files: Pretrained
    _held: TransformerBridge  # of the first blocks alone until more is asked for

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.files.tokenizer

    @property
    def bridge(self) -> TransformerBridge:
        """The whole model. It is read when first asked for, as a harvest can do without the blocks above the site."""
        if len(self._held.blocks) < self.n_layers:
            self._held = _bridge(self.files.model.to(self.device))
        return self._held

    @property
    def model(self) -> PreTrainedModel:
        """The model as transformers has it; it generates, and takes hooks, as any other."""
        return self.bridge.original_model

    @property
    def site(self) -> str:
        return f"blocks.{self.layer}.hook_resid_post"

    @property
    def folder(self) -> Path:
        """Its own, with training.json if this suite trained it."""
        return self.folders[-1]

    @cached_property
    def corpus(self) -> dict | None:
        """The corpus it was trained on, package -> {version, sha256}; None if it was not trained by this suite."""
        record = self.folder / "training.json"
        return json.loads(record.read_text(encoding="utf-8")).get("corpus") if record.is_file() else None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the configuration and of the weights' files."""
        digest = hashlib.sha256()
        for folder in self.folders:
            digest.update((folder / "config.json").read_bytes())
            for path in sorted(folder.glob("*.safetensors")):
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    @cached_property
    def special_ids(self) -> list[int]:
        """Ids that are no text but say where it begins, ends or is missing: <bos>, <eos>, <pad>.

        An <eos> with which the chat template ends a turn belongs to the text.
        """
        t = self.tokenizer
        ends_turns = bool(t.eos_token and t.chat_template and t.eos_token in t.chat_template)
        ids = {t.bos_token_id, t.pad_token_id, None if ends_turns else t.eos_token_id}
        return sorted(ids - {None})

    @cached_property
    def head(self) -> int | None:
        """The id at the head of every row: <bos> where the tokenizer puts it there, as it is for models that were
        trained so and read text badly without (Gemma); None for models that were trained on text cut anywhere."""
        first = self.tokenizer("a").input_ids[0]
        return first if first == self.tokenizer.bos_token_id else None

    def rows(self, tokens: torch.Tensor | np.ndarray, context: int) -> torch.Tensor:
        """A stream of tokens (n,) in rows as the model reads them, (rows, context), each with its `head`; a rest is
        left out. Raises ValueError for what is no row of integers, for rows without text in them, and for more than the
        model's context."""
        tokens = torch.as_tensor(tokens)
        if tokens.ndim != 1 or tokens.is_floating_point():
            shape = tuple(tokens.shape)
            raise ValueError(f"tokens must be one row of integer ids, not {tokens.dtype} of shape {shape}")
        if context < (least := 1 if self.head is None else 2):
            raise ValueError(f"rows of {context} tokens hold no text: {self.name} needs {least} at least")
        if context > self.context:
            raise ValueError(f"rows of {context} tokens, but {self.name} reads at most {self.context}: lower context")
        return in_rows(tokens, context, self.head)

    def studied(self, tokens: torch.Tensor) -> torch.Tensor:
        """The positions that dictionaries are trained and judged on, (B, T) bool: not the first of a row, whose
        residual is huge, and no special token."""
        found = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
        found[:, 0] = False
        for special in self.special_ids:
            found &= tokens != special
        return found

    def padding(self, tokens: torch.Tensor) -> torch.Tensor:
        """The padding at the end of each row, (B, T) bool."""
        if self.tokenizer.pad_token_id is None:
            return torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
        return (tokens == self.tokenizer.pad_token_id).flip(1).cumprod(1).flip(1).bool()

    def residuals(self, tokens: torch.Tensor) -> torch.Tensor:
        """Residual stream after block `layer`, (B, T) -> (B, T, d_model). No later block is run.

        Raises ValueError if any is NaN or infinite.
        """
        found = []

        def stop(residual, hook):
            found.append(residual)
            raise _AtSite

        # not stop_at_layer, which gives logits and not residuals after the last block
        with contextlib.suppress(_AtSite):
            self._run(self._held, tokens, stop)
        residuals = found[0].float()
        what = f"activations of {self.name} at {self.site}"
        require_finite(residuals, what, "check the weights, or load in float32")
        return residuals

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Next-token logits, (B, T) -> (B, T, n_vocab)."""
        return self.bridge(self._checked(tokens), use_cache=False).float()

    def losses(self, tokens: torch.Tensor) -> torch.Tensor:
        """Nats lost on each token but the first, (B, T) -> (B, T - 1)."""
        return torch.cat([token_losses(self.logits(part), part) for part in self.passes(tokens)])

    def passes(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Rows (n, T, ...) in parts of `ROWS_A_PASS`, or of so few that their logits are at most `LOGITS_A_PASS`."""
        return rows.split(min(ROWS_A_PASS, max(1, LOGITS_A_PASS // (rows.shape[1] * self.n_vocab))))

    def resume(self, residuals: torch.Tensor, at: torch.Tensor | None = None) -> torch.Tensor:
        """Logits from the residual stream after block `layer`, (B, T, d_model) -> (B, T, n_vocab).

        No block up to the site is run. `at` (B, T) bool names the n positions whose logits are asked for: they come as
        (n, n_vocab), and no others are made, which for a large vocabulary are most of the work.
        """
        if residuals.ndim != 3 or residuals.shape[-1] != self.d_model:
            raise ValueError(f"residuals must have shape (B, T, {self.d_model}), not {tuple(residuals.shape)}")
        if at is not None and (at.dtype != torch.bool or at.shape != residuals.shape[:2]):
            raise ValueError(
                f"positions must be bool and {tuple(residuals.shape[:2])}, not {at.dtype} {tuple(at.shape)}"
            )
        self._require_fitting(residuals)
        given = residuals.to(self.device, self.dtype)
        below = self.bridge.blocks[: self.layer + 1]
        try:
            for block in below:
                block.output = given
            with _asked(self.bridge, at):
                return self.bridge(given, use_cache=False).float()
        finally:
            for block in below:
                block.output = None

    def splice(self, tokens: torch.Tensor, replace: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Logits with `replace`, (B, T, d_model) -> (B, T, d_model), applied at the site: (B, T) -> (B, T, n_vocab)."""

        def hook(residual, hook):
            replaced = replace(residual.float())
            if replaced.shape != residual.shape:
                raise ValueError(f"replace must keep shape {tuple(residual.shape)}, it gave {tuple(replaced.shape)}")
            return replaced.to(residual.dtype)

        return self._run(self.bridge, tokens, hook).float()

    def _run(self, bridge: TransformerBridge, tokens: torch.Tensor, at_site: Callable) -> torch.Tensor:
        return bridge.run_with_hooks(self._checked(tokens), fwd_hooks=[(self.site, at_site)], use_cache=False)

    def _checked(self, tokens: torch.Tensor) -> torch.Tensor:
        if tokens.ndim != 2 or tokens.is_floating_point() or tokens.numel() == 0:
            raise ValueError(
                f"tokens must be integer ids of shape (batch, positions), not {tokens.dtype} {tuple(tokens.shape)}"
            )
        self._require_fitting(tokens)
        self._refuse_padding(tokens)
        tokens = tokens.to(self.device, torch.int64)
        low, high = (bound.item() for bound in tokens.aminmax())
        if low < 0 or high >= self.n_vocab:
            raise ValueError(
                f"token id {low if low < 0 else high} is outside the vocabulary of {self.name}, 0 to "
                f"{self.n_vocab - 1}: make the ids with its own tokenizer"
            )
        return tokens

    def _refuse_padding(self, tokens: torch.Tensor) -> None:
        """Padding on the left moves what follows; on the right nothing reads it."""
        pad, bos = self.tokenizer.pad_token_id, self.tokenizer.bos_token_id
        if pad is not None and (padded := (tokens[:, : 1 + (pad == bos)] == pad).all(1)).any():
            raise ValueError(
                f"row {int(padded.nonzero()[0])} begins with padding, which {self.name} would read as text: pad on the "
                'right (tokenizer.padding_side = "right"), or pass rows of one length'
            )

    def _require_fitting(self, sequences: torch.Tensor) -> None:
        if sequences.shape[1] > self.context:
            raise ValueError(
                f"the sequences have {sequences.shape[1]} tokens but {self.name} reads at most {self.context}: cut them"
            )


class _AtSite(Exception):
    """Ends a forward pass at the site."""


class ResidualBlock(BlockBridge):
    """A block hooked only before and after: inside it stays transformers' own, with fused attention, at full speed."""

    hook_aliases = {"hook_resid_pre": "hook_in", "hook_resid_post": "hook_out"}
    output: torch.Tensor | None = None  # handed on in place of running the block

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) if self.output is None else self.output


def in_rows(values: torch.Tensor, context: int, head: int | None) -> torch.Tensor:
    """(n,) -> (rows, context): `head`, if there is one, in front of each, and a rest left out."""
    body = context if head is None else context - 1
    rows = values[: len(values) // body * body].view(-1, body)
    return rows if head is None else F.pad(rows, (1, 0), value=head)


def subject_for(run_subject: str, family: str = "gpt2") -> str:
    """Name of the subject that a notebook's `subject` parameter stands for.

    "gemma" is `own_gemma`, and its chat model a difference from that. The pair of "hub" is
    what $SUITE_PAIR names, such as google/gemma-3-270m, and its chat model, which has the same name with "-it" behind.
    Raises ValueError for a family or a subject that does not exist.
    """
    if run_subject not in SUBJECTS.get(family, {}):
        known = SUBJECTS.get(family, SUBJECTS["gpt2"])
        raise ValueError(
            f'no subject "{run_subject}" of family "{family}": use {" or ".join(known)}, of {" or ".join(SUBJECTS)}'
        )
    if SUBJECTS[family][run_subject] == GEMMA.name:
        return own_gemma()
    base = os.path.expanduser(os.environ.get("SUITE_PAIR", ""))
    if run_subject == "hub" and family in CHAT_MARK and base:
        return base + CHAT_MARK[family]
    return SUBJECTS[family][run_subject]


def load_subject(
    name_or_path: str | Path, device: str | None = None, dtype: torch.dtype = torch.float32, layer: int | None = None
) -> Subject:
    """Load an embedded or packaged subject by name, a directory by path, or a hub model by id, frozen.

    Its blocks up to the site are read; the others follow when something asks for logits. `layer` defaults to two thirds
    of the depth (8 of 12), for Gemma to half of it (13 of 26). `dtype` is the dtype the model computes in; residuals
    are float32 all the same.
    Raises what `packaged_folder` raises, FileNotFoundError for an incomplete directory, ConnectionError or
    PermissionError for a hub model that cannot be had, ValueError for an unknown name or layer and for weights that do
    not fit their configuration.
    """
    files = load_pretrained(name_or_path, dtype)
    config, layer = files.config, _layer(files.config, layer, name_or_path)
    model = files.first_blocks(layer + 1).to(device or default_device())
    return Subject(
        name=str(name_or_path),
        folders=files.folders,
        layer=layer,
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_vocab=config.vocab_size,
        context=config.max_position_embeddings,
        device=model.device,
        dtype=model.dtype,
        files=files,
        _held=_bridge(model),
    )


def default_device() -> torch.device:
    """Where models are loaded to, and so where everything is computed: activations, and what reads them, follow."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def token_losses(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Nats lost on each token but the first: logits (B, T, n_vocab), tokens (B, T) -> (B, T - 1)."""
    targets = tokens.to(logits.device, torch.int64).roll(-1, dims=1)  # the last column is dropped below
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return losses.view(tokens.shape)[:, :-1]


def warn_if_other_corpus(subject: Subject, fingerprint: Mapping[str, Mapping[str, str]]) -> None:
    """Warn if the corpus at hand, package -> {version, sha256}, is not the one the subject was trained on."""
    known = subject.corpus
    if known is None:
        return
    packages = sorted(known.keys() | fingerprint.keys())
    differing = [name for name in packages if _entry(known, name, "sha256") != _entry(fingerprint, name, "sha256")]
    if differing:
        versions = [(name, _entry(known, name, "version"), _entry(fingerprint, name, "version")) for name in differing]
        changes = ", ".join(f"{name} {then} -> {now}" for name, then, now in versions)
        warnings.warn(
            f"{subject.name} was trained on another corpus than the one at hand ({changes}): its losses and every "
            "NMSE will differ somewhat from the stored ones, while comparisons within this run remain valid",
            stacklevel=2,
        )


def _entry(corpus: Mapping[str, Mapping], package: str, key: str) -> str:
    return corpus[package][key] if package in corpus else "absent"


@contextlib.contextmanager
def _asked(bridge: TransformerBridge, at: torch.Tensor | None) -> Iterator[None]:
    """While it lasts, the head reads the positions `at` alone."""
    if at is None:
        yield
        return
    head = bridge.original_model.get_output_embeddings()
    with head.register_forward_pre_hook(lambda head, args: (args[0][at.to(args[0].device)],)):
        yield


def _layer(config: Any, layer: int | None, name: str | Path) -> int:
    n_layers = config.num_hidden_layers
    if layer is None:
        return n_layers // 2 if config.model_type.startswith("gemma") else 2 * n_layers // 3
    if not 0 <= layer < n_layers:
        raise ValueError(f"{name} has no layer {layer}: choose one of 0 to {n_layers - 1}")
    return layer


def _bridge(model: PreTrainedModel) -> TransformerBridge:
    def keep_blocks_plain(adapter):
        blocks = adapter.component_mapping["blocks"]
        adapter.component_mapping["blocks"] = ResidualBlock(name=blocks.name, config=blocks.config)

    architecture = type(model).__name__
    return build_bridge_from_module(model, architecture, hf_config=model.config, post_adapter_hook=keep_blocks_plain)
