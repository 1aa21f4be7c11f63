"""Concepts are where their owners are, and a crosscoder that is right about them is scored so."""

import math

import numpy as np
import pytest
import torch

from helpers.dictionaries.autoencoders import BatchTopK, ReLU
from helpers.dictionaries.crosscoders import Crosscoder
from helpers.diffing.concepts import ConceptPair, concept_table, nearest_concepts, spurious

PAIR = ConceptPair(d_model=16, shared=3, alone=2, rate=0.2, drift=0.5, rho=0.25)


def exact(pair, rows=None):
    """A crosscoder whose latents read and write the concepts of an orthogonal pair."""
    rows = pair.directions * pair.strength.unsqueeze(-1) if rows is None else rows  # (2, concepts, d_model)
    crosscoder = Crosscoder(pair.d_model, rows.shape[1], ReLU())
    crosscoder.W_dec.data = rows.transpose(0, 1).reshape(rows.shape[1], -1).contiguous()
    crosscoder.W_enc.data = crosscoder.W_dec.data.clone()
    crosscoder.b_enc.data -= 0.05
    return crosscoder


def orthogonal(**options):
    pair = ConceptPair(d_model=16, shared=3, alone=2, rate=0.2, **options)
    rows = torch.eye(16)[:7]
    pair.__dict__["directions"] = torch.stack([rows, rows]) * (pair.strength > 0).unsqueeze(-1)
    return pair


def test_owners_strengths_and_delta():
    assert PAIR.owners.tolist() == ["shared"] * 3 + ["base-only"] * 2 + ["chat-only"] * 2
    assert PAIR.delta.tolist() == [0.875] * 3 + [0, 0, 1, 1]
    x, strengths = PAIR.sample(5000)
    assert strengths.shape == (5000, 7) and abs((strengths > 0).float().mean() - 0.2) < 0.01
    assert 0.5 <= strengths[strengths > 0].min() and strengths.max() <= 1.5
    base, chat = PAIR.directions
    whole = strengths @ torch.diag(torch.tensor([0.25] * 3 + [1, 1, 0, 0])) @ base
    torch.testing.assert_close(x[:, 0], whole)
    torch.testing.assert_close(x[:, 1], strengths @ chat)


def test_directions_are_turned_by_the_drift_or_absent():
    base, chat = PAIR.directions
    assert (base[:3] * chat[:3]).sum(-1).tolist() == pytest.approx([math.cos(0.5)] * 3, abs=1e-6)
    assert not base[5:].any() and not chat[3:5].any()
    assert torch.cat([base[:5], chat[:3], chat[5:]]).norm(dim=-1).tolist() == pytest.approx([1.0] * 10)


def test_the_same_tokens_every_time_and_others_for_another_seed():
    assert torch.equal(PAIR.sample(9)[0], PAIR.sample(9)[0])
    assert not torch.equal(PAIR.sample(9)[0], ConceptPair(16, 3, 2, 0.2, 0.5, 0.25, seed=1).sample(9)[0])
    batches = list(PAIR.batches(1000, 512))
    assert [x.shape for x in batches] == [(512, 2, 16)] * 2 and not torch.equal(*batches)


def test_a_crosscoder_that_is_right_is_pure_and_not_spurious():
    pair = orthogonal()
    table = concept_table(exact(pair), pair, 2000)
    assert table.concept.tolist() == [*range(7)] and table.owner.tolist() == pair.owners.tolist()
    assert table["class"].tolist() == pair.owners.tolist()
    assert (table.purity == 1).all() and table.rate.to_numpy() == pytest.approx(np.full(7, 0.2), abs=0.05)
    assert spurious(table) == 0


def test_a_latent_of_two_concepts_is_half_pure_and_a_shrunk_row_is_spurious():
    pair = orthogonal()
    rows = (pair.directions * pair.strength.unsqueeze(-1)).clone()
    rows[:, 5] += rows[:, 6]  # on for both chat-only concepts
    rows[0, 0] = 0  # a shared concept without its row in base
    table = concept_table(exact(pair, rows), pair, 4000)
    assert table.purity[5] == pytest.approx(1 / 1.8, abs=0.05) and table.concept[5] in (5, 6)
    assert spurious(table) == 1
    assert spurious(table.assign(rate=0.0)) == 0


def test_a_row_is_compared_in_the_model_that_it_is_longer_in():
    pair = ConceptPair(d_model=16, shared=3, alone=2, drift=math.pi / 2)
    rows = pair.directions.clone()
    rows[0, 0] = 0.1 * pair.directions[1, 1]
    assert nearest_concepts(exact(pair, rows), pair)[0] == 0


def test_a_latent_that_is_never_on_has_no_purity():
    pair = orthogonal()
    crosscoder = exact(pair)
    crosscoder.b_enc.data[2] = -100
    table = concept_table(crosscoder, pair, 500)
    assert np.isnan(table.purity[2]) and table.rate[2] == 0


def test_training_finds_the_concepts():
    pair = ConceptPair(d_model=16, shared=6, alone=2, rate=0.1)
    crosscoder = pair.train(Crosscoder(16, 20, BatchTopK(1), seed=0), 40_000)
    table = concept_table(crosscoder, pair, 2000)
    live = table[table.rate > 0]
    assert set(live.concept) >= set(range(10)) and spurious(table) == 0
