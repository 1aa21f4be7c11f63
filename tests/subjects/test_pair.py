"""A pair of models is harvested as one subject: both see the same tokens, each in its own half."""

import dataclasses

import numpy as np
import pytest
import torch
from twins import CONTEXT, D_MODEL, N_VOCAB, Twin, save_tiny

from helpers.activations.stream import ActivationStream, Harvest
from helpers.subjects.pair import SubjectPair, half_and_half
from helpers.subjects.subject import load_subject


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [save_tiny(tmp_path_factory.mktemp(name), "gemma2", seed) for seed, name in enumerate(("base", "chat"))]


@pytest.fixture
def subjects(folders):
    return [load_subject(folder) for folder in folders]


def rows(n=4, seed=0):
    return torch.randint(0, N_VOCAB, (n, CONTEXT), generator=torch.Generator().manual_seed(seed))


def test_each_half_is_one_models(subjects, folders):
    found = SubjectPair(*subjects).residuals(rows()).unflatten(-1, (2, D_MODEL))
    for model in (0, 1):
        expected = Twin(folders[model], subjects[model].layer).residuals(rows())
        torch.testing.assert_close(found[..., model, :], expected, rtol=1e-3, atol=1e-3)


def test_it_streams_like_a_subject(subjects):
    pair = SubjectPair(*subjects)
    harvest = Harvest(context=CONTEXT, normalisation="none")
    stream = ActivationStream(pair, rows(8).flatten(), harvest, batch_size=16)
    [batch] = list(stream.batches(16))
    assert batch.shape == (16, 2 * D_MODEL)
    everything = pair.residuals(rows(8))[:, 1:].flatten(0, 1)
    assert all((everything - vector).abs().amax(1).min() < 1e-4 for vector in batch)


def test_scaled_to_the_root_of_the_width_and_recorded(subjects):
    pair = SubjectPair(*subjects)
    scaled = pair.scaled(rows())
    norms = scaled.residuals(rows())[:, 1:].unflatten(-1, (2, D_MODEL)).norm(dim=-1).mean((0, 1))
    assert norms.tolist() == pytest.approx([D_MODEL**0.5] * 2, rel=1e-4)
    assert pair.scales == (1.0, 1.0) and scaled.fingerprint != pair.fingerprint
    assert SubjectPair(*subjects[::-1]).fingerprint != pair.fingerprint


def test_half_and_half_by_hand():
    text, dialogue = np.arange(10), np.arange(100, 110)
    assert half_and_half(text, dialogue, context=3, n_tokens=13).tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
        100,
        101,
        102,
        103,
        104,
        105,
    ]
    with pytest.raises(ValueError, match="12 tokens of dialogue are needed, there are 10"):
        half_and_half(np.arange(20), dialogue, context=3, n_tokens=24)


@pytest.mark.parametrize(
    ("what", "change"), [("width", {"d_model": 7}), ("site", {"layer": 0}), ("context", {"context": 5})]
)
def test_models_that_do_not_fit(subjects, what, change):
    base, chat = subjects
    with pytest.raises(ValueError, match=f"has {what} .*a pair must agree"):
        SubjectPair(base, dataclasses.replace(chat, **change))


def test_another_vocabulary(subjects):
    base, chat = subjects
    chat.tokenizer.add_tokens(["<new>"])
    with pytest.raises(ValueError, match="different vocabularies"):
        SubjectPair(base, chat)
