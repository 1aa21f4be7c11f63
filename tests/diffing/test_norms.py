"""Whose latent is it by its norms? Classes, modes, cosines and twins by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.dictionaries.autoencoders import ReLU
from helpers.dictionaries.crosscoders import Crosscoder
from helpers.diffing.norms import (
    classes,
    decoder_cosine,
    delta_norm,
    divergence,
    modes,
    shuffled_cosines,
    twin_counts,
    twins,
)


def with_norms(base, chat):
    """A crosscoder whose latents have these decoder norms."""
    crosscoder = Crosscoder(2, len(base), ReLU())
    rows = torch.stack([torch.tensor(base), torch.tensor(chat)], 1)
    crosscoder.W_dec.data = torch.stack([rows, torch.zeros_like(rows)], 2).flatten(1)  # along the first axis
    return crosscoder


def random_crosscoder(seed=0, n=12):
    crosscoder = Crosscoder(6, n, ReLU())
    random = torch.Generator().manual_seed(seed)
    for parameter in crosscoder.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=random)
    return crosscoder.eval()


def test_delta_norm_and_classes_by_hand():
    delta = delta_norm(with_norms([1.0, 2.0, 0.0, 4.0, 0.0, 1.0], [1.0, 0.0, 3.0, 1.0, 0.0, 10.0]))
    assert delta.tolist() == pytest.approx([0.5, 0.0, 1.0, 0.125, 0.5, 0.95])
    assert classes(delta).tolist() == ["shared", "base-only", "chat-only", "other", "shared", "chat-only"]
    assert classes(torch.tensor([0.1, 0.4, 0.6, 0.9])).tolist() == ["base-only", "shared", "shared", "chat-only"]


@given(st.integers(0, 50))
def test_swapping_the_models_turns_delta_around(seed):
    crosscoder, swapped = random_crosscoder(seed), random_crosscoder(seed)
    swapped.W_dec.data = crosscoder.W_dec.data.roll(6, dims=1)
    torch.testing.assert_close(delta_norm(swapped), 1 - delta_norm(crosscoder))
    torch.testing.assert_close(decoder_cosine(swapped), decoder_cosine(crosscoder))


def test_cosine_by_hand():
    crosscoder = Crosscoder(2, 2, ReLU())
    crosscoder.W_dec.data = torch.tensor([[1.0, 0.0, 0.0, 3.0], [1.0, 1.0, -2.0, -2.0]])
    assert decoder_cosine(crosscoder).tolist() == pytest.approx([0.0, -1.0], abs=1e-6)


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


def test_shuffled_pairs_are_never_a_latent_with_itself():
    crosscoder = Crosscoder(8, 8, ReLU())
    crosscoder.W_dec.data = torch.eye(8).repeat(1, 2)  # both rows equal, others orthogonal
    for seed in range(20):
        assert np.abs(shuffled_cosines(crosscoder, np.arange(8) < 5, seed)).max() == 0
    assert len(shuffled_cosines(crosscoder, np.arange(8) < 5)) == 5
    assert len(shuffled_cosines(crosscoder, np.arange(8) < 1)) == 0
    assert np.abs(shuffled_cosines(random_crosscoder(), np.ones(12, bool))).max() <= 1 + 1e-6


def test_twins_by_hand():
    crosscoder = Crosscoder(2, 4, ReLU())
    crosscoder.W_dec.data = torch.tensor(
        [[0.0, 0.0, 1.0, 0.1], [0.0, 0.0, 0.0, 1.0], [2.0, 0.0, 0.0, 0.0], [0.0, 2.0, 1.9, 0.0]]
    )
    assert twins(crosscoder).tolist() == [[0, 2]]
    assert twins(crosscoder, cosine=0.999).tolist() == []


def test_twin_counts_by_hand():
    """Twins (0, 2) and (1, 3): the first fire on different tokens, the second at once."""
    crosscoder = Crosscoder(4, 5, ReLU())
    base, chat = torch.zeros(2, 5, 4).unbind()
    chat[0, 0], base[2, 0], chat[1, 1], base[3, 1], chat[4, 2] = 1.0, 1.0, 1.0, 1.0, 1.0
    crosscoder.W_dec.data = torch.cat([base, chat], 1)
    crosscoder.W_enc.data.zero_()
    for model, feature, latent in ((1, 0, 0), (0, 0, 2), (1, 1, 1), (1, 1, 3)):
        crosscoder.W_enc.data[latent, 4 * model + feature] = 1.0
    x = torch.zeros(4, 2, 4)
    x[0, 1, 0], x[1, 0, 0], x[2, 1, 1] = 1.0, 1.0, 1.0
    assert twin_counts(crosscoder.eval(), x) == {"pairs": 2, "apart": 0.5}
    assert twin_counts(crosscoder, x[:2]) == {"pairs": 2, "apart": 1.0}  # the second pair never fires
    none = twin_counts(with_norms([1.0, 1.0], [1.0, 0.0]), torch.zeros(3, 2, 2))
    assert none["pairs"] == 0 and np.isnan(none["apart"])


def test_divergence_by_hand():
    worth = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.8, 0.8], [0.5, 0.5, 0.2], [0.05, 0.05, 0.0]])
    worth = torch.cat([worth, torch.full((4, 1), 10.0)], 1)  # another latent, far stronger
    # pair (0, 1): tokens 0 and 1 apart, token 2 together, token 3 low; pair (0, 2): tokens 1 apart, 0 and 2 not
    found = divergence(torch.tensor([[0, 1], [0, 2]]), worth)
    assert found.tolist() == pytest.approx([2 / 3, 1 / 3])
    assert divergence(torch.empty(0, 2, dtype=torch.int64), worth).tolist() == []
