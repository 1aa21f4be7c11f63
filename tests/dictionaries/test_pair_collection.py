"""The pairs of notebooks 09 and 10: what each is made of, labels that line up, crosscoders trained once."""

import dataclasses
import types

import numpy as np
import pytest
import torch
from twins import BOS, D_MODEL, N_VOCAB, save_tiny

from helpers.activations.injected import InjectedPair
from helpers.activations.views import ViewedStream
from helpers.dictionaries import pair_collection, sweeps
from helpers.dictionaries.pair_collection import PAIRS, PLANS, Heldout, TrainedPairs
from helpers.dictionaries.sweeps import Cell
from helpers.subjects.subject import load_subject
from helpers.text.turns import decisive

TINY = dataclasses.replace(PLANS["smoke"], n=16, k=2, tokens=512, text=1024, heldout=256, context=8, batch_size=64)
MODELS = {"gemma2-base": ("gemma2", 0), "gemma2-chat": ("gemma2", 1), "gpt2": ("gpt2", 0)}


def save_models(make_folder, **options):
    kinds = MODELS | {"longer": ("gemma2", 2), "quirk": ("gemma2", 3)}
    return {name: save_tiny(make_folder(name), *kind, **options) for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp)


@pytest.fixture
def with_heads(folders, tmp_path_factory):
    """The same models, with a tokenizer that puts <bos> before every text."""
    plain = dict(folders)
    folders |= save_models(tmp_path_factory.mktemp, bos_first=True)
    yield
    folders |= plain


@pytest.fixture
def open_shelf(folders, monkeypatch, tmp_path):
    """Returns a function that opens the collection of tiny random models, which read arbitrary tokens."""

    def ids(n, seed):
        found = torch.randint(0, N_VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).numpy()
        found[5::40] = BOS
        return found

    def text_for(subject, split, tokenizer, n_tokens):
        return types.SimpleNamespace(tokens=ids(n_tokens, len(split)), corpus={})

    def dialogue_text_for(subject, split, tokenizer, n_tokens, seed, speaker):
        order = np.arange(n_tokens)
        roles, behaviours, decisions = order % 3, order % 5 - 1, order % 7 - 1
        tokens = ids(n_tokens, 10 + len(split) + 100 * (speaker == "quirk"))
        return types.SimpleNamespace(tokens=tokens, roles=roles, behaviours=behaviours, decisions=decisions)

    def load(name, **options):
        subject = load_subject(name, **options)
        subject.tokenizer.chat_template = "{{ bos_token }}"
        return subject

    monkeypatch.setenv("SUITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pair_collection, "load_subject", load)
    monkeypatch.setattr(pair_collection, "subject_for", lambda subject, family="gpt2": folders[family])
    for name in pair_collection.TRAINED_ON:
        monkeypatch.setitem(pair_collection.TRAINED_ON, name, folders[name])
    monkeypatch.setattr(pair_collection, "text_for", text_for)
    monkeypatch.setattr(pair_collection, "dialogue_text_for", dialogue_text_for)
    monkeypatch.setattr(pair_collection, "SCALE_ROWS", 4)
    monkeypatch.setitem(PLANS, "smoke", TINY)
    return lambda subject="embedded", plan="smoke", seeds=3: TrainedPairs(plan, subject, range(3, 3 + seeds))


def test_both_models_read_the_same_tokens_half_text_half_dialogue(open_shelf, folders):
    shelf = open_shelf()
    found = shelf.heldout("chat")
    rows = shelf._rows("heldout")
    kept = shelf.base.studied(rows)
    assert rows.shape == (32, 8) and found.x.shape == (kept.sum(), 2, D_MODEL) and kept.sum() < 32 * 7
    for model, name in enumerate(("gemma2-base", "gemma2-chat")):
        expected = load_subject(folders[name]).residuals(rows)[kept]
        torch.testing.assert_close(found.x[:, model], expected, rtol=1e-3, atol=1e-3)
    assert found.tokens.tolist() == rows[kept].tolist()


def check_labels(shelf, rows_each, place):
    """`place` (rows_each, context): which token of the dialogues stands there."""
    found, rows = shelf.heldout("chat"), shelf._rows("heldout")
    kept = shelf.base.studied(rows)
    half, place = kept[:rows_each].sum(), place[kept[rows_each:].numpy()]
    assert len(rows) == 2 * rows_each and len(found.tokens) == half + len(place)
    for array, expected in ((found.roles, place % 3), (found.behaviours, place % 5 - 1)):
        assert (array[:half] == -1).all() and array[half:].tolist() == expected.tolist()
    assert found.decisions[half:].tolist() == (place % 7 - 1).tolist()
    return rows


def test_labels_stand_at_their_tokens(open_shelf):
    check_labels(open_shelf(), 16, np.arange(128).reshape(16, 8))


def test_labels_stand_at_their_tokens_behind_heads(open_shelf, with_heads):
    rows = check_labels(open_shelf(), 18, np.pad(np.arange(126).reshape(18, 7), ((0, 0), (1, 0))))
    assert (rows[:, 0] == BOS).all()
    batch = next(open_shelf().stream("chat").batches(64))
    assert len(batch) == 64 and batch.shape[1] == 2 * D_MODEL


def test_what_the_null_pairs_are(open_shelf, folders):
    shelf = open_shelf()
    x = shelf.heldout("self").x
    assert torch.equal(x[:, 0], x[:, 1]) and torch.equal(x[:, 0], shelf.heldout("chat").x[:, 0])
    rows = shelf._rows("heldout")
    longer = load_subject(folders["longer"]).residuals(rows)[shelf.base.studied(rows)]
    torch.testing.assert_close(shelf.heldout("longer").x[:, 1], longer, rtol=1e-3, atol=1e-3)


def test_scaled_has_equal_norms(open_shelf):
    shelf = open_shelf()
    ratio = shelf.heldout("chat").x / shelf.heldout("scaled").x
    expected = torch.tensor(shelf.pair("scaled").scales)[:, None].expand_as(ratio)
    norms = shelf.pair("scaled").residuals(shelf._rows("train"))[:, 1:].unflatten(-1, (2, -1)).norm(dim=-1)
    torch.testing.assert_close(norms.mean((0, 1)), torch.full((2,), D_MODEL**0.5), rtol=0.1, atol=0)
    torch.testing.assert_close(ratio, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["injected", "injected-gpt2"])
def test_injected_pairs_know_what_was_planted(open_shelf, name):
    shelf = open_shelf()
    pair, x, truth = shelf.stream(name), shelf.heldout(name).x, shelf.truth(name)
    assert isinstance(pair, InjectedPair) and (shelf.heldout(name).behaviours == -1).all()
    background = x[:, 0] - truth.base @ pair.directions
    if name == "injected":
        torch.testing.assert_close(background, shelf.heldout("chat").x[:, 0], rtol=1e-3, atol=1e-3)
    again = open_shelf().heldout(name).x
    assert torch.equal(x, again)


def test_trained_once_then_loaded(open_shelf, monkeypatch):
    shelf = open_shelf(seeds=2)
    cells = shelf.cells("BatchTopK") + shelf.cells("ReLU", seeds=1, sparsity=0.1)
    assert [(c.method, c.sparsity, c.seed) for c in cells] == [
        ("BatchTopK", 2, 3),
        ("BatchTopK", 2, 4),
        ("ReLU", 0.1, 3),
    ]
    frame = shelf.train("chat", cells).frame
    assert frame.n_latents.tolist() == [16] * 3
    monkeypatch.setattr(sweeps, "train", lambda *_, **__: pytest.fail("it was trained again"))
    open_shelf(seeds=2).train("chat", cells)
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        shelf.train("injected", cells)  # another stream is another crosscoder


def test_the_quirk_is_read_against_chat_in_its_own_dialogues(open_shelf, folders):
    shelf = open_shelf()
    rows = shelf._rows("heldout", "quirk")
    half = len(rows) // 2
    assert torch.equal(rows[:half], shelf._rows("heldout")[:half]) and not torch.equal(rows, shelf._rows("heldout"))
    for model, name in enumerate(("gemma2-chat", "quirk")):
        expected = load_subject(folders[name]).residuals(rows)[shelf.base.studied(rows)]
        torch.testing.assert_close(shelf.heldout("quirk").x[:, model], expected, rtol=1e-3, atol=1e-3)


def test_an_autoencoder_reads_a_view_of_the_pair(open_shelf):
    shelf = open_shelf(seeds=1)
    cells = shelf.cells("BatchTopK", kind=Cell)
    (sae,) = shelf.train("chat", cells, "difference").saes.values()
    assert sae.W_dec.shape == (16, D_MODEL)
    alone = sweeps.sweep(cells, ViewedStream(shelf.stream("chat"), "difference").batches, torch.randn(8, D_MODEL), 512)
    assert torch.equal(sae.W_dec, alone.saes[cells[0]].W_dec)
    with pytest.raises(ValueError, match="no view 'sum' of a pair: choose of difference, chat, base"):
        shelf.train("chat", cells, "sum")


def test_larger_ones_learn_at_lower_rates_unless_told(open_shelf):
    shelf = open_shelf(seeds=1)
    small, large = (shelf.cells("ReLU", n_latents=n)[0].lr for n in (16, 64))
    assert small / large == pytest.approx(2)
    assert shelf.cells("ReLU", lr=0.5)[0].lr == 0.5


def test_k_meets_the_l0_of_the_other_method(open_shelf, monkeypatch):
    monkeypatch.setitem(PLANS, "smoke", dataclasses.replace(TINY, n=500, k=100))
    shelf = open_shelf()
    assert [shelf.matched_k(l0) for l0 in (96.0, 104.4, 110.2, 0.2, 900.0)] == [100, 100, 110, 1, 500]


def test_the_end_of_a_prompt_is_where_the_template_before_a_decision_begins():
    roles = np.array([0, 0, 1, 1, 0, 0, 0, 2, 2, 0, 0, 1, 0, 2])  # two turns; the last decision is alone
    decisions = np.array([-1, -1, -1, -1, -1, -1, 4, -1, -1, -1, -1, -1, 7, -1])
    found = Heldout(torch.zeros(14, 2, 1), roles, roles, np.full(14, -1), decisions)
    expected = np.full(14, -1)
    expected[[4, 12]] = 4, 7
    assert found.labels("prompt").tolist() == expected.tolist()
    assert found.labels("decision") is decisions and found.labels("answer").tolist() == [-1] * 14
    with pytest.raises(ValueError, match="labelled at the prompt and the decision and the answer, not at 'end'"):
        found.labels("end")


@pytest.mark.parametrize("heads", [False, True])
def test_tokens_where_an_answer_is_decided_are_read_more_often(open_shelf, heads, request):
    if heads:
        request.getfixturevalue("with_heads")
    shelf = open_shelf(seeds=1)
    rows, stream = shelf._rows("train"), shelf.stream("chat", often=3)
    own = rows.shape[1] - heads
    place = np.pad(np.arange(len(rows) // 2 * own).reshape(-1, own), ((len(rows) // 2, 0), (int(heads), 0)))
    dialogue = np.arange(len(rows))[:, None] >= len(rows) // 2
    decided = dialogue & decisive(np.arange(shelf.plan.text) % 3)[place]  # roles are the order modulo 3
    if heads:
        decided[:, 0] = False
    kept = shelf.base.studied(rows).numpy()
    assert stream.n_activations == kept.sum() + 2 * (decided & kept).sum() > kept.sum()
    assert stream.times.tolist() == np.where(decided, 3, 1)[kept].tolist()
    assert stream.fingerprint != shelf.stream("chat").fingerprint and shelf.stream("chat").times is None
    plain, more = (shelf.train("chat", shelf.cells("BatchTopK"), often=often).frame for often in (1, 3))
    assert plain.nmse[0] != more.nmse[0]
    assert shelf.stream("injected", often=2).stream.times is not None
    for name, often in (("chat", 0), ("injected-gpt2", 2)):
        with pytest.raises(ValueError, match=f"{name} cannot read its decisions {often} times"):
            shelf.stream(name, often)


def test_the_plan_the_seeds_and_the_harvest_are_its_settings(open_shelf):
    shelf = open_shelf(seeds=2)
    harvest = {"context": 8, "normalisation": "none", "drop": "special", "special_ids": [256, 257], "head": None}
    assert shelf.settings == dataclasses.asdict(TINY) | {"seeds": [3, 4], "harvest": harvest}
    reference = open_shelf(plan="reference").plan
    assert reference == PLANS["reference"] and reference.tokens / reference.batch_size >= 20_000
    assert open_shelf(plan="long").plan == PLANS["long"]


def test_pairs_that_do_not_exist(open_shelf):
    assert open_shelf().pairs == list(PAIRS) and {"longer", "quirk"}.isdisjoint(open_shelf("hub").pairs)
    assert set(open_shelf("hub").pairs) - set(open_shelf("gemma").pairs) == {"injected-gpt2"}  # it would be Gemma's
    with pytest.raises(ValueError, match="no pair of models 'other': choose of chat, scaled, longer, self, quirk"):
        open_shelf().pair("other")
    with pytest.raises(ValueError, match="no pair of models 'longer': choose of chat, scaled, self"):
        open_shelf("hub").stream("longer")
