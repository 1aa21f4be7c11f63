"""How close two models are, and which crosscoder explains more at equal sparsity, by hand."""

import numpy as np
import pandas as pd
import pytest
import torch

from helpers.diffing.diffing_stats import closeness, gain_at_matched_l0


def test_closeness_by_hand():
    base = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
    chat = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0], [0.0, 2.0]])  # mean (1, 2)
    groups = {"text": np.array([True, True, False, False]), "none": np.zeros(4, bool), "user": np.arange(4) > 1}
    found = closeness(torch.stack([base, chat], 1), groups).set_index("group")
    assert list(found.index) == ["text", "user"] and found.tokens.tolist() == [2, 2]
    assert found.difference.tolist() == pytest.approx([16 / (4 + 8), 0.0])
    assert found.norm_ratio.tolist() == pytest.approx([(1 + 5) / (1 + 3), 1.0])


def test_closeness_knows_no_mean_shift_as_closeness():
    """A shift that is the same at every token is a difference, too."""
    x = torch.randn(50, 2, 3, generator=torch.Generator().manual_seed(0))
    x[:, 1] = x[:, 0] + torch.tensor([2.0, 0.0, 0.0])
    spread = (x[:, 1] - x[:, 1].mean(0)).square().sum()
    assert closeness(x, {"all": np.ones(50, bool)}).difference[0] == pytest.approx(50 * 4 / spread.item(), rel=1e-5)


def frontier(method, seed, l0, fve):
    return pd.DataFrame({"method": method, "seed": seed, "l0": l0, "fve": fve})


def test_gain_at_matched_l0_by_hand():
    better = frontier("BatchTopK", 0, [8.0, 16.0, 32.0], [0.5, 0.6, 0.8])
    worse = frontier("ReLU", 0, [8.0, 16.0, 64.0], [0.4, 0.5, 0.9])
    at_32 = 1 - (0.5 * 0.1) ** 0.5  # half way in log L0: the geometric mean of the errors
    gains = [0.1, 0.1, 0.8 - at_32]  # 8 and 16 are of both
    found = gain_at_matched_l0(pd.concat([better, worse]), "BatchTopK", "ReLU")
    assert found.tolist() == pytest.approx([(2 * gains[0] + 2 * gains[1] + gains[2]) / 5])
    turned = gain_at_matched_l0(pd.concat([better, worse]), "ReLU", "BatchTopK")
    assert turned[0] == pytest.approx(-found[0])


def test_gain_has_a_value_per_seed_and_never_extrapolates():
    frame = pd.concat([frontier(m, s, [4.0, 9.0], [0.5, 0.7 + s / 10]) for m in ("a", "b") for s in (1, 2)])
    assert gain_at_matched_l0(frame, "a", "b").to_dict() == pytest.approx({1: 0.0, 2: 0.0}, abs=1e-12)
    apart = pd.concat([frontier("a", 0, [4.0, 9.0], [0.5, 0.7]), frontier("b", 0, [10.0, 20.0], [0.5, 0.7])])
    with pytest.raises(ValueError, match="share no L0"):
        gain_at_matched_l0(apart, "a", "b")
