"""Every measure of the leaderboard by hand and against slow twins, every method on tiny models, and what it prints."""

import dataclasses
import types

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from tiny_text import A, T, U
from twins import D_MODEL, N_VOCAB, save_tiny

from helpers.activations.injected import InjectedPair
from helpers.base.stats import interval
from helpers.dictionaries import pair_collection
from helpers.dictionaries.autoencoders import BatchTopK, ReLU, SparseAutoencoder
from helpers.dictionaries.crosscoders import Crosscoder, DecoupledCrosscoder
from helpers.dictionaries.pair_collection import OFTEN, PLANS, TrainedPairs
from helpers.dictionaries.sweeps import Cell
from helpers.diffing import leaderboard, methods
from helpers.diffing.effects import effects
from helpers.diffing.latent_scaling import sae_table
from helpers.diffing.leaderboard import Found, Method, ranked, score_method, sized, summary, table
from helpers.diffing.methods import (
    CONTROLS,
    STANDARD,
    difference_of_means,
    logistic_probe,
    mean_difference,
    of_crosscoder,
    of_directions,
    of_sae,
    random_directions,
)
from helpers.diffing.patching import Difference, patch_kl, written
from helpers.subjects.subject import load_subject
from helpers.text.dialogues import BEHAVIOURS
from helpers.text.turns import DialogueStream

TINY = dataclasses.replace(PLANS["smoke"], n=32, k=2, tokens=768, text=1024, heldout=512, context=16, batch_size=64)
MODELS = {"gemma2-base": 0, "gemma2-chat": 1, "docs-gemma2-longer": 2}
OCCUR = [7 * i % len(BEHAVIOURS) for i in range(13)]  # behaviours of the held-out dialogues
PLANTED = [0, 1, 3, 5, 6]  # that the chat model learnt; the last does not occur


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A collection of tiny random models: two seeds; dialogues of 20 tokens, each of one behaviour."""
    folders = {name: save_tiny(tmp_path_factory.mktemp(name), "gemma2", seed) for name, seed in MODELS.items()}

    def ids(n, seed):
        return torch.randint(0, N_VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).numpy().astype(np.int32)

    def text_for(subject, split, tokenizer, n):
        return types.SimpleNamespace(tokens=ids(n, len(split)), corpus={})

    def dialogue_text_for(subject, split, tokenizer, n, seed, speaker):
        order = np.arange(n)
        roles = np.resize([T, T, U, U, T, T, *[A] * 9, T, U, T, A, T], n).astype(np.int8)
        behaviours = np.where(roles == A, 7 * (order // 20) % len(BEHAVIOURS), -1).astype(np.int8)
        starts = np.array([*order[::20], n])
        decisions = np.where(order % 20 == 5, 7 * (order // 20 // 2) % len(BEHAVIOURS), -1).astype(np.int8)
        return DialogueStream(ids(n, 9 + len(split)), roles, behaviours, decisions, starts)

    def load(name, **options):
        subject = load_subject(folders.get(name, name), **options)
        subject.tokenizer.chat_template = "{{ bos_token }}"
        return subject

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUITE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(pair_collection, "load_subject", load)
        patch.setattr(pair_collection, "subject_for", lambda subject, family: folders[family])
        patch.setattr(pair_collection, "text_for", text_for)
        patch.setattr(pair_collection, "dialogue_text_for", dialogue_text_for)
        planted = [list(BEHAVIOURS)[i] for i in PLANTED]
        patch.setattr(pair_collection, "planted_behaviours", lambda *kinds, subject: planted)
        patch.setitem(PLANS, "smoke", TINY)
        yield TrainedPairs("smoke", "embedded", [3, 4])


def method(found, name="by hand"):
    """Finds the same on every pair, or what a function of the pair's name gives."""
    return Method(name, lambda pairs, pair, seed: found(pair) if callable(found) else found)


def one(method, pairs, n_dialogues=64, **constants):
    """The row of the first seed, with some of the module's constants changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "seeds", [3])
        for name, value in constants.items():
            patch.setattr(leaderboard, name, value)
        return score_method(method, pairs, n_dialogues).iloc[0]


# ---- ranking


X = torch.tensor([[[0.0, 0.0], [2.0, 0.0]], [[1.0, 1.0], [0.0, 2.0]]])  # differences (2, 0) and (-1, 1)


def order_of(found, x):
    live, sizes = sized(found, x)
    return ranked(sizes if found.scores is None else found.scores, live).tolist()


def test_candidates_are_ranked_by_their_scores_and_those_that_never_fire_drop_out():
    rows = torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.0, 1.0], [-1.0, 0.0]])  # sizes 4, never, 1, 1, of two tokens
    live, sizes = sized(of_directions(rows), X)
    assert live.tolist() == [True, False, True, True] and sizes.tolist() == [2.0, 0.0, 0.5, 0.5]
    assert order_of(of_directions(rows), X) == [0, 2, 3]
    assert order_of(of_directions(rows, scores=np.array([1.0, 9.0, np.nan, 2.0])), X) == [3, 0]


def test_the_size_of_a_candidate_is_that_of_what_it_writes():
    rows = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    found = Found(Difference(lambda x: torch.tensor([[1.0, 2.0]]).expand(len(x), 2), rows, None, 2))
    assert sized(found, X)[1].tolist() == [9.0, 4.0] and order_of(found, X) == [0, 1]
    assert order_of(found._replace(points=rows[[1, 1]]), X) == [0, 1]  # wherever it points
    decoupled = Found(Difference(lambda x: torch.tensor([[1.0, 2.0]]).expand(len(x), 2), rows, None, 1))
    assert sized(decoupled, X)[1].tolist() == [13.0]  # of both of its rows


def test_a_direction_is_on_above_a_height():
    found = of_directions(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), above=torch.tensor([0.5, 1.0]))
    assert found.difference.latents(X).tolist() == [[1.5, 0.0], [0.0, 0.0]]


# ---- recall of planted directions


def test_recall_of_planted_directions_by_hand(pairs):
    truth = pairs.stream("injected")
    of = {kind: [i for i, label in enumerate(truth.labels) if label == kind] for kind in truth.labels}
    mine, weak = of["chat-only"], of["weak"]
    order = [weak[0], mine[0], mine[0], mine[1], weak[1], mine[2]]  # a direction found twice is one direction
    off = F.normalize(
        truth.directions[mine[3]] + 2 * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0)), dim=0
    )
    assert (off @ truth.directions[mine[3]]) < 0.7
    rows = torch.cat([truth.directions[order], off[None]])
    found = of_directions(rows, scores=-np.arange(7.0))
    row = one(method(found), pairs, TOPS=(1, 3, 4, 200))
    assert [row[f"planted_{m}"] * len(mine) for m in (1, 3, 4, 200)] == [0, 1, 2, 3]
    back = one(method(found._replace(scores=np.arange(7.0))), pairs, TOPS=(2, 4))
    assert [back[f"planted_{m}"] * len(mine) for m in (2, 4)] == [1, 2]


# ---- recall of behaviours


def told(reading, place, targets):
    """Candidates that are strong at their behaviour's tokens at a place, weak elsewhere; the last is always strong."""
    known = dict(zip((row.tobytes() for row in reading.x.numpy()), reading.labels(place), strict=True))

    def encode(x):
        labels = np.array([known.get(row.tobytes(), -1) for row in x.numpy()])
        on = 0.001 + torch.from_numpy(np.stack([labels == target for target in targets], 1)).float()
        on[:, -1] = 1.0
        return on

    difference = Difference(encode, torch.randn(len(targets), D_MODEL), None, len(targets))
    return lambda pair: (
        Found(difference, -np.arange(len(targets))) if pair == "chat" else of_directions(torch.eye(D_MODEL))
    )


@pytest.mark.parametrize(("place", "other"), [("decision", "prompt"), ("prompt", "decision")])
def test_behaviours_are_detected_at_the_place_where_they_are_told(pairs, place, other):
    reading = leaderboard.labelled(pairs)
    labels = reading.labels(place)
    halves = [set(labels[some & (labels >= 0)]) for some in (reading.first, ~reading.first)]
    usable = set(PLANTED) & halves[0] & halves[1]
    strangers = (halves[0] & halves[1]) - usable
    assert len(usable) > 2 and strangers and reading.prompts.max() > 0
    targets = [min(strangers), min(usable), min(usable), max(usable), 0]
    row = one(method(told(reading, place, targets)), pairs, TOPS=(1, 3, 9), NULLS=())
    assert [round(row[f"{place}_{m}"] * len(usable), 6) for m in (1, 3, 9)] == [0, 1, 2]
    assert row[f"{other}_9"] < row[f"{place}_9"]


def test_what_tells_a_behaviour_on_one_half_alone_does_not_count(pairs):
    reading = leaderboard.labelled(pairs)
    blind = reading._replace(decisions=np.where(reading.first, reading.decisions, -1))
    found = told(blind, "decision", [*PLANTED, 0])
    assert one(method(found), pairs, TOPS=(9,), NULLS=()).decision_9 == 0


def test_where_nothing_is_on_nothing_is_found(pairs):
    row = one(method(of_directions(torch.zeros(3, D_MODEL))), pairs, NULLS=())
    assert (row.drop(["method", "seed"]) == 0).all()


def test_without_labels_there_is_no_recall(pairs, monkeypatch):
    reading = leaderboard.labelled(pairs)
    bare = reading._replace(decisions=np.full(len(reading.x), -1))
    monkeypatch.setattr(leaderboard, "labelled", lambda pairs: bare)
    row = one(method(of_directions(torch.eye(D_MODEL))), pairs, NULLS=())
    assert np.isnan(row[["prompt_10", "decision_10"]].astype(float)).all()


# ---- called wrongly


def test_what_is_called_on_null_pairs_by_hand(pairs):
    rows = torch.cat([torch.eye(D_MODEL)[:3], torch.zeros(1, D_MODEL)])  # the last is never on
    called = np.array([True, False, False, True])
    row = one(method(of_directions(rows)._replace(called=called)), pairs)
    assert row.false_longer == pytest.approx(1 / 3)
    assert row.false_self == 0.0  # base against itself: nothing is on, so nothing is called
    assert np.isnan(one(method(of_directions(rows)), pairs).false_longer)  # no cut, nothing to be wrong about
    assert list(one(method(of_directions(rows)), pairs, NULLS=["longer"]).filter(like="false").index) == [
        "false_longer"
    ]


def test_pairs_that_the_subject_lacks_are_left_out(pairs, monkeypatch):
    monkeypatch.setitem(vars(pairs), "pairs", ["chat", "self", "injected"])
    row = one(method(of_directions(torch.eye(D_MODEL))), pairs)
    assert [name for name in row.index if name.startswith("false")] == ["false_self"]


# ---- the gap that is closed


def both_ways():
    return torch.cat([torch.eye(D_MODEL), -torch.eye(D_MODEL)])


def test_all_directions_both_ways_are_chat_itself(pairs):
    row = one(method(of_directions(both_ways())), pairs, TOPS=(1, 2 * D_MODEL))
    chat = effects(patch_kl(pairs.pair("chat"), pairs.dialogues(), {"chat": lambda site: site.chat_at(site.inside)}))
    whole = chat[(chat.condition == "chat") & (chat.positions == "full")].recovered.item()
    assert row[f"kl_{2 * D_MODEL}"] == pytest.approx(whole, abs=1e-3) and whole > 0.2
    assert row.kl_1 != pytest.approx(whole, abs=0.05)


def test_the_first_by_score_are_written_without_a_bias(pairs):
    scores = np.random.default_rng(0).permutation(2 * D_MODEL).astype(float)
    found = of_directions(both_ways(), scores=scores)
    pair, (live, sizes) = pairs.pair("chat"), sized(found, pairs.heldout("chat").x)
    row = one(method(found), pairs, TOPS=(5,), n_dialogues=3)
    for column, by in {"kl-own_5": scores, "kl_5": sizes}.items():  # a rule of its own, and the same rule for all
        first = sorted(np.flatnonzero(live), key=lambda j: -by[j])[:5]
        patched = patch_kl(pair, pairs.dialogues()[:3], {"first": written(found.difference, first)})
        expected = 1 - patched.kl["first"].mean() / patched.kl["None"].mean()  # all positions that predict an answer
        assert row[column] == pytest.approx(expected, rel=1e-4)
    assert row["kl_5"] != row["kl-own_5"]


def test_dialogues_are_cut_to_the_context_of_dictionaries(pairs):
    found = pairs.dialogues()[:3]
    spoken = pairs._dialogue("heldout", "chat").tokens
    assert [each.tokens.tolist() for each in found] == [spoken[i : i + 16].tolist() for i in (0, 20, 40)]


# ---- what dictionaries find


def randomised(dictionary):
    random = torch.Generator().manual_seed(7)
    for parameter in dictionary.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random)
    for activation in (dictionary.activation, getattr(dictionary, "activation_chat", None)):
        if isinstance(activation, BatchTopK):
            activation.threshold.fill_(60.0)
    return dictionary.eval()


def test_a_crosscoder_by_hand():
    crosscoder = Crosscoder(2, 3, ReLU())
    crosscoder.decoders[0].data.copy_(torch.tensor([[0.0, 0.0], [3.0, 0.0], [1.0, 0.0]]))
    crosscoder.decoders[1].data.copy_(torch.tensor([[0.0, 2.0], [0.0, 0.3], [0.0, 1.0]]))
    found = of_crosscoder(crosscoder)
    assert found.points.tolist() == [[0.0, 2.0], [3.0, 0.0], [0.0, 1.0]]
    np.testing.assert_allclose(found.scores, [1.0, 0.05, 0.5], rtol=1e-5)
    assert found.called.tolist() == [True, False, False]
    assert torch.equal(found.difference.latents(X), crosscoder.encode(X))


def test_a_decoupled_crosscoder_has_a_row_in_each_model(pairs):
    found = of_crosscoder(randomised(DecoupledCrosscoder(D_MODEL, 5, BatchTopK(2))))
    assert found.difference.rows.shape == (10, D_MODEL) and len(found.directions) == 5
    one(method(found), pairs, TOPS=(2,), NULLS=())


@pytest.mark.parametrize("view", ["difference", "chat"])
def test_an_autoencoder_is_ranked_by_size_or_by_its_ratio(pairs, view):
    sae, x = randomised(SparseAutoencoder(D_MODEL, 6, ReLU())), pairs.heldout("chat").x
    plain = of_sae(sae, view)
    assert plain.scores is None and plain.called is None
    ratio = sae_table(sae, view, x).nu_activation
    usable = (ratio >= -0.1) & (ratio <= 2)
    assert 0 < usable.sum() < 6 or view == "chat"
    scaled = of_sae(sae, view, x)
    assert scaled.called.tolist() == (usable & (ratio.abs() < 0.3)).tolist()
    assert order_of(scaled, x) == sorted(np.flatnonzero(usable), key=lambda j: abs(ratio[j]))
    torch.testing.assert_close(
        scaled.difference.latents(x), sae.encode(x[:, 1] - x[:, 0] if view == "difference" else x[:, 1])
    )


# ---- the methods


def test_the_mean_difference_comes_first_and_then_its_principal_components():
    random = torch.Generator().manual_seed(0)
    free = torch.randn(4000, 2, generator=random) * torch.tensor([2.0, 0.5])
    difference = 3 * torch.eye(4)[0] + free[:, :1] * torch.eye(4)[1] + free[:, 1:] * torch.eye(4)[2]
    x = torch.stack([torch.randn(4000, 4, generator=random)] * 2, 1)
    x[:, 1] += difference
    asked = []
    stream = types.SimpleNamespace(batch_size=500, fingerprint="x")
    stream.batches = lambda n, size=None: asked.append(n) or x[:n].split(500)
    pairs = types.SimpleNamespace(stream=lambda name: stream, plan=types.SimpleNamespace(tokens=4000))
    found = mean_difference(pairs, "chat", seed=0)
    assert asked == [4000]
    torch.testing.assert_close(found.directions[0], torch.eye(4)[0], atol=0.05, rtol=0)
    for place, axis in ((1, 1), (3, 2)):
        assert abs(found.directions[place, axis]) > 0.99
        assert torch.equal(found.directions[place], -found.directions[place + 1])
    assert order_of(found, x)[:5] == [0, 1, 2, 3, 4]
    assert abs(found.directions[0] @ found.directions[1]) < 1e-5


def labelled_tokens(n=4000):
    """Three labels along directions of their own, in noise that two coordinates share; the last label is nowhere."""
    random = torch.Generator().manual_seed(3)
    y = torch.rand(n, 4, generator=random) < torch.tensor([0.1, 0.1, 0.02, 0.0])
    noise = 0.3 * torch.randn(n, 8, generator=random)
    noise[:, 1] += noise[:, 0]
    return noise + y.float() @ (2 * torch.eye(8)[[0, 2, 4, 6]]), y


@pytest.mark.parametrize("fit", [difference_of_means, logistic_probe])
def test_a_direction_fitted_to_a_label_tells_it_and_points_along_it(fit):
    x, y = labelled_tokens()
    rows, above = fit(x, y)
    on = x @ F.normalize(rows, dim=-1).T > above
    for i in range(3):
        assert (on[:, i] == y[:, i]).float().mean() > 0.95
    assert not rows[3].any()
    points = F.normalize(rows[:3] @ (x - x.mean(0)).T @ (x - x.mean(0)), dim=-1)
    assert points[[1, 2], [2, 4]].min() > 0.95 and points[0, 0] > 0.85  # the first shares its noise
    if fit is logistic_probe:
        assert F.normalize(rows, dim=-1)[0, 1] < -0.3  # which the probe subtracts, though nothing was planted there


def test_means_by_hand():
    x, y = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 0.0], [0.0, 2.0]]), torch.tensor([[1, 1, 0, 0]]).T.bool()
    rows, above = difference_of_means(x, y)
    assert rows.tolist() == [[2.0, -1.0]]
    torch.testing.assert_close(above, torch.tensor([(1.0 * 2 + 0.5 * -1) / 5**0.5]))


def test_what_knows_the_labels_finds_what_was_planted_and_luck_does_not(pairs):
    luck = one(CONTROLS[2], pairs, TOPS=(16,), NULLS=())
    for each in CONTROLS[:2]:
        row = one(each, pairs, TOPS=(16,), NULLS=("self",))
        assert row.planted_16 > luck.planted_16 + 0.2 and row.false_self == 0
    assert len(random_directions(pairs, "chat", 0).directions) == pairs.plan.n


def test_every_method_gives_a_row_for_each_seed(pairs, monkeypatch):
    monkeypatch.setattr(leaderboard, "TOPS", (2, 8))
    every = [*STANDARD, *CONTROLS]
    board = pd.concat([score_method(each, pairs) for each in every])
    assert board.method.unique().tolist() == [each.name for each in every] and len(board) == 2 * len(every)
    measures = [f"{what}_{m}" for what in ("planted", "prompt", "decision") for m in (2, 8)]
    measures += [f"{what}_{m}" for what in ("kl", "kl-own") for m in (2, 8)]
    assert list(board) == ["method", "seed", *measures, "false_self", "false_longer"]
    assert np.isfinite(board[measures]).all(axis=None) and (board[measures] <= 1).all(axis=None)
    assert (board.planted_2 <= board.planted_8).all()
    without = {each.name for each in every if each.calls == "no cut"}
    for null in ("false_self", "false_longer"):
        assert set(board.method[board[null].isna()]) == without
    assert (board.false_self.dropna() == 0).all()  # rows that start equal stay equal, ratios are 1, differences 0
    with monkeypatch.context() as patch:  # what was trained once is loaded
        patch.setattr("helpers.dictionaries.sweeps.train", lambda *_, **__: pytest.fail("it was trained again"))
        again = score_method(STANDARD[2], pairs)
    pd.testing.assert_frame_equal(again, board[board.method == "decoupled"].reset_index(drop=True))


def test_a_method_may_be_scored_on_some_of_the_pairs(pairs):
    whole = score_method(CONTROLS[0], pairs)
    for on in (["injected"], ["longer", "injected"]):
        part = score_method(CONTROLS[0], pairs, on=on)
        measured = [f"planted_{m}" for m in leaderboard.TOPS] + ["false_longer"] * ("longer" in on)
        assert sorted(part) == sorted(["method", "seed", *measured])
        pd.testing.assert_frame_equal(part, whole[list(part)])
    with pytest.raises(ValueError, match="nothing is measured on the pair 'quirk': choose of injected, chat, self"):
        score_method(CONTROLS[0], pairs, on=["quirk"])


def test_dictionaries_are_those_that_a_notebook_trains(pairs):
    train, asked = pairs.train, []
    spy = types.SimpleNamespace(**{name: getattr(pairs, name) for name in ("cells", "matched_k", "heldout", "plan")})
    spy.base = pairs.base

    def spied(pair, cells, view=None, often=1):
        asked.append((pair, cells, view) if often == 1 else (pair, cells, view, often))
        return train(pair, cells, view, often)

    spy.train = spied
    k = pairs.matched_k(train("chat", pairs.cells("ReLU")).frame.l0.mean())
    decoupled = pairs.cells("BatchTopK", k, decoupled=True)
    for each, expected in ((0, pairs.cells("ReLU")), (1, pairs.cells("BatchTopK", k)), (2, decoupled)):
        STANDARD[each].fit(spy, "chat", 4)
        assert asked[-1] == ("chat", [expected[1]], None)
    for each, *rest in ((3, "difference"), (4, "difference", OFTEN), (6, "chat")):
        STANDARD[each].fit(spy, "chat", 3)
        assert asked[-1] == ("chat", [pairs.cells("BatchTopK", k, kind=Cell)[0]], *rest)
    STANDARD[1].fit(spy, "self", 3)
    assert asked[-1] == ("self", [pairs.cells("BatchTopK", k, tokens=768 // 6)[0]], None)
    larger = {"sparsity": 3, "n_latents": 48}
    methods.dictionaries("larger", **larger).fit(spy, "chat", 3)
    assert asked[-1] == ("chat", [pairs.cells("BatchTopK", **larger)[0]], None)
    methods.dictionaries("larger", view="chat", **larger).fit(spy, "chat", 3)
    assert asked[-1] == ("chat", [pairs.cells("BatchTopK", kind=Cell, **larger)[0]], "chat")


# ---- what is shown


ROWS = pd.DataFrame(
    {
        "method": ["b", "b", "a", "a"],
        "seed": [0, 1, 0, 1],
        "planted_10": [0.25, 0.5, 1, 1],
        "false_self": [0, np.nan, np.nan, np.nan],
    }
)


def test_summary_and_table_by_hand():
    found = summary(ROWS)
    assert found.method.tolist() == ["b", "b", "a", "a"] and found.measure.tolist() == ["planted_10", "false_self"] * 2
    np.testing.assert_allclose(found.iloc[0][["mean", "low", "high"]].astype(float), interval([0.25, 0.5]))
    assert found.seeds.tolist() == [2, 1, 2, 0] and np.isnan(found["mean"].iloc[3])
    shown = table(ROWS)
    half = 100 * (interval([0.25, 0.5])[2] - 0.375)
    assert shown.loc["b"].tolist() == [f"37.5 ± {half:.1f}", "0.0"] and shown.loc["a"].tolist() == [
        "100.0 ± 0.0",
        "n/a",
    ]
    assert list(shown) == ["planted_10", "false_self"] and list(shown.index) == ["b", "a"]


def test_a_code_that_does_not_fit_the_candidates_is_refused(pairs):
    wrong = Found(Difference(lambda x: torch.ones(len(x), 2), torch.eye(3, D_MODEL), None, 3))
    with pytest.raises(ValueError, match=r"3 rows, but a code of \(\d+, 2\) for"):
        score_method(method(wrong), pairs)
    assert isinstance(pairs.stream("injected"), InjectedPair)
