"""Reading latents against labels: hand-sized scores, slow twins, and a best of many that luck does not flatter."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from twins import N_VOCAB, save_tiny

from helpers.dictionaries.pair_collection import Heldout
from helpers.diffing.reading import (
    MEAN,
    PROBE,
    along,
    behaviour_rows,
    behaviour_table,
    ceilings,
    latent_rows,
    linear_probes,
    mean_differences,
    read_dialogues,
    side_by_side,
    sparse_codes,
    template_shares,
)
from helpers.subjects.pair import SubjectPair
from helpers.subjects.subject import load_subject
from helpers.text.turns import Encoded

CODES = np.array([[3.0, 0.0, 0.0], [1.0, 0.0, 0.0], [2.0, 5.0, 0.0], [0.0, 0.0, 0.0]])
LABELS = np.array([0, 0, 1, -1])


def some_codes(seed, n=40, m=6):
    """Codes with ties and silent latents, and labels of which one never occurs."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 4, (n, m)) * (random.random((n, m)) < 0.4) * (np.arange(m) < m - 1)
    return codes.astype(np.float32), random.integers(-1, 3, n), 4


# ---- scores


# ---- template shares


def test_template_shares_by_hand():
    template = np.array([True, False, True, False])
    found = template_shares(scipy.sparse.csr_array(CODES), template)
    np.testing.assert_allclose(found, [2 / 3, 1, np.nan])


def test_what_fires_everywhere_has_the_share_of_the_tokens():
    template = np.random.default_rng(0).random(100) < 0.3
    found = template_shares(scipy.sparse.csr_array(np.full((100, 2), 0.5)), template)
    np.testing.assert_allclose(found, template.mean())


# ---- the best latent


# ---- labels as detectors


# ---- directions


def test_mean_differences_by_hand():
    x = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 6.0], [9.0, 9.0]])
    found = mean_differences(x, np.array([0, 0, 1, -1]), 3)
    assert found.tolist() == [[3, -6], [-3, 6], [0, 0]]


def test_a_probe_finds_a_direction_that_noise_hides():
    random = torch.Generator().manual_seed(0)
    labels = np.arange(2000) % 3 - 1
    x = torch.randn(2000, 8, generator=random) * torch.tensor([20.0, *[1.0] * 7])
    x[:, 1] += 2 * torch.from_numpy(labels == 0)
    x[:, 0] += 10 * x[:, 1]  # what the mean differs by is mostly noise
    first = np.arange(2000) < 1000
    scores = {}
    for name, fit in {"probe": linear_probes, "mean": mean_differences}.items():
        codes = along(x, fit(x[first], labels[first], 2))
        scores[name] = behaviour_table(codes, labels, first, ["a", "b"], np.eye(2, dtype=bool)).auroc[0]
    assert scores["probe"] > 0.9 > 0.75 > scores["mean"]
    assert linear_probes(x, np.full(2000, -1), 2).abs().max() == 0


def test_directions_keep_their_order():
    x, directions = torch.tensor([[1.0], [-2.0], [0.5]]), torch.tensor([[1.0], [-1.0]])
    np.testing.assert_allclose(along(x, directions).toarray(), [[3, 0], [0, 3], [2.5, 0.5]])


# ---- dialogues


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    both = [load_subject(save_tiny(tmp_path_factory.mktemp(f"model-{seed}"), "gemma2", seed)) for seed in (0, 1)]
    both[1].tokenizer.chat_template = "{{ bos_token }}"
    return SubjectPair(*both)


def some_dialogues():
    """Of several lengths, with two turns in the longest."""
    random = np.random.default_rng(0)
    made = []
    for i, roles in enumerate(([0, 0, 1, 0, 2, 2, 0], [0, 0, 1, 1, 0, 2, 0, 1, 0, 2, 2, 0], [0, 1, 0, 2, 0])):
        roles = np.array(roles, np.int8)
        behaviours = np.where(roles == 2, i, -1).astype(np.int8)
        decisions = np.where((roles == 0) & (np.r_[roles[1:], 0] == 2), i, -1).astype(np.int8)
        made.append(Encoded(random.integers(0, N_VOCAB, len(roles)).astype(np.int32), roles, behaviours, decisions))
    return made


def test_dialogues_are_read_alone_and_their_labels_align(pair):
    made = some_dialogues()
    found = read_dialogues(pair, made, batch=2)
    for i, dialogue in enumerate(made):
        inside = found.dialogue == i
        alone = pair.residuals(torch.from_numpy(dialogue.tokens.astype(np.int64))[None])[0, 1:].unflatten(-1, (2, -1))
        torch.testing.assert_close(found.x[inside], alone, rtol=1e-4, atol=1e-4)
        assert found.tokens[inside].tolist() == dialogue.tokens[1:].tolist()
        assert found.template[inside].tolist() == (dialogue.roles[1:] == 0).tolist()
        assert found.labels("answer")[inside].tolist() == dialogue.behaviours[1:].tolist()
        assert found.labels("decision")[inside].tolist() == dialogue.decisions[1:].tolist()
    assert np.unique(found.dialogue[found.first]).tolist() == [0, 2]
    with pytest.raises(ValueError, match="labelled at the prompt and the decision and the answer, not at 'greeting'"):
        found.labels("greeting")


def test_dialogues_stand_side_by_side(pair):
    found = read_dialogues(pair, some_dialogues())
    values, tokens = side_by_side(np.arange(len(found.tokens)), found, n=2)
    assert values.tolist() == [[0, 1, 2, 3, 4, 5, 0, 0, 0, 0, 0], list(range(6, 17))]
    assert tokens[0].tolist() == [*found.tokens[:6], *[-1] * 5] and tokens[1].tolist() == found.tokens[6:17].tolist()


def test_codes_are_those_of_one_pass():
    x = torch.randn(11, 2, 4, generator=torch.Generator().manual_seed(0))
    found = sparse_codes(lambda part: part.flatten(1).relu(), x, batch=4)
    np.testing.assert_array_equal(found.toarray(), x.flatten(1).relu().numpy())
    assert isinstance(Heldout(x, *[np.arange(11)] * 5).first, np.ndarray)


# ---- tables of a notebook


def labelled(n=48, seed=0):
    random = np.random.default_rng(seed)
    dialogue = np.repeat(np.arange(n // 3), 3)
    decisions = np.where(np.arange(n) % 3 == 0, random.integers(0, 2, n), -1)
    behaviours = np.where(np.arange(n) % 3 == 1, np.roll(decisions, 1), -1)
    x = torch.from_numpy(random.normal(size=(n, 2, 5))).float()
    x[decisions == 1, 1, 0] += 8
    return Heldout(x, np.arange(n), np.where(np.arange(n) % 3 == 0, 0, 2), behaviours, decisions, dialogue)


def test_both_places_of_labels_stand_in_one_table():
    reading = labelled()
    code = sparse_codes(lambda part: part[:, 1].relu(), reading.x)
    found = behaviour_rows(code, reading, ["a", "b"])
    for place in ("decision", "answer"):
        alone = behaviour_table(code, reading.labels(place), reading.first, ["a", "b"])
        pd.testing.assert_frame_equal(found[found.place == place].drop(columns="place"), alone)


def test_ceilings_know_the_labels_of_the_half_that_chooses_alone():
    reading = labelled()
    found, directions = ceilings(reading, ["a", "b"])
    assert set(found.method) == {MEAN, PROBE} and directions[MEAN, "decision"].shape == (2, 5)
    assert found.query("place == 'decision' and behaviour == 'b'").auroc.min() > 0.9
    hidden = reading._replace(decisions=np.where(reading.first, reading.decisions, -1))
    torch.testing.assert_close(ceilings(hidden, ["a", "b"])[1][PROBE, "decision"], directions[PROBE, "decision"])


def test_rows_of_live_latents_by_hand():
    reading = labelled()
    values = np.zeros((48, 16), np.float32)
    values[:, 0], values[reading.roles == 0, 1], values[:3, 2] = 1.0, 1.0, 1.0  # always, on the template, too seldom
    table = pd.DataFrame({"rate": [1.0, 0.5, 0.1] + [0.0] * 13, "delta": [0.6, 0.9, 1.0] + [0.5] * 13})
    found = latent_rows(table, scipy.sparse.csr_array(values), reading).set_index("latent")
    assert found.index.tolist() == [1, 0]  # by delta
    assert found.template.tolist() == pytest.approx([1.0, 1 / 3]) and found.share.tolist() == pytest.approx([1 / 3, 1])
    assert found.leaning.tolist() == [True, False]  # a sixteenth of 16 latents is one
    assert found.detected[1] == 1.0
