"""The collection of a tiny random subject, for tests of what is trained on it."""

import dataclasses

import pytest
import torch
from twins import N_VOCAB, save_tiny

from helpers.dictionaries import collection
from helpers.dictionaries.collection import PLANS, TrainedSAEs

TINY = dataclasses.replace(PLANS["smoke"], sizes=(8, 16), ks=(2, 4), n=16, k=4, context=8, batch_size=64)
TINY = dataclasses.replace(TINY, heldout=64, tokens=256, text=512)


@pytest.fixture
def open_shelf(monkeypatch, tmp_path):
    """Returns a function that opens the collection of a tiny random subject, which reads arbitrary tokens."""
    save_tiny(tmp_path / "model", "gpt2")

    def text_for(subject, split, tokenizer, n_tokens):
        random = torch.Generator().manual_seed(len(split))
        tokens = torch.randint(0, N_VOCAB, (n_tokens,), generator=random).numpy()
        return collection.TokenStream(tokens, [0, n_tokens], ["all"], {})

    monkeypatch.setenv("SUITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(collection, "subject_for", lambda name: tmp_path / "model")
    monkeypatch.setattr(collection, "text_for", text_for)
    monkeypatch.setitem(PLANS, "smoke", TINY)
    monkeypatch.setitem(collection.CONTEXTS, "embedded", {"smoke": TINY.context, "laptop": TINY.context})
    return lambda plan="smoke", seeds=3: TrainedSAEs(plan, "embedded", range(3, 3 + seeds))
