"""Effective shares of planted effects, a linear subject where one latent is one logit, and a tiny GPT-2 by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from twins import D_MODEL, N_VOCAB, save_tiny

from helpers.activations.stream import normalise, undo
from helpers.dictionaries.autoencoders import ReLU, SparseAutoencoder, TopK
from helpers.evaluation import ablations
from helpers.evaluation.ablations import KINDS, ablate, active_terms, draw_tokens, effective_share, effects_of_removing
from helpers.subjects.subject import load_subject

WIDTH, LENGTH = 8, 24


class LinearSubject:
    """Residuals are a table's rows; logits are the residuals themselves, so that a coordinate is a logit."""

    def __init__(self, seed=0):
        self.table = torch.randn(50, WIDTH, generator=random_from(seed))

    def studied(self, tokens):
        return torch.ones(tokens.shape, dtype=torch.bool)

    def residuals(self, tokens):
        return self.table[tokens]

    def resume(self, residuals, at):
        return residuals[at]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Few tokens are looked at, so that rows may be short."""
    monkeypatch.setattr(ablations, "AFTER", 4)


def random_from(seed=0):
    return torch.Generator().manual_seed(seed)


def some_sae(d=D_MODEL, n=40, activation=None, seed=0):
    sae = SparseAutoencoder(d, n, activation or TopK(6), seed)
    with torch.no_grad():
        sae.b_enc.uniform_(0, 0.2, generator=random_from(seed)), sae.b_dec.normal_(0, 0.1, generator=random_from(seed))
    return sae.eval()


def some_rows(n=12, length=LENGTH, n_vocab=50):
    return torch.randint(n_vocab, (n, length), generator=random_from(1))


def axes_sae():
    """A latent for every coordinate, and each is on where its coordinate is above the mean."""
    sae = SparseAutoencoder(WIDTH, WIDTH, ReLU())
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(WIDTH)), sae.W_enc.copy_(torch.eye(WIDTH))
    return sae.eval()


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return load_subject(save_tiny(tmp_path_factory.mktemp("model"), "gpt2"), layer=1)


@pytest.fixture
def early(monkeypatch):
    """The tiny model's rows are short."""
    monkeypatch.setattr(ablations, "FIRST", 3)


def test_shares_of_effects_by_hand():
    one, shifted, equally = torch.zeros(3, 4, 100)
    one[2, 7] = -3.0
    shifted += torch.tensor([5.0, -1.0, 0.0, 2.0])[:, None]  # a constant at each position, and one logit
    shifted[1, 3] += 2.0
    equally[:, 0::2], equally[:, 1::2] = -1.0, 1.0
    equally[:, 0] = 0.0  # the median: the other 99 move as far
    shares = effective_share(torch.stack([one, shifted, equally]))
    torch.testing.assert_close(shares, torch.tensor([1 / 400, 1 / 400, 0.99]))


def test_a_gaussian_effect_has_share_two_over_pi():
    effect = 7 * torch.randn(16, 4096, generator=random_from()) + 3
    assert effective_share(effect).item() == pytest.approx(2 / math.pi, rel=0.01)


def test_no_effect_has_no_share():
    assert effective_share(torch.ones(2, 5)).isnan()


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(0, 100))
def test_shares_against_a_loop(m, n_after, half, seed):
    effects = torch.randn(m, n_after, 2 * half + 1, generator=random_from(seed))  # an odd number has one median
    for effect, share in zip(effects.numpy(), effective_share(effects), strict=True):
        centred = np.concatenate([row - np.median(row) for row in effect])
        expected = (np.abs(centred).sum() / np.linalg.norm(centred)) ** 2 / centred.size
        assert share.item() == pytest.approx(expected, rel=1e-4)
        assert 0 < share <= 1 + 1e-6


def test_effects_equal_one_forward_pass_each(gpt2):
    tokens = torch.randint(N_VOCAB, (1, 12), generator=random_from())
    residuals, t = gpt2.residuals(tokens)[0], 5
    removed = torch.randn(3, 2, D_MODEL, generator=random_from(2))  # at two positions
    effects = effects_of_removing(gpt2, residuals, t, removed)
    assert effects.shape == (3, 7, N_VOCAB)
    before = gpt2.resume(residuals[None])[0]
    for vectors, effect in zip(removed, effects, strict=True):
        changed = residuals.clone()
        changed[t] -= vectors[0]
        changed[t + 1] -= vectors[1]
        after = gpt2.resume(changed[None])[0]
        torch.testing.assert_close(effect, (after - before)[t:], rtol=1e-4, atol=1e-4)
        assert (after - before)[:t].abs().max() < 1e-5  # nothing before the token moves


def test_what_comes_after_the_window_plays_no_part(gpt2):
    residuals = gpt2.residuals(torch.randint(N_VOCAB, (1, 14), generator=random_from()))[0]
    removed = torch.randn(2, 1, D_MODEL, generator=random_from(2))
    whole, cut = effects_of_removing(gpt2, residuals, 4, removed), effects_of_removing(gpt2, residuals[:9], 4, removed)
    torch.testing.assert_close(whole[:, :5], cut, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep_error", [True, False])
def test_one_latent_is_one_logit_in_a_linear_subject(keep_error):
    found = ablate(LinearSubject(), axes_sae(), some_rows(), 12, keep_error=keep_error)
    assert found.share.tolist() == pytest.approx([1 / (4 * WIDTH)] * len(found), rel=1e-4)
    assert found.share_here.tolist() == pytest.approx([1 / WIDTH] * len(found), rel=1e-4)


def test_channels_in_a_linear_subject():
    found = ablate(LinearSubject(), axes_sae(), some_rows(), 12, ["channel", "channel, equal norm"])
    assert found.share.tolist() == pytest.approx([1 / (4 * WIDTH)] * len(found), rel=1e-4)
    subject = LinearSubject()
    subject.table[:] = torch.arange(WIDTH) + 1.0  # every token alike, so that all of the window moves as much
    found = ablate(subject, axes_sae(), some_rows(), 12, ["channel at all tokens"])
    assert found.share.tolist() == pytest.approx([1 / WIDTH] * len(found), rel=1e-4)


@pytest.mark.parametrize("keep_error", [True, False])
def test_a_channel_is_zeroed_in_the_stream_it_is_removed_from(keep_error):
    runs = []

    class Watched(LinearSubject):
        def resume(self, residuals, at):
            runs.append(residuals)
            return super().resume(residuals, at)

    ablate(Watched(), some_sae(WIDTH, 20, TopK(2)), some_rows(), 5, ["channel at all tokens"], 4, 4, keep_error)
    for before, *after in runs:
        for row in after:
            zeroed = (row - before)[-1] != 0
            assert zeroed.sum() == 1 and row[-4:, zeroed].abs().max() < 1e-6
            assert row[:-4].equal(before[:-4])


@pytest.mark.parametrize("keep_error", [True, False])
def test_ablate_against_a_loop_over_latents(gpt2, early, keep_error):
    sae, rows = some_sae(), some_rows(5, 12, N_VOCAB)
    found = ablate(gpt2, sae, rows, 4, per_token=100, keep_error=keep_error, seed=3)
    expected = []
    for row, t in zip(*draw_tokens(rows, gpt2.studied(rows), 4, random_from(1003)), strict=True):
        residuals = gpt2.residuals(row[None])[0]
        x, scale = normalise(residuals)
        around = residuals if keep_error else torch.cat([residuals[:1], undo(sae(x), scale)[1:]])
        before = gpt2.resume(around[None])[0, t : t + 4]
        for j in sae.encode(x)[t].nonzero().flatten():
            changed = around.clone()
            changed[t] -= sae.encode(x)[t, j] * sae.W_dec[j] * scale.norm[t]
            after = gpt2.resume(changed[None])[0, t : t + 4]
            expected.append((effective_share(after - before).item(), effective_share((after - before)[:1]).item()))
    assert len(expected) == 24  # TopK(6) at 4 tokens
    got = sorted(zip(found.share, found.share_here, strict=True))
    np.testing.assert_allclose(got, sorted(expected), rtol=1e-3)


def test_terms_and_bias_add_up_to_the_reconstruction():
    sae, residual = some_sae(), 9 * torch.randn(D_MODEL, generator=random_from(4)) + 2
    x, scale = normalise(residual)
    terms = active_terms(sae, residual, 100, random_from())
    assert len(terms) == 6
    torch.testing.assert_close(undo(sae.b_dec, scale) + terms.sum(0), undo(sae(x[None])[0], scale))


def test_some_terms_are_a_random_part_of_all():
    sae, residual = some_sae(), torch.randn(D_MODEL, generator=random_from(4))
    everything = {tuple(term) for term in active_terms(sae, residual, 100, random_from()).tolist()}
    parts = [tuple(map(tuple, active_terms(sae, residual, 2, random_from(s)).tolist())) for s in range(30)]
    assert all(len(part) == 2 and set(part) <= everything for part in parts)
    assert set().union(*parts) == everything  # each has its turn


def test_controls_are_what_they_say():
    residuals, terms = torch.randn(4, WIDTH, generator=random_from()), torch.randn(30, WIDTH, generator=random_from(1))
    removed = {kind: make(residuals, terms, random_from(2)) for kind, make in KINDS.items()}
    norms = terms.norm(dim=-1, keepdim=True)
    assert removed["latent"].squeeze(1).equal(terms)
    for kind in ("random direction", "channel, equal norm"):
        torch.testing.assert_close(removed[kind].norm(dim=-1), norms)
    for kind in ("channel", "channel, equal norm"):
        assert ((removed[kind] != 0).sum(-1) == 1).all()
    everywhere = removed["channel at all tokens"]
    assert everywhere.shape == (30, 4, WIDTH)
    axis = (everywhere != 0).any(1)
    assert (axis.sum(-1) == 1).all() and axis.any(0).all()  # one coordinate each, all of them in turn
    remaining = residuals - everywhere
    assert (remaining.isclose(torch.zeros(())) == axis[:, None]).all()
    assert removed["channel"].equal(everywhere[:, :1])
    directions = removed["random direction"].squeeze(1) / norms
    assert directions.mean(0).abs().max() < 0.3 and (directions != 0).all()


def test_tokens_are_drawn_from_the_whole_of_what_fits():
    rows = torch.arange(400 * 22).view(400, 22)
    drawn, positions = draw_tokens(rows, torch.ones(rows.shape, dtype=torch.bool), 400, random_from())
    assert set(positions) == {16, 17, 18}  # 16 before, and 4 from the position on
    assert sorted(drawn[:, 0].tolist()) == rows[:, 0].tolist() and not drawn.equal(rows)


def test_only_studied_tokens_are_drawn():
    rows = torch.arange(40 * 22).view(40, 22)
    drawn, positions = draw_tokens(rows, (rows % 22) == 17, 40, random_from())
    assert set(positions) == {17} and len(drawn) == 40
    some = ((rows % 22) == 17) & (torch.arange(40) < 30)[:, None]  # the other rows have none
    assert draw_tokens(rows, some, 30, random_from())[0].max() < rows[30, 0]
    with pytest.raises(ValueError, match="there are 30 of 22"):
        draw_tokens(rows, some, 31, random_from())


def test_the_same_seed_draws_the_same_tokens_for_every_autoencoder():
    asked = []

    class Watched(LinearSubject):
        def residuals(self, tokens):
            asked.append(tokens)
            return super().residuals(tokens)

    for n, seed in ((20, 0), (30, 0), (30, 1)):
        ablate(Watched(), some_sae(WIDTH, n, TopK(2)), some_rows(12, 33), 10, seed=seed)
    assert asked[0].equal(asked[1]) and not asked[0].equal(asked[2])


def test_at_most_so_many_directions_of_each_kind_per_token():
    found = ablate(LinearSubject(), axes_sae(), some_rows(), 6, list(KINDS), per_token=2)
    assert (found.groupby(["token", "kind"]).size() <= 2).all()
    assert found.groupby("kind").size().nunique() == 1 and set(found.kind) == set(KINDS)


def test_bad_input_is_refused():
    subject, sae = LinearSubject(), axes_sae()
    with pytest.raises(ValueError, match=r"there is no kind neuron: choose of latent"):
        ablate(subject, sae, some_rows(), 2, ["neuron"])
    with pytest.raises(ValueError, match=r"2 tokens need as many rows of 20 tokens or more, there are 12 of 19"):
        ablate(subject, sae, some_rows()[:, :19], 2)
    with pytest.raises(ValueError, match=r"there are 12 of 24: take fewer tokens"):
        ablate(subject, sae, some_rows(), 13)
    with torch.no_grad():
        sae.b_enc.fill_(-100)
    with pytest.raises(ValueError, match=r"no latent is on at any of the 5 tokens"):
        ablate(subject, sae, some_rows(), 5)
