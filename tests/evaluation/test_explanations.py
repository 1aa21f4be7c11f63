"""N2G on latents whose pattern is known, beside the released walk and beside loops; its scores by hand."""

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from twins import BOS, CONTEXT, N_VOCAB, Twin, save_tiny

from helpers.activations.stream import normalise
from helpers.dictionaries.autoencoders import SparseAutoencoder, TopK
from helpers.evaluation import explanations
from helpers.evaluation.explanations import (
    Example,
    examples_of,
    explain,
    explanation_scores,
    firings,
    last_activations,
    minimal_suffixes,
    predictions,
    site_activations,
)
from helpers.evaluation.trie import ANY, START, Trie
from helpers.subjects.subject import Subject, load_subject

PAD, A, B, C, D = 0, 1, 2, 3, 4


def follows(*pattern):
    """The measure of planted latents: 1 where a text ends with the pattern."""

    def measure(texts, latents):
        ends = [t[-len(pattern) :] for t in texts]
        fits = [len(end) == len(pattern) and all(np.isin(pattern, ANY) | (end == pattern)) for end in ends]
        return np.array(fits, np.float32)

    return measure


def example(*tokens, latent=0, activation=1.0):
    return Example(latent, np.array(tokens), activation)


def walk(patterns, tokens):
    """The released walk, along nested dicts."""
    root = {}
    for pattern, value in patterns:
        node = root
        for key in reversed(pattern):
            node = node.setdefault(key, {})
        node["value"] = value
    return [_walk_back(root, tokens[: i + 1]) for i in range(len(tokens))]


def _walk_back(node, tokens):
    for token in reversed(tokens):
        if token not in node and ANY not in node:
            return 0
        node = node[token] if token in node else node[ANY]
        if "value" in node:
            return node["value"]
    return node.get(START, {}).get("value", 0)


KEYS = st.lists(st.sampled_from([ANY, A, B, C]), min_size=1, max_size=4)
PATTERNS = st.lists(st.tuples(KEYS, st.booleans()), max_size=6)
ROWS = st.lists(st.lists(st.integers(1, 4), min_size=5, max_size=5), min_size=1, max_size=4)


@given(PATTERNS, ROWS)
def test_the_trie_predicts_what_the_released_walk_does(keys, rows):
    patterns = [([START] * start + pattern, 1.0 + i) for i, (pattern, start) in enumerate(keys)]
    assert Trie(patterns).predict(np.array(rows)).tolist() == [walk(patterns, row) for row in rows]


def test_patterns_come_back_in_reading_order_and_the_last_value_stays():
    trie = Trie([([A, ANY, C], 1.0), ([START, C], 2.0), ([A, ANY, C], 3.0)])
    assert sorted(trie.patterns()) == [((START, C), 2.0), ((A, ANY, C), 3.0)] and trie.n_patterns == 2


def test_a_whole_row_with_its_start_is_a_pattern():
    trie = Trie([([START, A, ANY], 1.0), ([START, ANY], 2.0)])
    assert trie.predict(np.array([[A, B], [B, B]])).tolist() == [[2, 1], [2, 0]]


def test_the_walk_does_not_turn_back():
    """The miss that the released tests note: A∗C and AC are known, and ABBC needs a second wildcard."""
    trie = Trie([([A, C], 1.0), ([A, ANY, C], 1.0)])
    assert trie.predict(np.array([[A, B, C, A, C]])).tolist() == [[0, 0, 1, 0, 1]]
    assert trie.predict(np.array([[A, B, B, C]])).tolist() == [[0, 0, 0, 0]]
    hidden = Trie([([D, B, C], 1.0), ([A, ANY, C], 1.0)])  # B is taken, and A is not looked for behind it
    assert hidden.predict(np.array([[A, B, C]])).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
    "pattern, value, says",
    [
        ([], 1.0, "token ids or ANY"),
        ([START], 1.0, "token ids"),
        ([A, START, B], 1.0, "START"),
        ([A], 0.0, "above zero"),
    ],
)
def test_what_is_no_pattern_is_refused(pattern, value, says):
    with pytest.raises(ValueError, match=says):
        Trie().insert(pattern, value)


def test_rows_must_be_a_table():
    with pytest.raises(ValueError, match="rows, tokens"):
        Trie().predict(np.array([A, B]))


def explained(measure, *examples, longest=16):
    return explain(measure, examples, PAD, longest)


def test_a_latent_that_is_one_token():
    found = explained(follows(C), example(A, B, C), example(B, C))
    assert found.tries[0].patterns() == [((C,), 1.0)]
    assert found.examples.to_dict("list") == {
        **{"latent": [0, 0], "length": [1, 1], "enough": [True, True], "start": [False, False], "any": [0.0, 0.0]}
    }
    rows = np.random.default_rng(0).integers(1, 5, (20, 10))
    studied = np.broadcast_to(np.arange(10) > 0, rows.shape)
    codes = scipy.sparse.csc_array(((rows == C) & studied).reshape(-1, 1).astype(np.float32))
    row = explanation_scores(predictions(found.tries, rows, studied, 1), codes, [0]).iloc[0]
    assert (row.precision, row.recall, row.f1) == (1, 1, 1)


def test_a_latent_of_the_first_position():
    def first(texts, latents):
        return np.array([len(text) == 1 for text in texts], np.float32)

    trie = explained(first, example(A), example(B)).tries[0]
    assert trie.predict(np.array([[A, B, C], [C, B, A]])).tolist() == [[1, 0, 0], [1, 0, 0]]
    assert trie.patterns() == [((START, ANY), 1.0)] or {p for p, _ in trie.patterns()} == {(START, A), (START, B)}


def test_what_lies_between_becomes_a_wildcard():
    found = explained(follows(A, ANY, C), example(D, A, B, C))
    assert found.tries[0].patterns() == [((A, ANY, C), 1.0)]
    assert found.examples["any"].tolist() == pytest.approx([1 / 3])


def test_half_is_the_limit():
    """A or D alone: 0.5. After B: 1, after padding in its place: exactly half of that, or a little more for D."""

    def of(text):
        alone, after_pad = {A: 0.5, D: 0.5, PAD: 0}, {A: 0.5, D: 0.51, PAD: 0}
        return alone[text[-1]] if len(text) == 1 else float(text[-1] != PAD) if text[-2] == B else after_pad[text[-1]]

    def graded(texts, latents):
        return np.array([of(text) for text in texts])

    assert explained(graded, example(B, A)).tries[0].patterns() == [((A,), 0.5)]
    assert explained(graded, example(B, A, activation=1.01)).tries[0].patterns() == [((B, A), 1.0)]
    assert explained(graded, example(B, D, activation=1.01)).tries[0].patterns() == [((ANY, D), 1.0)]


@given(
    st.lists(st.lists(st.floats(0, 1, width=16), min_size=1, max_size=12), min_size=1, max_size=5), st.integers(1, 12)
)
def test_suffixes_equal_growing_them_one_token_at_a_time(curves, longest):
    """Latent i has activation curves[i][length - 1] on any text of that length; it need not grow."""

    def measure(texts, latents):
        return np.array([curves[i][len(t) - 1] for i, t in zip(latents, texts, strict=True)])

    given_ = [Example(i, np.arange(len(curve)), 1.0) for i, curve in enumerate(curves)]
    for suffix, curve, whole in zip(minimal_suffixes(measure, given_, longest), curves, given_, strict=True):
        lengths = [n for n in range(1, min(longest, len(curve)) + 1) if curve[n - 1] >= 0.5]
        length = lengths[0] if lengths else min(longest, len(curve))
        assert suffix.tokens.tolist() == whole.tokens[-length:].tolist() and suffix.enough == bool(lengths)
        assert suffix.activation == (curve[length - 1] if lengths else 1.0)


def test_a_pattern_longer_than_allowed_keeps_its_tokens_and_is_marked():
    found = explained(follows(A, B, C, D), example(A, B, C, D), longest=2)
    assert found.tries[0].patterns() == [((C, D), 1.0)]
    assert found.examples.iloc[0].tolist() == [0, 2, False, False, 0]


def test_nothing_to_explain():
    with pytest.raises(ValueError, match="at least one example"):
        explain(follows(A), [], PAD)


def test_latents_are_explained_apart_in_one_go():
    def by_latent(texts, latents):
        return np.array([t[-1] == (A, B)[j] for t, j in zip(texts, latents, strict=True)], np.float32)

    found = explained(by_latent, example(C, A, latent=0), example(C, B, latent=1))
    assert {latent: trie.patterns() for latent, trie in found.tries.items()} == {0: [((A,), 1.0)], 1: [((B,), 1.0)]}


def explain_slowly(f, examples, longest):
    """The released steps, a text at a time."""
    patterns = []
    for _, tokens, activation in examples:
        lengths = range(1, min(longest, len(tokens)) + 1)
        length = next((n for n in lengths if f(tokens[-n:]) >= activation / 2), None)
        suffix = tokens[-(length or longest) :].tolist()
        whole = f(np.array(suffix)) if length else activation
        start = length is not None and f(np.array([PAD, *suffix])) < activation / 2
        without = [f(np.array([*suffix[:i], PAD, *suffix[i + 1 :]])) for i in range(len(suffix))]
        pattern = [ANY if 1 - left / whole < 0.5 else token for token, left in zip(suffix, without, strict=True)]
        patterns.append(([START] * start + pattern, whole))
    return dict(Trie(patterns).patterns())


@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=7), min_size=1, max_size=8), st.integers(1, 8))
def test_explanations_equal_the_released_steps_on_a_latent_without_sense(texts, longest):
    def f(text):
        return 0.1 + np.random.default_rng(text.tolist()).random()

    examples = [example(*text, activation=1.5) for text in texts]
    found = explain(lambda some, _: np.array([f(text) for text in some]), examples, PAD, longest)
    assert dict(found.tries[0].patterns()) == explain_slowly(f, examples, longest)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Subject, SparseAutoencoder, torch.Tensor, Twin]:
    folder = save_tiny(tmp_path_factory.mktemp("tiny"), "gpt2")
    subject = load_subject(folder)
    sae = SparseAutoencoder(subject.d_model, 40, TopK(5)).requires_grad_(False)
    rows = torch.randint(N_VOCAB, (6, CONTEXT), generator=torch.Generator().manual_seed(0))
    return subject, sae, rows, Twin(folder, subject.layer)


def slow_code(sae, twin, text):
    """All latents on the last token of one text: (n_latents,)."""
    pre_acts = sae.pre_acts(normalise(twin.residuals(torch.as_tensor(text)[None])[0, -1])[0])
    kept = sorted(range(40), key=lambda j: -pre_acts[j])[:5]
    return np.array([max(pre_acts[j].item(), 0.0) if j in kept else 0.0 for j in range(40)])


@pytest.mark.parametrize("tokens_a_pass", [4096, 7])
def test_many_texts_at_once_are_each_read_alone(tiny, tokens_a_pass, monkeypatch):
    monkeypatch.setattr(explanations, "TOKENS_A_PASS", tokens_a_pass)
    subject, sae, rows, twin = tiny
    texts = [row[a:b].numpy() for row in rows for a, b in [(0, 3), (2, 5), (1, 9)]] + [rows[0, :3].numpy()]
    slow = [slow_code(sae, twin, text) for text in texts]
    latents = np.array([code.argmax() if i % 2 else code.argmin() for i, code in enumerate(slow)])
    expected = [code[latent] for code, latent in zip(slow, latents, strict=True)]
    np.testing.assert_allclose(last_activations(subject, sae, texts, latents), expected, atol=1e-5)


def test_firings_are_the_code_of_every_token_that_is_studied(tiny):
    subject, sae, rows, _ = tiny
    rows = rows.clone()
    rows[2, 5] = BOS
    codes = firings(sae, site_activations(subject, rows), subject.studied(rows))
    expected = sae.encode(normalise(subject.residuals(rows))[0].flatten(0, 1)).view(6, CONTEXT, 40)
    assert (expected[:, 0] > 0).any() and (expected[2, 5] > 0).any()  # which would show
    expected[:, 0] = expected[2, 5] = 0
    np.testing.assert_allclose(codes.toarray(), expected.flatten(0, 1), atol=1e-5)


def test_examples_are_random_activations_of_their_latent(tiny):
    subject, sae, rows, _ = tiny
    codes, ids = firings(sae, site_activations(subject, rows), subject.studied(rows)), rows.numpy()
    live = np.flatnonzero(np.diff(codes.indptr) > 4)
    found = examples_of(codes, ids, live, n=4, seed=1)
    assert [e.latent for e in found] == [latent for latent in live for _ in range(4)]
    places = {}
    for e in found:
        at = [
            r * CONTEXT + len(e.tokens) - 1 for r in range(6) if ids[r, : len(e.tokens)].tolist() == e.tokens.tolist()
        ]
        assert codes[at[0], e.latent] == pytest.approx(e.activation)
        places.setdefault(e.latent, set()).add(at[0])
    assert all(len(some) == 4 for some in places.values())  # no activation twice
    alone = examples_of(codes, ids, live[1:2], n=4, seed=1)
    assert [e.tokens.tolist() for e in alone] == [e.tokens.tolist() for e in found[4:8]]
    other = examples_of(codes, ids, live, n=4, seed=2)
    assert [e.tokens.tolist() for e in other] != [e.tokens.tolist() for e in found]


def test_latents_that_fire_alike_have_examples_of_their_own():
    found = examples_of(scipy.sparse.csc_array(np.ones((40, 2))), np.arange(40).reshape(20, 2), [0, 1], n=5)
    assert {e.tokens[-1] for e in found[:5]} != {e.tokens[-1] for e in found[5:]}


def test_fewer_activations_than_asked_for_are_all_taken_and_none_is_an_error():
    codes = scipy.sparse.csc_array(np.array([[0, 0], [0, 2], [0, 0], [0, 3.0]]))
    found = examples_of(codes, np.array([[A, B], [C, D]]), [1], n=16)
    assert sorted((e.tokens.tolist(), e.activation) for e in found) == [([A, B], 2.0), ([C, D], 3.0)]
    with pytest.raises(ValueError, match=r"latents \[0\] never fire on these 2 rows"):
        examples_of(codes, np.array([[A, B], [C, D]]), [0, 1])


def test_predictions_leave_the_first_token_out():
    studied = np.array([[False, True, True], [False, True, True]])
    found = predictions({2: Trie([([C], 5.0)]), 0: Trie([([A], 1.0)])}, np.array([[C, C, A], [A, B, C]]), studied, 4)
    assert found.toarray().tolist() == [[0] * 4, [0, 0, 5, 0], [1, 0, 0, 0], [0] * 4, [0] * 4, [0, 0, 5, 0]]


def test_scores_by_hand():
    predicted = scipy.sparse.csc_array(np.array([[1, 0, 0, 0], [2, 1, 0, 0], [3, 0, 0, 0], [0, 0, 0, 0.0]]))
    codes = scipy.sparse.csc_array(np.array([[5, 0, 1, 0], [0, 1, 0, 0], [5, 0, 0, 0], [5, 0, 0, 0.0]]))
    table = explanation_scores(predicted, codes, [0, 1, 2, 3])
    assert table[["active", "fired", "hits"]].to_numpy().tolist() == [[3, 3, 2], [1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert table.density.tolist() == [0.75, 0.25, 0.25, 0]
    np.testing.assert_allclose(table[["precision", "recall", "f1"]].iloc[:2], [[2 / 3] * 3, [1, 1, 1]])
    np.testing.assert_allclose(table[["precision", "recall", "f1"]].iloc[2:], [[np.nan, 0, 0], [np.nan] * 3])
    assert explanation_scores(predicted, codes, [1]).latent.tolist() == [1]
