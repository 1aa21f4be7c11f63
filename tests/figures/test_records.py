"""A record by hand and by a slow twin, windows that are not alike, directions of a decoder by hand."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays

from helpers.figures import records
from helpers.figures.records import directions_of, latent_record

WORDS = np.array([["the", " cat", "\n", " sat"], [" on", " a", " mat", "."], [" <b>", "&", '"', "\t"]])
ACTS = np.array([[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.5, 0.0, 4.0, 0.0]])


def test_a_record_by_hand(monkeypatch):
    monkeypatch.setattr(records, "BINS", 4)
    record = latent_record(7, ACTS, WORDS, context=1)
    assert (record.latent, record.n_tokens, record.density) == (7, 12, 4 / 12)
    assert (record.mean, record.maximum) == (7.5 / 4, 4.0)
    assert record.histogram == (1, 1, 1, 1)  # 0.5 | 1 | 2 | 4: bins are closed below
    assert [window.tokens for window in record.top] == [("&", '"', "\t"), ("the", " cat", "\n")]
    assert record.top[0].activations == (0.0, 4.0, 0.0) and record.top[0].at == 1


@given(
    arrays(float, st.tuples(st.integers(1, 6), st.integers(1, 8)), elements=st.sampled_from([0.0, 0.0, 0.5, 1.0, 3.0]))
)
def test_a_record_equals_loops_over_the_tokens(acts):
    tokens = np.arange(acts.size).reshape(acts.shape)
    record = latent_record(0, acts, tokens, n_top=2, n_random=3, context=2)
    positive = [float(value) for value in acts.ravel() if value > 0]
    assert record.density == pytest.approx(len(positive) / acts.size)
    assert record.mean == pytest.approx(sum(positive) / max(len(positive), 1))
    assert sum(record.histogram) == len(positive)
    firing = [row for row in range(len(acts)) if max(acts[row]) > 0]
    assert len(record.top) == min(2, len(firing)) and len(record.random) == min(3, len(firing))
    peaks = sorted((max(acts[row]) for row in firing), reverse=True)
    assert [window.activations[window.at] for window in record.top] == peaks[:2]
    for window in (*record.top, *record.random):
        first = int(window.tokens[0])
        assert window.activations[window.at] > 0
        assert window.activations == tuple(acts.ravel()[first : first + len(window.tokens)])
        assert len({int(token) // acts.shape[1] for token in window.tokens}) == 1  # never across two windows


def test_random_windows_are_distinct_follow_the_seed_and_ignore_strength():
    acts = np.eye(40)[:, :10] + 0.0
    acts = np.where(np.arange(10) == 3, np.linspace(1, 9, 40)[:, None], 0.0)
    tokens = np.arange(400).reshape(40, 10)
    drawn = [latent_record(1, acts, tokens, n_random=5, seed=seed).random for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({window.tokens for window in drawn[0]}) == 5
    means = [np.mean([w.activations[w.at] for w in latent_record(1, acts, tokens, seed=s).random]) for s in range(40)]
    assert np.mean(means) == pytest.approx(5.0, abs=0.5)  # the mean of all, far from the top's 8.6


def test_ids_are_decoded_only_where_they_are_shown():
    seen = []
    ids = np.arange(12).reshape(3, 4)
    record = latent_record(
        0, ACTS, ids, decode=lambda i: seen.append(i) or f"<{i}>", n_random=0, n_top=1, n_quarter=0, context=1
    )
    assert record.top[0].tokens == ("<9>", "<10>", "<11>") and seen == [9, 10, 11]


@pytest.mark.parametrize(
    ("acts", "tokens", "message"),
    [
        (ACTS, WORDS[:2], r"\(3, 4\) and tokens \(2, 4\) must both be"),
        (ACTS[0], WORDS[0], "must both be"),
        (ACTS[:0], WORDS[:0], "not empty"),
        (np.where(ACTS == 2, np.nan, ACTS), WORDS, "NaN or infinite"),
    ],
)
def test_bad_arrays_are_refused(acts, tokens, message):
    with pytest.raises(ValueError, match=message):
        latent_record(0, acts, tokens)


def test_no_part_shows_nearly_the_same_text_twice():
    script = np.array([list("abcdef"), list("abcdeX"), list("uvwxyz"), list("abcZZf")])
    acts = np.zeros(script.shape)
    acts[:, 3] = 4.0, 3.0, 2.0, 1.0
    record = latent_record(0, acts, script, n_random=4, n_top=4)
    starts = ["".join(window.tokens) for window in record.top]
    assert starts == ["abcdef", "uvwxyz", "abcZZf"]  # 4 of 5 pairs are those of the first; of the last only 2
    assert len(record.random) == 3


def test_each_quarter_shows_activations_of_its_size():
    acts = np.zeros((8, 3))
    acts[:, 1] = [5, 1, 7, 3, 2, 8, 4, 6]
    record = latent_record(0, acts, np.arange(24).reshape(8, 3), n_quarter=2)
    assert [{w.activations[w.at] for w in windows} for windows in record.quarters] == [{1, 2}, {3, 4}, {5, 6}, {7, 8}]


def test_effects_are_cut_with_their_tokens():
    effects = np.arange(12.0).reshape(3, 4)
    (window,) = latent_record(0, ACTS, WORDS, n_top=1, context=1, effects=effects).top
    assert window.effects == (9, 10, 11)
    with pytest.raises(ValueError, match=r"Effects \(2, 4\) must have the shape of the activations, \(3, 4\)"):
        latent_record(0, ACTS, WORDS, effects=effects[:2])


def test_a_density_is_placed_among_all():
    crowd = latent_record(0, ACTS, WORDS, densities=np.array([0.0, 0.01, 0.1, 4 / 12, 0.9])).crowd
    assert crowd.denser_than == 3 / 5 and crowd.lowest == pytest.approx(0.01)
    assert sum(crowd.histogram) == 4 and crowd.histogram[0] == crowd.histogram[crowd.bin] == 1  # the dead has no bin
    silent = latent_record(0, np.zeros((1, 2)), WORDS[:1, :2], densities=np.zeros(3)).crowd
    assert silent.bin is None and sum(silent.histogram) == silent.denser_than == 0


def test_padding_is_no_text():
    record = latent_record(0, ACTS, WORDS, n_tokens=8, densities=np.array([0.25, 0.75]))
    assert (record.n_tokens, record.density, record.crowd.denser_than) == (8, 4 / 8, 1 / 2)


def test_directions_by_hand():
    W_dec = np.array([[2.0, 0.0], [3.0, 4.0], [0.0, 0.0], [-1.0, 0.0]])
    unembedding = np.array([[1.0, -1.0, 0.0], [0.0, 0.0, 5.0]])
    first, second = directions_of(W_dec, unembedding, "xyz".__getitem__, [0, 1], "chat", n=2)
    assert (first.model, first.norm, first.promoted, first.suppressed) == ("chat", 2, ("x", "z"), ("y", "z"))
    assert first.neighbours == ((1, pytest.approx(0.6)), (2, 0))
    assert (second.norm, second.promoted) == (5, ("z", "x"))


@pytest.mark.parametrize("latent", [-1, 4])
def test_a_latent_that_the_dictionary_has_not_is_named(latent):
    with pytest.raises(ValueError, match=f"There is no latent {latent}: the dictionary has 4, 0 to 3"):
        directions_of(np.eye(4), np.eye(4), str, [latent])
