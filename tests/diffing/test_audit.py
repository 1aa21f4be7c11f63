"""The audit on a code made by hand: which latent tells the habit, and how far down each order it stands."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

from helpers.dictionaries.autoencoders import BatchTopK, SparseAutoencoder
from helpers.dictionaries.crosscoders import Crosscoder
from helpers.dictionaries.pair_collection import Heldout
from helpers.diffing.audit import first_of, habit_places, own_orders, without_dictionary
from helpers.diffing.equal_terms import BATCHTOPK, CHAT, DIFF
from helpers.diffing.reading import MIN_FIRED

NAMES = ["other", "habit"]
N = 40  # tokens: 20 decisions in 20 dialogues, every second one of the habit


def reading(shift=0.0):
    dialogue = np.repeat(np.arange(N // 2), 2)
    decisions = np.where(np.arange(N) % 2 == 0, (dialogue // 2) % 2, -1)
    x = torch.randn(N, 2, 4, generator=torch.Generator().manual_seed(0))
    x[decisions == 1, 1] += shift
    roles, tokens = np.ones(N, np.int8), np.arange(N)
    return Heldout(x, tokens, roles, np.full(N, -1), decisions, dialogue)


def code():
    """Latent 0 is on everywhere, latent 1 at the habit's decisions, latent 2 never."""
    on = np.zeros((N, 3), np.float32)
    on[:, 0], on[reading().decisions == 1, 1] = 5.0, 1.0
    return scipy.sparse.csr_array(on)


def test_the_latent_of_the_habit_and_its_places_by_hand():
    orders = {"energy": pd.Series([N * 25.0, 10.0, 0.0]), "rare first": pd.Series([-1.0, 2.0, 3.0])}
    found = habit_places(code(), orders, reading(), NAMES, "habit").query("place == 'decision'").set_index("order")
    assert found.latent.tolist() == [1, 1] and found.f1.tolist() == [1.0, 1.0] and found.live.tolist() == [2, 2]
    assert found["rank"].to_dict() == {"energy": 2.0, "rare first": 1.0}  # latent 2 never fires and is left out


def test_only_latents_that_fire_often_are_shown_first():
    scores = pd.Series([1, 2, 3])
    assert (code() > 0).sum(0).tolist() == [N, MIN_FIRED, 0]
    assert first_of(scores, code(), n=2).tolist() == [1, 0]


@pytest.mark.parametrize(("shift", "low", "high"), [(6.0, 0.99, 1.0), (0.0, 0.0, 0.95)])
def test_a_shift_at_the_habits_tokens_is_told_without_a_dictionary(shift, low, high):
    found = without_dictionary(reading(shift), NAMES, "habit").query("place == 'decision'").set_index("method").auroc
    assert set(found.index) == {"mean difference", "length of the difference"}
    assert low <= found["length of the difference"] <= high


def test_where_nothing_is_labelled_nothing_is_told():
    assert without_dictionary(reading(6.0), NAMES, "habit").query("place == 'answer'").auroc.isna().all()


def test_each_method_has_orders_of_its_own():
    x = reading().x
    sae = SparseAutoencoder(4, 6, BatchTopK(2)).eval()
    sae.activation.threshold.fill_(0.1)
    crosscoder = Crosscoder(4, 6, BatchTopK(2)).eval()
    crosscoder.activation.threshold.fill_(0.1)
    encoded = scipy.sparse.csr_array(sae.encode(x[:, 1] - x[:, 0]).detach().numpy())
    found = own_orders(DIFF, sae, encoded, x)
    np.testing.assert_allclose(found["energy"], (encoded.toarray() ** 2).sum(0), rtol=1e-5)
    assert (found["smallest |ν|"].dropna() <= 0).all() and list(own_orders(CHAT, sae, encoded, x)) == ["smallest |ν|"]
    assert set(own_orders(BATCHTOPK, crosscoder, encoded, x)) == {"Δ_norm", "ranks of ν"}
