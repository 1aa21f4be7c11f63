"""What a fine-tune does to the first tokens of other text, read through the unembedding."""

import numpy as np
import pytest
import torch

from helpers.diffing.lens import distinctive, first_differences, narrow_fine_tune, read_out, word_ranks
from helpers.subjects.pretraining import PretrainConfig
from helpers.subjects.subject import load_subject

CONFIG = PretrainConfig(tokens=256, context=32, batch=256, micro_batch=256, lr=2e-3, evaluations=1)


@pytest.fixture(scope="module")
def base():
    return load_subject("docs-gemma2-base")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SUITE_CACHE", str(tmp_path))


def test_word_ranks_by_hand():
    logits = torch.tensor([[0.0, 3.0, 1.0, 1.0, -2.0]])
    assert word_ranks(logits, np.array([1, 4, 2, 0])).tolist() == [[1.0, 0.0, 0.625, 0.25]]


def test_distinctive_words_by_hand():
    narrow, plain = np.array([3] * 60 + [1] * 20 + [2] * 19 + [4]), np.array([1] * 50 + [2] * 10 + [3] * 40)
    assert distinctive(narrow, plain, 6, n=3).tolist() == [3, 2, 4]  # 0.6 log 1.5, 0.19 log 1.9, 0.015 log 3
    assert distinctive(narrow, plain, 6, n=6)[-1] == 1  # rarer than in plain text


def test_the_last_residual_reads_out_as_the_models_logits(base):
    rows = base.rows(np.arange(100, 132), 32)
    found = []
    base.bridge.run_with_hooks(
        rows, fwd_hooks=[(f"blocks.{base.n_layers - 1}.hook_resid_post", lambda r, hook: found.append(r))]
    )
    logits, capped = read_out(base, found[0][0]), base.logits(rows)[0]
    assert torch.equal(logits.argsort(-1)[:, -5:], capped.argsort(-1)[:, -5:])


def test_differences_of_the_first_positions(base):
    rows = base.rows(np.arange(100, 196), 32)
    assert not first_differences(base, base, rows, 3).any()
    with pytest.raises(ValueError, match="longer ones"):
        first_differences(base, base, rows, 32)


def test_a_narrow_fine_tune_reads_its_text_and_is_kept(base, cache):
    narrow, plain = np.full(512, 777, dtype=np.uint16), np.arange(1000, 1600, dtype=np.uint16)
    tuned = narrow_fine_tune(base, narrow, plain, 0.0, CONFIG)
    rows = base.rows(np.arange(100, 196), 32)
    before, after = (subject.losses(base.rows(narrow.astype(int), 32)).mean() for subject in (base, tuned))
    assert after < before / 2
    delta = first_differences(base, tuned, rows, 3)
    assert delta.shape == (3, base.d_model) and delta.any(1).all()
    torch.testing.assert_close(
        delta[0], (tuned.residuals(rows) - base.residuals(rows))[:, 1].mean(0), rtol=1e-3, atol=1e-4
    )
    assert narrow_fine_tune(base, narrow, plain, 0.0, CONFIG).folder == tuned.folder
    assert narrow_fine_tune(base, narrow, plain, 1.0, CONFIG).folder != tuned.folder
    with pytest.raises(ValueError, match="1,024 tokens of plain text are needed, there are 600"):
        narrow_fine_tune(base, narrow, plain, 2.0, CONFIG)
