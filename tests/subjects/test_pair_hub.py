"""A pair of Gemma 3 as the hub has it: a template in a file of its own, a token beyond the vocabulary."""

import json

import pytest
import torch
from tiny_text import TOKENIZER
from tokenizers import processors
from transformers import AddedToken, Gemma3ForCausalLM, Gemma3TextConfig

from helpers.subjects.pair import SubjectPair
from helpers.subjects.subject import load_subject, subject_for
from helpers.text.documents import BOS, load_tokenizer
from helpers.text.turns import dialogue_text_for


@pytest.fixture
def served(live_hub, tmp_path, monkeypatch):
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    for seed, name in enumerate(("google/gemma-3-270m", "google/gemma-3-270m-it")):
        folder = live_hub.root / "models" / name
        save_gemma3(folder, seed)
        tokenizer = load_tokenizer(tmp_path / "tokenizer")
        tokenizer.add_tokens(AddedToken("<image_soft_token>", special=True), special_tokens=True)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_token_id)]
        )
        tokenizer.chat_template = tokenizer.chat_template if name.endswith("-it") else None
        tokenizer.save_pretrained(folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["extra_special_tokens"] = {"image_token": "<image_soft_token>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setenv("SUITE_PAIR", "google/gemma-3-270m")
    return live_hub


def save_gemma3(folder, seed):
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 6, "head_dim": 8, "sliding_window": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    ids = {name: getattr(TOKENIZER, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=len(TOKENIZER), **size, **heads, **ids)).save_pretrained(folder)


def test_the_pair_reads_text_and_dialogue(served, monkeypatch):
    pair = SubjectPair(*(load_subject(subject_for("hub", family)) for family in ("gemma2-base", "gemma2-chat")))
    assert (pair.site, pair.head) == ("blocks.3.hook_resid_post", TOKENIZER.bos_token_id)
    said = [{"role": role, "content": f"Well, {role}?"} for role in ("user", "assistant")]
    monkeypatch.setattr("helpers.base.hub.rows", lambda *_, instead: iter([said] * 100))
    spoken = dialogue_text_for("hub", "train", pair.chat.tokenizer, 300)
    rows = pair.rows(spoken.tokens.astype("int64"), 32)
    assert pair.residuals(rows).shape == (len(rows), 32, 2 * 16)
    torch.testing.assert_close(pair.base.resume(pair.base.residuals(rows)), pair.base.logits(rows))
