"""Explaining 200 latents of an autoencoder with 2,048, and scoring them, within two minutes on two cores."""

import functools
import time

import numpy as np
import torch

from helpers.dictionaries.autoencoders import SparseAutoencoder, TopK
from helpers.evaluation.explanations import (
    examples_of,
    explain,
    explanation_scores,
    firings,
    last_activations,
    predictions,
    site_activations,
)
from helpers.subjects.subject import load_subject
from helpers.text.documents import text_for


def test_two_hundred_latents(capsys):
    subject = load_subject("docs-gpt2")
    tokens = text_for("embedded", "heldout", subject.tokenizer, 65_536).tokens.astype(np.int64)
    rows = torch.from_numpy(tokens).view(-1, 128)
    x = site_activations(subject, rows)
    sae = SparseAutoencoder(subject.d_model, 2048, TopK(32))
    sae.start_from(x[:, 1:].flatten(0, 1))

    start = time.perf_counter()
    codes = firings(sae, x, subject.studied(rows))
    latents = np.flatnonzero(np.diff(codes.indptr))[:200]
    examples = examples_of(codes, rows.numpy(), latents, n=16)
    (pad,) = subject.tokenizer.encode(" _", add_special_tokens=False)
    found = explain(functools.partial(last_activations, subject, sae), examples, pad)
    table = explanation_scores(
        predictions(found.tries, rows.numpy(), subject.studied(rows).numpy(), sae.n_latents), codes, latents
    )
    seconds = time.perf_counter() - start
    with capsys.disabled():
        print(f"\n{len(table)} latents, {len(examples)} examples: {seconds:.1f} s on {torch.get_num_threads()} threads")
    assert len(table) == 200 and seconds < 120
