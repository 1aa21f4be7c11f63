"""What was found of what was planted: by the cosine of a decoder row, and by F1 against labels of tokens."""

import types

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, roc_auc_score

from helpers.activations.injected import InjectedPair, Plan
from helpers.dictionaries.autoencoders import BatchTopK, ReLU, SparseAutoencoder
from helpers.dictionaries.crosscoders import Crosscoder
from helpers.diffing.recovery import (
    auroc_scores,
    behaviour_table,
    cut_scores,
    detection_scores,
    directions,
    f1_scores,
    heldout_f1,
    planted_of,
    rank_of,
    recalls,
    score_behaviours,
    score_planted,
)

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
    planted = planted_of(crosscoder, pair).planted.to_numpy()
    called = np.array([True, True, False, True, True, False])  # both of one direction, a weak one, one of none
    delta = torch.tensor([1.0, 1.0, 0.0, 0.875])
    assert score_planted(called, planted, delta) == (2 / 4, 1 / 2)
    delta[3] = 0.95  # base has so little of the weak one that it is rightly called
    assert score_planted(called, planted, delta) == (3 / 4, 2 / 3)
    precision, recall = score_planted(np.zeros(6, bool), planted, delta)
    assert np.isnan(precision) and recall == 0
    assert np.isnan(score_planted(called, planted, torch.full((4,), 0.5)).recall)


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
    for codes in (latents, latents.numpy(), scipy.sparse.csr_array(latents.numpy())):
        np.testing.assert_array_equal(f1_scores(codes, labels, 3), slow)


def test_behaviours_by_hand():
    f1 = np.array([[0.9, 0.5, 0.0, 0.1], [0.1, 0.0, 0.6, 0.2]])  # behaviour 0 is wanted, 1 is not
    called = np.array([True, True, True, True])
    about, best = f1.argmax(0), f1.max(0)
    precision, recall = score_behaviours(called, about, best, np.array([True, False]))
    assert (precision, recall) == (2 / 4, 1.0)
    precision, recall = score_behaviours(called, about, best, np.array([True, True]))
    assert (precision, recall) == (3 / 4, 1.0)
    assert score_behaviours(~called, about, best, np.array([True, False])).recall == 0


class Background:
    """As much of a stream as directions need."""

    n_activations, batch_size = 64, 8

    def take(self, n):
        return torch.randn(n, 40, generator=torch.Generator().manual_seed(0))


def test_recall_by_hand():
    pair = InjectedPair(Background(), Plan(each=2, rhos=(0.5,)))
    v = pair.directions  # chat-only, base-only, shared, context, weak: two each
    found = recalls(torch.stack([3 * v[0], v[1] + 0.1 * v[9], v[3], v[4] + 1.5 * v[5], -v[8]]), pair)
    assert found.to_dict() == {
        "chat-only": 1.0,
        "base-only": 0.5,
        "shared": 0.5,  # cosines 0.55 and 0.83
        "context": 0.0,
        "weak": 0.0,  # a row points one way only
        "exclusive": 0.75,
    }


def test_directions_of_a_crosscoder_are_of_both_models_and_their_difference():
    crosscoder, sae = Crosscoder(8, 6, ReLU()), SparseAutoencoder(8, 6, ReLU())
    crosscoder.W_dec.data = torch.randn(6, 16, generator=torch.Generator().manual_seed(7))
    base, chat = crosscoder.decoders.detach()
    found = directions(crosscoder)
    assert found.shape == (4 * 6, 8)
    torch.testing.assert_close(found[:6], base)
    torch.testing.assert_close(found[12:18] + found[:6], found[6:12])
    torch.testing.assert_close(found[18:], -found[12:18])
    torch.testing.assert_close(directions(sae), sae.W_dec.detach())


CODES = np.array([[3.0, 0.0, 0.0], [1.0, 0.0, 0.0], [2.0, 5.0, 0.0], [0.0, 0.0, 0.0]])
LABELS = np.array([0, 0, 1, -1])


def some_codes(seed, n=40, m=6):
    """Codes with ties and silent latents, and labels of which one never occurs."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 4, (n, m)) * (random.random((n, m)) < 0.4) * (np.arange(m) < m - 1)
    return codes.astype(np.float32), random.integers(-1, 3, n), 4


def test_auroc_by_hand():
    found = auroc_scores(CODES, LABELS, 3)
    # latent 0: of the four pairs of label 0, 3 > 2, 3 > 0, 1 < 2, 1 > 0; latent 1 is off at both, and once on outside
    np.testing.assert_allclose(found[:2], [[3 / 4, 1 / 4, 1 / 2], [2 / 3, 1, 1 / 2]])
    assert np.isnan(found[2]).all()


@given(st.integers(0, 2**31))
def test_auroc_agrees_with_scikit_learn(seed):
    codes, labels, n = some_codes(seed)
    found = auroc_scores(scipy.sparse.csr_array(codes), labels, n)
    for label in range(3):
        for j in range(codes.shape[1]):
            there = labels == label
            if there.any() and not there.all():
                assert found[label, j] == pytest.approx(roc_auc_score(there, codes[:, j]))
    assert np.isnan(found[3]).all()


@given(st.integers(0, 2**31))
def test_auroc_counts_order_alone(seed):
    codes, labels, n = some_codes(seed)
    np.testing.assert_allclose(auroc_scores(codes, labels, n), auroc_scores(codes**3, labels, n))
    two = np.abs(labels) % 2
    zero, one = auroc_scores(codes, two, 2)
    np.testing.assert_allclose(zero, 1 - one)


def test_f1_and_cut_by_hand():
    best, cuts = cut_scores(CODES, LABELS, 3)
    np.testing.assert_allclose(best, [[4 / 5, 0, 0], [2 / 3, 1, 0], [0, 0, 0]])
    np.testing.assert_allclose(cuts, [[1, np.inf, np.inf], [2, 5, np.inf], [np.inf] * 3])


@given(st.integers(0, 2**31))
def test_f1_and_cut_agree_with_trying_every_cut(seed):
    codes, labels, n = some_codes(seed)
    best, cuts = cut_scores(codes, labels, n)
    for label in range(n):
        for j in range(codes.shape[1]):
            tries = [c for c in np.unique(codes[:, j])[::-1] if c > 0]
            scores = [f1_score(labels == label, codes[:, j] >= c, zero_division=0) for c in tries]
            top = max(scores, default=0)
            assert best[label, j] == pytest.approx(top)
            expected = tries[int(np.argmax(scores))] if top else np.inf
            assert cuts[label, j] == expected


def test_codes_below_zero_are_refused():
    with pytest.raises(ValueError, match="codes are at least zero"):
        auroc_scores(-CODES, LABELS, 2)


def planted_codes(m=300, seed=0):
    """One latent that tells label 0 but for some noise, and many that are on at random. Two halves."""
    random = np.random.default_rng(seed)
    labels = random.integers(-1, 3, 400)
    codes = random.random((400, m)) * (random.random((400, m)) < 0.3)
    codes[:, 7] = np.where((labels == 0) & (random.random(400) < 0.9), 1 + random.random(400), codes[:, 7])
    return scipy.sparse.csr_array(codes), labels, np.arange(400) < 200


def test_the_best_latent_is_found_and_luck_is_not():
    codes, labels, first = planted_codes()
    found = behaviour_table(codes, labels, first, ["told", "one", "two"])
    assert found.latent[0] == found.f1_latent[0] == 7
    assert found.auroc[0] > 0.9 and found.f1[0] > 0.9 and found.cut[0] >= 1
    assert (found.auroc_chosen[1:] > 0.6).all() and (found.auroc[1:] < 0.6).all()


def test_a_score_is_that_of_the_other_half():
    codes, labels, first = planted_codes()
    row = behaviour_table(codes, labels, first, ["told", "one", "two"]).iloc[1]
    other = ~first & (labels >= 0)
    dense, there = codes[other].toarray(), labels[other] == 1
    assert row.n == there.sum()
    assert row.auroc == pytest.approx(roc_auc_score(there, dense[:, row.latent]))
    assert row.f1 == pytest.approx(f1_score(there, dense[:, row.f1_latent] >= row.cut))


@given(st.integers(0, 2**31))
def test_the_f1_of_every_latent_on_the_other_half_is_that_of_a_table_with_this_latent_alone(seed):
    codes, labels, n = some_codes(seed)
    codes, first = scipy.sparse.csr_array(codes), np.arange(len(labels)) % 2 == 0
    found = heldout_f1(codes, labels, first, n)
    for j in range(codes.shape[1]):
        alone = behaviour_table(codes[:, [j]], labels, first, range(n)).f1
        np.testing.assert_allclose(found[alone.notna(), j], alone.dropna())


def test_what_cannot_be_chosen_is_not_and_what_is_missing_has_no_score():
    codes, labels, first = planted_codes()
    among = np.arange(codes.shape[1]) != 7
    found = behaviour_table(codes, labels, first, ["told", "one", "two", "absent"], among)
    assert found.latent[0] != 7 and found.auroc[0] < 0.7
    assert found.latent[3] == -1 and np.isnan([found.auroc[3], found.f1[3]]).all()
    own = behaviour_table(codes[:, :3], labels, first, ["told", "one", "two"], np.eye(3, dtype=bool))
    assert own.latent.tolist() == own.f1_latent.tolist() == [0, 1, 2]
    for half in (first, ~first):
        alone = behaviour_table(codes, np.where(half & (labels == 1), -1, labels), first, ["told", "one", "two"])
        assert alone.f1.isna().tolist() == alone.auroc.isna().tolist() == [False, True, False]
        assert alone.latent.tolist()[1] == -1


def test_ranks_by_hand():
    scores = np.array([0.5, 0.9, np.nan, 0.5, 0.1])
    assert [rank_of(scores, j) for j in (1, 0, 3, 4)] == [1, 2.5, 2.5, 4]
    assert np.isnan(rank_of(scores, 2)) and np.isnan(rank_of(scores, -1))
    alive = np.array([True, False, True, True, True])
    assert rank_of(scores, 3, alive) == 1.5 and np.isnan(rank_of(scores, 1, alive))


def test_the_label_that_fits_a_latent_is_scored_on_the_other_half():
    first = np.array([True] * 4 + [False] * 4)
    codes = scipy.sparse.csr_array(np.array([[1, 0, 2, 0, 3, 3, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]]).T)
    labellings = {"role": np.array([0, 1, 0, 1, 0, 1, 0, 1]), "behaviour": np.array([-1, -1, 0, -1, 0, 0, -1, -1])}
    found = detection_scores(codes, labellings, first)
    assert found.labelling[0] == "role" and found.label[0] == 0  # 1 on the first half, the behaviour 2 / 3
    assert found.f1[0] == pytest.approx(2 * 1 / (2 + 2)) and np.isnan(found.f1[1])


@given(st.integers(0, 2**31))
def test_detection_agrees_with_scikit_learn(seed):
    codes, labels, n = some_codes(seed)
    first = np.arange(len(labels)) % 2 == 0
    found = detection_scores(scipy.sparse.csr_array(codes), {"one": labels, "two": (labels + 2) % 3}, first)
    on = codes > 0
    for j, row in found.iterrows():
        tried = {(name, i): each == i for name, each in (("one", labels), ("two", (labels + 2) % 3)) for i in range(3)}
        scores = [f1_score(there[first], on[first, j], zero_division=0) for there in tried.values()]
        chosen = tried[row.labelling, row.label]
        assert f1_score(chosen[first], on[first, j], zero_division=0) == pytest.approx(max(scores))
        if on[first, j].any():
            assert row.f1 == pytest.approx(f1_score(chosen[~first], on[~first, j], zero_division=0))
