"""Both models' rows beside each other, the gain of a norm, and a field that says in place what is wrong with a text."""

import types

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from twins import save_tiny

from helpers.dictionaries.autoencoders import TopK
from helpers.dictionaries.crosscoders import Crosscoder
from helpers.dictionaries.pair_collection import Heldout
from helpers.figures import explorer
from helpers.figures.explorer import OwnText, diff_explorer, planted_pages, read_text, unembedding
from helpers.subjects.subject import load_subject

LATENTS = 6
TABLE = pd.DataFrame(
    {
        "delta": [0.5, 0.9, 0.1, 0.5],
        "nu_error": [0.2, np.nan, 0.3, 0.4],
        "nu_reconstruction": 0.5,
        "cosine": 1.0,
        "class": ["shared", "chat-only", "base-only", "shared"],
        "rate": [0.1, 0.2, 0.3, 0.0],
    }
)


@pytest.fixture(scope="module", params=["gpt2", "gemma2"])
def subject(request, tmp_path_factory):
    return load_subject(save_tiny(tmp_path_factory.mktemp("model") / request.param, request.param))


def test_the_unembedding_is_what_a_small_step_does_to_the_logits_of_a_balanced_residual(subject):
    norm, head = subject.bridge.ln_final, subject.model.get_output_embeddings()
    x = torch.ones(subject.d_model)
    x[1::2] = -1
    step = torch.zeros(subject.d_model)
    step[:4] = torch.tensor([1e-3, 1e-3, -1e-3, -1e-3])  # of mean zero, and across x: no norm's scale moves
    with torch.no_grad():
        next(norm.parameters()).uniform_(1, 2)
        moved = (head(norm((x + step)[None, None])) - head(norm(x[None, None])))[0, 0]
    assert np.abs(moved).max() > 1e-6
    np.testing.assert_allclose(step.numpy() @ unembedding(subject), moved, atol=3e-6)


@pytest.fixture
def explored(subject):
    torch.manual_seed(0)
    crosscoder = Crosscoder(subject.d_model, 4, TopK(2))
    rows = np.arange(12)
    reading = Heldout(torch.zeros(12, 2, 1), rows, rows * 0, rows * 0, rows * 0, rows // 7)
    code = scipy.sparse.csr_array(np.eye(12, 4) + np.eye(12, 4, -6))
    pair = types.SimpleNamespace(base=subject, chat=subject)
    return crosscoder, diff_explorer(crosscoder, TABLE, code, reading, pair)


def test_both_models_rows_stand_beside_each_other(explored):
    crosscoder, browser = explored
    assert [record.latent for record in browser.records] == [0, 1, 2]  # the last never fires
    assert browser.scatter == ["Δ", "ν error"]
    first = browser.records[0]
    assert first.facts == {
        "Δ": 0.5,
        "ν error": 0.2,
        "ν reconstruction": 0.5,
        "cosine of the rows": 1,
        "class": "shared",
    }
    assert [row.model for row in first.directions] == ["base", "chat"]
    norms = crosscoder.decoders.norm(dim=-1)[:, 0].tolist()
    assert [row.norm for row in first.directions] == pytest.approx(norms)
    assert ">base</th>" in browser.static() and ">chat</th>" in browser.static()


def test_only_tokens_of_dialogues_count(explored):
    _, browser = explored
    assert [(record.n_tokens, record.density) for record in browser.records] == [(12, 2 / 12)] * 3
    assert browser.records[0].crowd.denser_than == 0  # all four fire equally often


def test_rows_that_differ_between_the_models_are_read_apart(explored, subject):
    crosscoder, _ = explored
    W_U = unembedding(subject)
    with torch.no_grad():
        crosscoder.decoders[1, 0] *= -3  # a view
    reading = Heldout(*(np.arange(4) for _ in range(5)), np.zeros(4, int))
    pair = types.SimpleNamespace(base=subject, chat=subject)
    base, chat = (
        diff_explorer(crosscoder, TABLE, scipy.sparse.csr_array(np.eye(4)), reading, pair).records[0].directions
    )
    assert (base.promoted, base.suppressed) == (chat.suppressed, chat.promoted)
    assert chat.norm == pytest.approx(3 * base.norm)
    logits = crosscoder.decoders[0, 0].detach().numpy() @ W_U
    assert base.promoted[0] == explorer.token_text(subject.tokenizer, int(logits.argmax()))


def test_a_table_in_which_none_fires_is_refused(explored, subject):
    pair = types.SimpleNamespace(base=subject, chat=subject)
    reading = Heldout(*(np.arange(4) for _ in range(5)), np.zeros(4, int))
    with pytest.raises(ValueError, match="got no records"):
        diff_explorer(explored[0], TABLE.assign(rate=0.0), scipy.sparse.csr_array((4, 4)), reading, pair)


def test_planted_latents_are_read_on_the_text_beneath_with_the_lengths_of_their_rows(subject):
    crosscoder, tokens = Crosscoder(subject.d_model, 4, TopK(2)), subject.tokenizer("a <b> cat").input_ids
    with torch.no_grad():
        crosscoder.decoders[1, 2] *= 3
    code = scipy.sparse.csr_array(np.eye(len(tokens), 4, -1))  # latent j is on at token j + 1
    [page] = planted_pages(crosscoder, code, np.array(tokens), [2], subject.tokenizer, row=4)
    base, chat = page.directions
    assert (base.model, chat.model, chat.norm) == ("base", "chat", pytest.approx(3 * base.norm))
    assert page.top[0].tokens == tuple(explorer.token_text(subject.tokenizer, i) for i in tokens[:4])
    assert page.top[0].at == 3 and page.n_tokens == len(tokens) // 4 * 4
    with pytest.raises(ValueError, match="There is no latent 4"):
        planted_pages(crosscoder, code, np.array(tokens), [4], subject.tokenizer)
    assert planted_pages(crosscoder, code, np.array(tokens), [], subject.tokenizer) == []


def encode(ids):
    """Latent j is on where the id is j modulo 6, as strongly as the id is large; latent 5 never is."""
    codes = torch.nn.functional.one_hot(ids[0] % LATENTS, LATENTS) * ids[0][:, None] / 100
    codes[:, 5] = 0
    return codes


@pytest.fixture
def field(subject):
    return OwnText(subject.tokenizer, encode, 12, "a <b>")


def said(field):
    assert 'role="alert"' in field.result.value
    return field.result.value


def test_the_strongest_latents_come_first_and_markup_is_text(field):
    html = field.result.value
    shown = [float(part.split(" at most")[0]) for part in html.split(": ")[1:] if " at most" in part]
    assert shown == sorted(shown, reverse=True) and len(shown) > 1
    assert "<b>b" not in html and "&lt;" in html


def test_without_a_kernel_its_reading_is_shown(field):
    shown = field._repr_mimebundle_()
    assert shown["text/html"] == field.result.value and "application/vnd.jupyter.widget-view+json" in shown


def test_what_to_do_after_a_restart_is_said_outside_of_the_widget(field, monkeypatch):
    shown = []
    monkeypatch.setattr(explorer, "display", lambda what, **_: shown.append(what))
    field._ipython_display_()
    assert shown[0]["text/html"] == field.result.value
    assert "Its kernel was restarted: run this cell again" in shown[1].data


def test_a_latent_can_be_named(field, subject):
    name = str(subject.tokenizer("a").input_ids[-1] % LATENTS)
    field.latent.value = f" {name} "
    assert f"<b>Latent {name}: " in field.result.value and field.result.value.count("<b>Latent") == 1


@pytest.mark.parametrize(
    ("text", "latent", "message"),
    [
        ("", "", "There is no text yet"),
        (" \n", "", "There is no text yet"),
        ("a" * 13, "", "The text has 13 tokens, and the model reads at most 12: shorten it."),
        ("ab\udcffc", "", "Character 3 (U+DCFF) is half of one"),
        ("a", "6", "There is no latent 6: the dictionary has 6, 0 to 5."),
        ("a", "-1", "There is no latent -1"),
        ("a", "<i>", "&#x27;&lt;i&gt;&#x27; is no latent: give a number, 0 to 5."),
        ("a", "5", "Latent 5 is not active on this text."),
    ],
)
def test_what_is_wrong_is_said_in_place(field, text, latent, message):
    field.latent.value = latent
    field.text.value = text
    assert message in said(field)
    field.latent.value, field.text.value = "", "abc"
    assert "alert" not in field.result.value


def test_a_text_on_which_nothing_is_active(subject):
    with pytest.raises(ValueError, match="No latent is active on this text."):
        read_text("a", subject.tokenizer, lambda ids: torch.zeros(ids.shape[1], 3), 12)
