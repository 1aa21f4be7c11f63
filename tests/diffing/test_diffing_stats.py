"""A crosscoder in numbers: each by hand, and what must not count."""

import numpy as np
import pandas as pd
import pytest
import torch

from helpers.dictionaries.autoencoders import ReLU
from helpers.dictionaries.crosscoders import Crosscoder
from helpers.diffing.diffing_stats import (
    artefact_share,
    closeness,
    describe,
    gain_at_matched_l0,
    live,
    modes,
    shuffled_cosines,
)
from helpers.diffing.norms import latent_table


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


@pytest.mark.parametrize(
    "heights, expected",
    [
        ([0] * 20, 0),
        ([0] * 10 + [100] + [0] * 9, 1),
        ([50] + [0] * 9 + [900] + [0] * 8 + [60], 3),  # at the ends as well
        ([0] * 8 + [100, 60, 100] + [0] * 9, 1),  # the valley is not half as low
        ([0] * 8 + [100, 40, 100] + [0] * 9, 2),
        ([0] * 9 + [500] + [0] * 9 + [9], 1),  # nine values are not more than chance
        ([0] * 9 + [500, 500, 500] + [0] * 8, 1),  # a plateau is one
        ([0] * 5 + [10, 100, 500, 100, 15, 20, 60] + [0] * 8, 2),
    ],
)
def test_modes_by_hand(heights, expected):
    middles = (np.arange(20) + 0.5) / 20
    assert modes(np.repeat(middles, heights)) == expected


def test_modes_do_not_come_from_noise():
    """One broad mode, drawn anew; a flat histogram has no valley that counting would not make."""
    random = np.random.default_rng(0)
    assert [modes(random.normal(0.5, 0.15, 1000).clip(0, 1)) for _ in range(50)] == [1] * 50
    flat = [modes(random.random(1000)) for _ in range(50)]
    assert max(flat) <= 1


def table_of(names, nu, rate=None):
    return pd.DataFrame({"class": names, "nu_reconstruction": nu, "rate": rate or [0.1] * len(names)})


def test_artefacts_are_those_that_look_shared():
    names = ["shared"] * 41 + ["chat-only"] * 4
    nu = [*np.linspace(0.5, 1.5, 41), 0.0, 0.1, 1.0, 2.0]
    assert artefact_share(table_of(names, nu)) == 0.25
    dead = [0.1] * 41 + [0.1, 0.1, 0.0, 0.1]  # the one inside never fires
    assert artefact_share(table_of(names, nu, dead)) == 0.0


def test_artefacts_need_both_classes():
    assert np.isnan(artefact_share(table_of(["shared"] * 3, [1.0] * 3)))
    assert np.isnan(artefact_share(table_of(["chat-only", "other"], [1.0] * 2)))


def random_crosscoder(n=12, seed=0):
    crosscoder = Crosscoder(6, n, ReLU())
    random = torch.Generator().manual_seed(seed)
    for parameter in crosscoder.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=random)
    return crosscoder.eval()


def test_shuffled_pairs_are_never_a_latent_with_itself():
    crosscoder = Crosscoder(8, 8, ReLU())
    crosscoder.W_dec.data = torch.eye(8).repeat(1, 2)  # both rows equal, others orthogonal
    for seed in range(20):
        assert np.abs(shuffled_cosines(crosscoder, np.arange(8) < 5, seed)).max() == 0
    assert len(shuffled_cosines(crosscoder, np.arange(8) < 5)) == 5
    assert len(shuffled_cosines(crosscoder, np.arange(8) < 1)) == 0
    assert np.abs(shuffled_cosines(random_crosscoder(), np.ones(12, bool))).max() <= 1 + 1e-6


def test_describe_leaves_dead_latents_out():
    crosscoder, x = random_crosscoder(), torch.randn(64, 2, 6, generator=torch.Generator().manual_seed(1))
    crosscoder.b_enc.data[:3] = -1e3  # never on
    table = latent_table(crosscoder, x)
    found, alive = describe(crosscoder, x), live(table)
    pd.testing.assert_series_equal(pd.Series(found), pd.Series(describe(crosscoder, x, table)))
    assert found["dead"] == 12 - len(alive) >= 3 and found["live"] == len(alive)
    share = {name: (alive["class"] == name).mean() for name in ("base-only", "shared", "chat-only", "other")}
    rates = [found[name.replace("-", "_")] for name in share]
    assert rates == pytest.approx([1000 * value for value in share.values()]) and sum(rates) == pytest.approx(1000)
    assert found["outer"] == pytest.approx(((alive.delta <= 0.1) | (alive.delta >= 0.9)).mean())
    shared = alive[alive["class"] == "shared"]
    assert found["cosine"] == pytest.approx(shared.cosine.median())
    assert found["low_share"] == pytest.approx((shared.cosine < 0.5).mean())


def test_dead_latents_make_no_mode_and_no_chance():
    crosscoder, dead = Crosscoder(8, 160, ReLU()), np.arange(160) >= 60
    crosscoder.b_enc.data = torch.from_numpy(np.where(dead, -1e3, 10.0)).float()
    crosscoder.W_dec.data[60:] = torch.eye(8)[0].repeat(2)  # dead, and all of one direction
    crosscoder.W_dec.data[120:, :8] = 0  # dead, and chat-only
    found = describe(crosscoder.eval(), torch.randn(16, 2, 8, generator=torch.Generator().manual_seed(0)))
    assert (found["live"], found["modes"]) == (60, 1) and found["shuffled"] < 0.95


def test_describe_of_a_crosscoder_that_is_dead():
    crosscoder = random_crosscoder()
    crosscoder.b_enc.data[:] = -1e3
    found = describe(crosscoder, torch.randn(8, 2, 6))
    assert found["live"] == 0 and found["modes"] == 0 and np.isnan(found["outer"])


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
