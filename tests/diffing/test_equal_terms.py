"""Which crosscoder explains more at equal sparsity, by hand."""

import pandas as pd
import pytest

from helpers.diffing.equal_terms import gain_at_matched_l0


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
