"""Tiny random language models on disk, and the slow twin of a subject: its cuts with transformers alone."""

import json
import shutil
import types
from pathlib import Path

import numpy as np
import torch
from tiny_text import A, T
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from helpers.subjects.subject import Subject
from helpers.text.turns import FIRST, Encoded

N_VOCAB = 258  # 256 bytes and two special tokens
BOS = 256
CONTEXT = 16
D_MODEL = 24


def save_tiny(
    folder: Path,
    family: str,
    seed: int = 0,
    n_layers: int | None = None,
    corpus: dict | None = None,
    bos_first: bool = False,
) -> Path:
    """A random GPT-2 (3 layers) or Gemma-2 (4 layers) with a byte tokenizer, saved as any Hugging Face checkpoint."""
    torch.manual_seed(seed)
    model = tiny_gpt2(n_layers or 3) if family == "gpt2" else tiny_gemma2(n_layers or 4)
    for parameter in model.parameters():  # the default initialisation is so small that blocks hardly matter
        parameter.data.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    tiny_tokenizer(bos_first).save_pretrained(folder)
    if corpus is not None:
        (folder / "training.json").write_text(json.dumps({"corpus": corpus}))
    return folder


def random_dialogue(roles: list[int], seed: int) -> Encoded:
    """Arbitrary tokens in these roles, of no behaviour."""
    tokens, labels = np.random.default_rng(seed).integers(0, N_VOCAB, len(roles)), np.full(len(roles), -1, np.int8)
    return Encoded(tokens.astype(np.int32), np.array(roles, np.int8), labels, labels)


def tiny_gpt2(n_layers: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=N_VOCAB,
            n_positions=CONTEXT,
            n_embd=D_MODEL,
            n_layer=n_layers,
            n_head=3,
            bos_token_id=256,
            eos_token_id=256,
        )
    )


def tiny_gemma2(n_layers: int) -> Gemma2ForCausalLM:
    """Soft-caps that bite, a sliding window shorter than the context, grouped attention."""
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=N_VOCAB,
            max_position_embeddings=CONTEXT,
            hidden_size=D_MODEL,
            intermediate_size=2 * D_MODEL,
            num_hidden_layers=n_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=4,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            query_pre_attn_scalar=8,
            bos_token_id=256,
            eos_token_id=257,
            pad_token_id=None,
        )
    )


def tiny_tokenizer(bos_first: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte. With `bos_first` it puts <bos> before every text by itself, as Gemma's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    if bos_first:
        tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


class Twin:
    """The cuts of `Subject` by forward hooks on transformers' own model, with eager attention. (B, T) token ids."""

    def __init__(self, folder: Path, layer: int):
        self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        inner = self.model.base_model
        self.block = (inner.h if hasattr(inner, "h") else inner.layers)[layer]

    def residuals(self, tokens: torch.Tensor) -> torch.Tensor:
        seen = []
        self._hooked(lambda residual: seen.append(residual), tokens)
        return seen[0]

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.model(tokens).logits

    def losses(self, tokens: torch.Tensor) -> torch.Tensor:
        log_probs = self.logits(tokens).log_softmax(-1)
        rows = [[-log_probs[b, t, tokens[b, t + 1]] for t in range(tokens.shape[1] - 1)] for b in range(len(tokens))]
        return torch.tensor(rows)

    def resume(self, residuals: torch.Tensor) -> torch.Tensor:
        """The whole model on any tokens at all, with the block's output replaced."""
        return self._hooked(lambda _: residuals, torch.zeros(residuals.shape[:2], dtype=torch.int64))

    def splice(self, tokens: torch.Tensor, replace) -> torch.Tensor:
        return self._hooked(replace, tokens)

    def _hooked(self, replace, tokens: torch.Tensor) -> torch.Tensor:
        def hook(module, inputs, output):
            if isinstance(output, torch.Tensor):
                return replace(output)
            replaced = replace(output[0])
            return None if replaced is None else (replaced, *output[1:])

        handle = self.block.register_forward_hook(hook)
        try:
            return self.logits(tokens)
        finally:
            handle.remove()


class CountingSubject:
    """Stands in for a Subject: the residual of a token is (id, position in its row, 1, 2), and every row is counted."""

    name, site, device, dtype, d_model, context = "counting", "here", torch.device("cpu"), torch.float32, 4, 64
    rows, studied, padding = Subject.rows, Subject.studied, Subject.padding

    def __init__(self, fingerprint: str = "weights", special_ids=(), head: int | None = None, pad: int | None = None):
        self.fingerprint, self.special_ids, self.head = fingerprint, list(special_ids), head
        self.tokenizer = types.SimpleNamespace(pad_token_id=pad)
        self.rows_read = 0

    def residuals(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T, 4)"""
        self.rows_read += len(tokens)
        ids = tokens.float()
        positions = torch.arange(tokens.shape[1]).expand_as(ids).float()
        return torch.stack([ids, positions, torch.ones_like(ids), torch.full_like(ids, 2)], -1)


def slow_masks(roles):
    """(full, first nine), as the released code makes them: an assistant mask, shifted left, counted anew each turn."""
    assistant = [r == A or (i > 0 and roles[i - 1] == A) for i, r in enumerate(roles)]
    full = [i + 1 < len(roles) and assistant[i + 1] for i in range(len(roles))]
    first, count = [], 0
    for i in range(len(roles)):
        count = count + 1 if full[i] else 0
        first.append(full[i] and count <= FIRST and roles[i] != T)
    return full, first


class Scripted:
    """A model that answers each prompt by a rule, some words after it has ended its turn included."""

    device = torch.device("cpu")
    config = types.SimpleNamespace(max_position_embeddings=256)

    def __init__(self, tokenizer, rule):
        self.tokenizer, self.rule, self.batches = tokenizer, rule, []

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample, eos_token_id, pad_token_id):
        assert not do_sample and torch.equal(attention_mask.bool(), input_ids != pad_token_id)
        self.batches.append(tuple(input_ids.shape))
        texts = [self.rule(self.tokenizer.decode(row, skip_special_tokens=True)) for row in input_ids]
        rows = [self.tokenizer(text, add_special_tokens=False)["input_ids"][:max_new_tokens] for text in texts]
        longest = max(map(len, rows)) + 1
        rows = [row + [eos_token_id] + [pad_token_id] * (longest - len(row) - 1) for row in rows]
        return torch.cat([input_ids, torch.tensor(rows)], 1)


def put_into_cache(hub_cache, repo, folder):
    """As huggingface_hub lays its cache out."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    entry = hub_cache / f"models--{repo.replace('/', '--')}"
    shutil.copytree(folder, entry / "snapshots" / commit)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(commit)
