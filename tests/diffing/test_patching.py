"""Causal patching against loops over positions and latents on transformers' own models, and its identities."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_text import A, T, U
from twins import D_MODEL, Twin, random_dialogue, save_tiny, slow_masks

from helpers.dictionaries.autoencoders import BatchTopK, ReLU, SparseAutoencoder
from helpers.dictionaries.crosscoders import Crosscoder, DecoupledCrosscoder
from helpers.diffing import patching
from helpers.diffing.patching import (
    Site,
    difference_of,
    error,
    patch_kl,
    random_positions,
    rows_of,
    template,
    written,
)
from helpers.subjects.pair import SubjectPair
from helpers.subjects.subject import load_subject

N = 12
SOME = [1, 4, 7, 8]
ROLES = [[T, T, U, T, A, A, T, T, U, T, A, T], [T, U, T, A, A, A], [T, T, U, U, T, A, A, A, A, A, A, A, A, A, A, T]]


DIALOGUES = [random_dialogue(roles, seed) for seed, roles in enumerate(ROLES)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [save_tiny(tmp_path_factory.mktemp(name), "gemma2", seed) for seed, name in enumerate(("base", "chat"))]


@pytest.fixture(scope="module")
def pair(folders):
    subjects = [load_subject(folder) for folder in folders]
    for subject in subjects:
        subject.tokenizer.chat_template = "{{ bos_token }}"
    return SubjectPair(*subjects)


def randomised(dictionary, scale=0.4):
    random = torch.Generator().manual_seed(7)
    for parameter in dictionary.parameters():
        parameter.data = scale * torch.randn(parameter.shape, generator=random)
    for activation in (dictionary.activation, getattr(dictionary, "activation_chat", None)):
        if isinstance(activation, BatchTopK):
            activation.threshold.fill_(1.0)
    return dictionary.eval()


def crosscoder(kind=Crosscoder, activation=None):
    return randomised(kind(D_MODEL, N, activation or BatchTopK(3)))


def sae():
    return randomised(SparseAutoencoder(D_MODEL, N, ReLU()))


@torch.no_grad()
def slow_written(dictionary, base, chat, latents, bias):
    """sum_j f_j (d_j^chat - d_j^base) at one position, latent by latent."""
    x = torch.stack([base, chat])[None]
    total = torch.zeros(D_MODEL)
    if isinstance(dictionary, Crosscoder):
        f, (d_base, d_chat), (b_base, b_chat) = dictionary.encode(x)[0], dictionary.decoders, dictionary.biases
        f_base, f_chat = f if f.ndim == 2 else (f, f)
        for j in latents:
            total += f_chat[j] * d_chat[j] - f_base[j] * d_base[j]
        return total + (b_chat - b_base if bias else 0)
    f = dictionary.encode((chat - base)[None])[0]
    for j in latents:
        total += f[j] * dictionary.W_dec[j]
    return total + (dictionary.b_dec if bias else 0)


def slow_kl(folders, layer, patch):
    """KL at positions that predict an answer, dialogue after dialogue; patch(base, chat, role, t) is one position."""
    base_model, chat_model = (Twin(folder, layer) for folder in folders)
    found = []
    for dialogue in DIALOGUES:
        tokens = torch.from_numpy(dialogue.tokens).long()[None]
        base, chat = (model.residuals(tokens)[0] for model in (base_model, chat_model))
        patched = torch.stack([patch(base[t], chat[t], dialogue.roles[t], t) for t in range(len(base))])
        log_p, log_q = (chat_model.resume(h[None])[0].log_softmax(-1) for h in (chat, patched))
        full, _ = slow_masks(dialogue.roles.tolist())
        found += [(log_p[t].exp() * (log_p[t] - log_q[t])).sum().item() for t in range(len(base)) if full[t]]
    return found


def same(found, expected):
    assert max(expected) > 1e-3 or max(expected) == 0
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [Crosscoder, DecoupledCrosscoder, SparseAutoencoder])
def test_every_condition_equals_the_slow_twin(pair, folders, kind, bias):
    dictionary = sae() if kind is SparseAutoencoder else crosscoder(kind)
    difference = difference_of(dictionary, "difference" if kind is SparseAutoencoder else None)
    conditions = {"all": written(difference, bias=bias), "some": written(difference, SOME, bias)}
    found = patch_kl(pair, DIALOGUES, conditions | {"error": error(difference, bias)}, keep_first=False).kl

    def add(base, chat, latents):
        return slow_written(dictionary, base, chat, latents, bias)

    layer = pair.base.layer
    same(found["None"], slow_kl(folders, layer, lambda base, chat, role, t: base))
    same(found["all"], slow_kl(folders, layer, lambda base, chat, role, t: base + add(base, chat, range(N))))
    same(found["some"], slow_kl(folders, layer, lambda base, chat, role, t: base + add(base, chat, SOME)))
    same(found["error"], slow_kl(folders, layer, lambda base, chat, role, t: chat - add(base, chat, range(N))))


def test_template_and_first_position_equal_the_slow_twin(pair, folders):
    dictionary = crosscoder()
    conditions = {"template": template, "all": written(difference_of(dictionary))}
    found = patch_kl(pair, DIALOGUES, conditions).kl

    def all_but_first(base, chat, role, t):
        return base + slow_written(dictionary, base, chat, range(N), False) if t else base

    same(found["template"], slow_kl(folders, pair.base.layer, lambda b, c, role, t: c if role == T and t else b))
    same(found["all"], slow_kl(folders, pair.base.layer, all_but_first))


def test_a_chat_sae_adds_what_it_reads_in_chat(pair):
    dictionary, site = sae(), site_of(pair)
    found = written(difference_of(dictionary, "chat"), SOME)(site)
    f = dictionary.encode(site.chat.flatten(0, 1))[:, SOME] @ dictionary.W_dec[SOME]
    expected = site.base + f.view_as(site.base) * site.inside[..., None]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)


def site_of(pair, keep_first=False):
    [rows] = rows_of(DIALOGUES, 16, 8)
    with torch.no_grad():
        return Site(pair, rows, keep_first)


def test_all_and_the_bias_is_base_and_the_difference_of_reconstructions(pair):
    dictionary, site = crosscoder(), site_of(pair)
    found = written(difference_of(dictionary), bias=True)(site)
    x = torch.stack([site.base, site.chat], 2)
    base, chat = dictionary(x.flatten(0, 1)).detach().unflatten(0, x.shape[:2]).unbind(2)
    expected = (site.base + chat - base).where(site.inside[..., None], site.base)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [Crosscoder, DecoupledCrosscoder])
def test_a_set_and_its_complement_add_up_to_all(pair, kind):
    difference, site = difference_of(crosscoder(kind)), site_of(pair)
    rest = [j for j in range(N) if j not in SOME]
    one, other, whole = (written(difference, latents)(site) - site.base for latents in (SOME, rest, None))
    assert min(one.abs().max(), other.abs().max()) > 0.1
    torch.testing.assert_close(one + other, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(error(difference)(site) + whole, site.chat, rtol=1e-4, atol=1e-4)


def test_a_decoupled_latent_is_on_where_it_is_in_either_model():
    dictionary, x = crosscoder(DecoupledCrosscoder), torch.randn(20, 2, D_MODEL)
    found, (base, chat) = difference_of(dictionary).latents(x), dictionary.encode(x).unbind(1)
    assert ((base > 0) != (chat > 0)).any() and torch.equal(found, torch.maximum(base, chat))
    with pytest.raises(ValueError, match=r"12 rows, but a code of \(20, 2\) for 20 tokens"):
        dataclasses.replace(difference_of(crosscoder()), encode=lambda x: torch.ones(len(x), 2)).latents(x)


def test_identities(pair):
    difference = difference_of(crosscoder())
    conditions = {
        "chat": lambda site: site.chat,
        "template everywhere": lambda site: site.chat_at(torch.ones_like(site.template)),
        "nothing": written(difference, []),
        "all, one by one": written(difference, range(N)),
        "all": written(difference),
    }
    kl = patch_kl(pair, DIALOGUES, conditions).kl
    assert (kl["chat"] == 0).all() and (kl["template everywhere"] == 0).all()
    assert (kl["nothing"] == kl["None"]).all() and (kl["None"] > 0).all()
    assert (kl["all, one by one"] == kl["all"]).all() and (kl["all"] != kl["None"]).all()


def test_a_model_against_itself_has_no_gap(pair):
    found = patch_kl(SubjectPair(pair.chat, pair.chat), DIALOGUES, {"template": template})
    assert (found.kl == 0).all(axis=None)


def test_rows_are_positions_in_order_whatever_the_batch(pair, monkeypatch):
    difference = difference_of(crosscoder())
    conditions = {"some": written(difference, SOME), "template": template, "random": random_positions(3)}
    all_at_once = patch_kl(pair, DIALOGUES, conditions)
    monkeypatch.setattr(patching, "BATCH", 1)
    one = patch_kl(pair, DIALOGUES, conditions)
    pd.testing.assert_frame_equal(one.positions, all_at_once.positions)
    np.testing.assert_allclose(one.kl, all_at_once.kl, rtol=1e-3, atol=1e-5)
    expected = [
        (d, t, full, first)
        for d, roles in enumerate(ROLES)
        for t, (full, first) in enumerate(zip(*slow_masks(roles), strict=True))
    ]
    places = one.positions[["dialogue", "position", "first_nine"]].itertuples(index=False, name=None)
    assert list(places) == [(d, t, first) for d, t, full, first in expected if full]
    assert one.positions.order.tolist()[:5] == [0, 1, 2, 0, 1]


def test_each_model_and_each_dictionary_is_read_once(pair, monkeypatch):
    calls = []
    dictionary = crosscoder()
    for what, name in ((type(pair.base), "residuals"), (type(pair.base), "resume"), (Crosscoder, "encode")):
        real = getattr(what, name)
        monkeypatch.setattr(what, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))
    difference = difference_of(dictionary)
    patch_kl(pair, DIALOGUES, {str(j): written(difference, [j]) for j in range(4)})
    assert [calls.count(name) for name in ("residuals", "resume", "encode")] == [2, 1 + 1 + 4, 1]


def test_random_positions_are_as_many_as_the_templates(pair):
    site = site_of(pair, keep_first=True)
    chosen = [(random_positions(seed)(site) != site.base).any(-1) for seed in range(20)]
    for where in chosen:
        assert where.sum(1).tolist() == site.template.sum(1).tolist() and not (where & ~site.inside).any()
    assert len({tuple(where.flatten().tolist()) for where in chosen}) > 10
    [twice] = rows_of([DIALOGUES[2]] * 2, 16, 2)
    with torch.no_grad():
        one, other = random_positions(0)(Site(pair, twice, True))
    assert not torch.equal(one, other)  # dialogues draw apart


def test_latents_and_dictionaries_that_do_not_fit(pair):
    difference = difference_of(crosscoder())
    for latents in ([3, N], np.array([-1]), torch.tensor([N])):
        with pytest.raises(ValueError, match=r"there is no latent (12|-1): the dictionary has 0 to 11"):
            written(difference, latents)
    for latents in (torch.ones(N, dtype=torch.bool), [0.5]):
        with pytest.raises(ValueError, match="latents are given by their numbers, not as"):
            written(difference, latents)
    with pytest.raises(ValueError, match="the dictionary is 8 wide, the models 24: use one of their site"):
        patch_kl(pair, DIALOGUES, {"all": written(difference_of(Crosscoder(8, N, ReLU())))})
    with pytest.raises(ValueError, match="an autoencoder of 'base' says nothing of chat"):
        difference_of(sae(), "base")
    with pytest.raises(ValueError, match="scaled apart: patch the pair without scales"):
        patch_kl(dataclasses.replace(pair, scales=(1.0, 2.0)), DIALOGUES, {})
    with pytest.raises(ValueError, match="the bias of an autoencoder of chat is no difference: patch without it"):
        written(difference_of(sae(), "chat"), bias=True)


def test_dialogues_and_predictions_that_cannot_be_used(pair, folders):
    with pytest.raises(ValueError, match="no position of dialogue 0 predicts an answer"):
        patch_kl(pair, [random_dialogue([T, U, U], 0)], {})
    with pytest.raises(ValueError, match="dialogue 0 has 17 tokens, more than the 16 of a context"):
        patch_kl(pair, [random_dialogue([T, U, T] + [A] * 14, 0)], {})
    with pytest.raises(ValueError, match="has site .* a pair must agree on it"):
        SubjectPair(pair.base, load_subject(folders[1], layer=0))
    with pytest.raises(ValueError, match="predictions are not finite under 'broken'"):
        patch_kl(pair, DIALOGUES, {"broken": lambda site: site.base * torch.nan})
