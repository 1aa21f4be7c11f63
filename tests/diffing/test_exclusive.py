"""When recall is half of its last value, which directions are found again, how alone a detector is."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from helpers.activations.injected import InjectedPair, Plan
from helpers.dictionaries.autoencoders import BatchTopK
from helpers.dictionaries.crosscoders import Crosscoder
from helpers.dictionaries.training import TrainConfig, train
from helpers.diffing.exclusive import found_again, half_tokens, isolation, recall_curve


def test_half_tokens_by_hand():
    tokens = pd.Series([100, 200, 300, 400])
    assert half_tokens(tokens, pd.Series([0.0, 0.2, 0.6, 0.8])) == 250
    assert half_tokens(tokens, pd.Series([0.8, 0.8, 0.8, 0.8])) == 50
    assert half_tokens(tokens, pd.Series([0.0, 0.9, 0.0, 0.2])) == pytest.approx(100 + 100 * 0.1 / 0.9)
    assert math.isnan(half_tokens(tokens, pd.Series([0.0, 0.5, 0.5, 0.0])))


def test_found_again_by_hand():
    rows = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    assert found_again(rows, torch.tensor([[5.0, 1.0]])) == pytest.approx(1 / 3)
    assert found_again(rows, rows) == 1.0
    assert found_again(rows, rows[:0]) == 0.0 and math.isnan(found_again(rows[:0], rows))
    assert found_again(rows, torch.tensor([[1.0, 1.0]]), cosine=0.71) == 0.0
    with pytest.raises(ValueError, match="directions"):
        found_again(rows * torch.nan, rows)


def test_isolation_by_hand():
    chosen, scored = np.array([[0.1, 0.8], [0.9, 0.3]]), np.array([[0.9, 0.7], [0.6, 0.4]])
    assert isolation(chosen, scored, 0) == pytest.approx({"best": 0.7, "other": 0.4, "isolation": 0.3})
    assert isolation(chosen, scored, 1) == pytest.approx({"best": 0.6, "other": 0.9, "isolation": -0.3})
    with pytest.raises(ValueError, match="two at least"):
        isolation(chosen[:1], scored[:1], 0)


class Noise:
    """Stands in for a stream of activations."""

    batch_size, fingerprint, n_activations = 128, "noise", 10_000

    def take(self, n):
        return torch.randn(n, 16, generator=torch.Generator().manual_seed(0))

    def batches(self, n_tokens=None, batch_size=None):
        return iter((0.1 * self.take(n_tokens or 8192)).split(batch_size or 128))


PAIR = InjectedPair(Noise(), Plan(each=1, rhos=(0.5,), rate=0.1, strength=3.0, rotation=0.0))
CONFIG = TrainConfig(tokens=8192, lr=1e-2)


def test_a_curve_is_that_of_plain_training_and_recall_rises():
    crosscoder, twin = (Crosscoder(16, 24, BatchTopK(1), seed=0) for _ in "ab")
    curve = recall_curve(crosscoder, PAIR.batches(8192), PAIR, CONFIG, points=8)
    train(twin, PAIR.batches(8192), CONFIG)
    assert torch.equal(crosscoder.W_dec, twin.W_dec)
    assert curve.tokens.tolist() == [1024 * i for i in range(1, 9)]
    assert curve.exclusive.iloc[-1] == curve.shared.iloc[-1] == 1.0


def test_batches_that_end_too_early_are_refused():
    with pytest.raises(ValueError, match="ended after 4,096 of 8,192"):
        recall_curve(Crosscoder(16, 24, BatchTopK(1)), PAIR.batches(4096), PAIR, CONFIG)
