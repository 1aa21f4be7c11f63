"""What was found of what was planted: by the cosine of a decoder row, and by F1 against labels of tokens."""

import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.dictionaries.autoencoders import BatchTopK
from helpers.dictionaries.crosscoders import Crosscoder
from helpers.diffing.recovery import f1_scores, planted_of, score_behaviours, score_planted

KINDS = ["chat-only", "chat-only", "base-only", "weak"]


@pytest.fixture
def pair():
    rho = torch.tensor([0.0, 0.0, torch.inf, 0.25])
    return types.SimpleNamespace(labels=KINDS, rho=rho, directions=torch.eye(4, 8))


@pytest.fixture
def crosscoder(pair):
    """Six latents: two of direction 0, one of 2 in base, one of 3 that base has weakly, one of none, one silent."""
    made = Crosscoder(8, 6, BatchTopK(1))
    base, chat = torch.zeros(2, 6, 8).unbind()
    chat[0, 0], chat[1, 0], chat[1, 7], base[2, 2], chat[3, 3], base[3, 3] = 3.0, 1.0, 0.5, 2.0, 1.0, 0.25
    chat[4, 6] = base[4, 6] = 1.0
    made.W_dec.data = torch.cat([base, chat], 1)
    return made


def test_each_latent_is_of_the_direction_that_its_larger_row_points_to(crosscoder, pair):
    found = planted_of(crosscoder, pair)
    assert found.planted.tolist() == [0, 0, 2, 3, -1, -1]
    assert found.kind.tolist() == ["chat-only", "chat-only", "base-only", "weak", "background", "background"]
    assert found.rho.iloc[3] == 0.25 and found.rho.iloc[4:].isna().all()
    assert found.match.iloc[1] == pytest.approx(1 / 1.25**0.5)
    assert planted_of(crosscoder, pair, cosine=0.95).planted.tolist() == [0, -1, 2, 3, -1, -1]


def test_precision_and_recall_by_hand(crosscoder, pair):
    found = planted_of(crosscoder, pair)
    called = np.array([True, True, False, True, False, False])  # both latents of one direction, and a weak one
    assert score_planted(called, found, pair.labels) == (2 / 3, 1 / 2)
    precision, recall = score_planted(np.zeros(6, bool), found, pair.labels)
    assert np.isnan(precision) and recall == 0


def test_f1_by_hand():
    latents = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 3.0], [0.5, 0.0, 0.0]])
    scores = f1_scores(latents, np.array([0, 0, 1, -1]), n_labels=3)
    expected = [[4 / 5, 0, 0], [0, 0, 1], [0, 0, 0]]  # latent 0: two of three firings on label 0, which has two tokens
    np.testing.assert_allclose(scores, expected)


@given(st.integers(0, 2**31))
def test_f1_agrees_with_counting(seed):
    random = torch.Generator().manual_seed(seed)
    latents = torch.randn(30, 5, generator=random).relu()
    labels = torch.randint(-1, 3, (30,), generator=random).numpy()
    on = latents.numpy() > 0
    slow = np.zeros((3, 5))
    for label in range(3):
        for j in range(5):
            right = (on[:, j] & (labels == label)).sum()
            slow[label, j] = 2 * right / max(1, on[:, j].sum() + (labels == label).sum())
    np.testing.assert_allclose(f1_scores(latents, labels, 3), slow)


def test_behaviours_by_hand():
    f1 = np.array([[0.9, 0.5, 0.0, 0.1], [0.1, 0.0, 0.6, 0.2]])  # behaviour 0 is wanted, 1 is not
    called = np.array([True, True, True, True])
    precision, recall = score_behaviours(called, f1, np.array([True, False]), cut=0.3)
    assert (precision, recall) == (2 / 4, 1.0)
    precision, recall = score_behaviours(called, f1, np.array([True, True]), cut=0.55)
    assert (precision, recall) == (2 / 4, 1.0)
    assert score_behaviours(~called, f1, np.array([True, False]), cut=0.3).recall == 0
