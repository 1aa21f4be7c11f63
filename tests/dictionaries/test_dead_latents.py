"""Remedies against dead latents: what each may touch, and what each switch changes."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from helpers.base import products
from helpers.dictionaries.adam import Adam
from helpers.dictionaries.autoencoders import SparseAutoencoder, TopK
from helpers.dictionaries.dead_latents import AuxK, GhostGrads, Remedy, Resample


@pytest.fixture(autouse=True)
def in_full_precision(monkeypatch):
    monkeypatch.setattr(products, "compute_dtype", lambda t: t.dtype)
    monkeypatch.setattr(products, "has_fast_bf16", lambda device: False)


D, N = 12, 48
ALL = AuxK(weight=1.0)


def case(b_dec=0.0, n_dead=15, seed=0):
    """An autoencoder, a batch, and the latents 5 to 5 + n_dead, said to be dead."""
    torch.manual_seed(seed)
    sae = SparseAutoencoder(D, N, TopK(3), seed=seed)
    with torch.no_grad():
        sae.b_dec.fill_(b_dec)
    dead = torch.zeros(N, dtype=torch.bool)
    dead[5 : 5 + n_dead] = True
    return sae, torch.randn(64, D), dead


def auxk_twin(sae, x, x_hat, dead, k):
    """The paper's AuxK, dense and in full."""
    error = (x - x_hat).detach()
    pre_acts = sae.pre_acts(x).masked_fill(~dead, -torch.inf)
    values, latents = pre_acts.topk(min(k, int(dead.sum())))
    z = torch.zeros_like(pre_acts).scatter(1, latents, values.relu())
    return (error - z @ sae.W_dec).square().sum() / (error - error.mean(0)).square().sum()


@pytest.mark.parametrize("k, n_dead", [(1, 15), (4, 15), (30, 15), (6, N - 5)])
def test_auxk_equals_its_dense_twin(k, n_dead):
    (sae, x, dead), (twin, _, _) = case(0.3, n_dead), case(0.3, n_dead)
    x_hat = sae(x).detach()
    loss, expected = dataclasses.replace(ALL, k=k).loss(sae, x, x_hat, dead), auxk_twin(twin, x, x_hat, dead, k)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for a, b in zip(sae.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("remedy", [AuxK(k=4), AuxK(share=0.3), GhostGrads()])
def test_only_dead_rows_get_a_gradient(remedy):
    sae, x, dead = case()
    remedy.loss(sae, x, sae(x), dead).backward()  # x_hat carries a graph, which must not be followed
    for weight in (sae.W_dec, sae.W_enc):
        assert (weight.grad[~dead] == 0).all() and (weight.grad[dead] != 0).any()


def test_a_residual_with_gradient_teaches_the_living_too():
    sae, x, dead = case()
    AuxK(detach=False).loss(sae, x, sae(x), dead).backward()
    assert (sae.W_dec.grad[~dead] != 0).any()


@pytest.mark.parametrize("b_dec", [0.0, 2.5])
def test_auxk_has_no_bias_unless_asked(b_dec):
    """A dead latent that equals the residual gives zero loss, whatever b_dec is."""
    sae, _, dead = case(b_dec, n_dead=1)
    amount = torch.linspace(1, 3, 16)[:, None]
    with torch.no_grad():
        sae.W_enc[5] = sae.W_dec[5]
    residual = amount * sae.W_dec[5].detach()
    x = sae.b_dec.detach() + residual
    assert ALL.loss(sae, x, x - residual, dead).item() < 1e-6
    assert (dataclasses.replace(ALL, bias=True).loss(sae, x, x - residual, dead).item() > 1) == (b_dec > 0)


def test_normalisers_by_hand():
    sae, x, dead = case()
    x_hat = x - 0.1 * torch.randn_like(x)
    by_residual, by_input = (
        dataclasses.replace(ALL, normalise_by=name).loss(sae, x, x_hat, dead) for name in ("residual", "input")
    )
    total, left = (((t - t.mean(0)) ** 2).sum() for t in (x, x - x_hat))
    torch.testing.assert_close(by_input * total, by_residual * left)


def test_scaling_by_the_number_of_dead_latents():
    sae, x, dead = case(n_dead=6)
    plain, scaled = (AuxK(k=8, scale_by_dead=flag).loss(sae, x, 0 * x, dead) for flag in (False, True))
    torch.testing.assert_close(scaled, plain * 6 / 8)
    plain, scaled = (AuxK(k=4, scale_by_dead=flag).loss(sae, x, 0 * x, dead) for flag in (False, True))
    torch.testing.assert_close(scaled, plain)


def test_a_share_of_the_tokens_is_the_loss_of_those_tokens():
    sae, x, dead = case()
    torch.testing.assert_close(AuxK(share=0.25).loss(sae, x, 0 * x, dead), AuxK().loss(sae, x[:16], 0 * x[:16], dead))


def test_default_k_is_half_the_width_and_the_weight_multiplies():
    sae, x, dead = case()
    torch.testing.assert_close(
        AuxK().loss(sae, x, 0 * x, dead), AuxK(k=D // 2, weight=1.0).loss(sae, x, 0 * x, dead) / 32
    )


def test_a_perfect_reconstruction_is_no_trouble():
    sae, x, dead = case()
    for remedy in (AuxK(), GhostGrads()):
        assert remedy.loss(sae, x, x.clone(), dead).isfinite()


def test_ghosts_cost_as_much_as_the_main_loss_and_equal_their_twin():
    sae, x, dead = case()
    x_hat = sae(x).detach()
    e = x - x_hat
    ghost = (sae.W_enc[dead] @ (x - sae.b_dec).T).T.exp() @ sae.W_dec[dead]
    ghost = ghost / ghost.norm(dim=1, keepdim=True).detach() * e.norm(dim=1, keepdim=True) / 2
    main = e.square().sum() / (x - x.mean(0)).square().sum()
    loss = GhostGrads().loss(sae, x, x_hat, dead)
    torch.testing.assert_close(loss.detach(), main, rtol=1e-4, atol=0)
    missed = (ghost - e).square().sum(1).mean()
    expected = torch.autograd.grad(missed * (main / missed).detach(), sae.W_enc)[0]
    found = torch.autograd.grad(loss, sae.W_enc)[0]
    torch.testing.assert_close(
        F.cosine_similarity(found.flatten(), expected.flatten(), dim=0).item(), 1.0, atol=1e-5, rtol=0
    )


def test_no_remedy_does_nothing():
    sae, x, dead = case()
    assert Remedy().loss(sae, x, x, dead) == 0.0
    assert not Remedy().renew(sae, Adam(sae), x, dead, (0.0, 1.0))


def test_resampled_latents_point_at_inputs_that_are_badly_rebuilt():
    sae, x, dead = case(0.1)
    x[0] *= 100  # by far the worst
    optimizer, before = Adam(sae), sae.W_dec.detach().clone()
    optimizer.moments["W_enc"][0].fill_(1.0)
    living = sae.W_enc[~dead].norm(dim=1).mean()
    assert Resample().renew(sae, optimizer, x, dead, (0.12, 0.13))
    direction = F.normalize(x[0] - sae.b_dec, dim=0)
    torch.testing.assert_close(sae.W_dec[dead], direction.expand(15, -1))
    torch.testing.assert_close(sae.W_enc[dead], 0.2 * living * direction.expand(15, -1))
    assert torch.equal(sae.W_dec[~dead], before[~dead])
    assert (optimizer.moments["W_enc"][0][dead] == 0).all() and (optimizer.moments["W_enc"][0][~dead] == 1).all()


@pytest.mark.parametrize("progress, due", [
    ((0.0, 0.12), False), ((0.12, 0.125), True), ((0.125, 0.13), False), ((0.2, 0.3), True), ((0.5, 1.0), False),
])  # fmt: skip
def test_resampling_is_due_four_times(progress, due):
    sae, x, dead = case()
    assert Resample().renew(sae, Adam(sae), x, dead, progress) == due


def test_nothing_to_resample_and_nothing_to_resample_from():
    sae, x, dead = case()
    for nobody in (dead & ~dead, dead | ~dead):
        assert not Resample().renew(sae, Adam(sae), x, nobody, (0.0, 1.0))


def test_impossible_switches_are_refused():
    with pytest.raises(ValueError, match="unknown normaliser 'outputs': use one of residual, input"):
        AuxK(normalise_by="outputs")
    with pytest.raises(ValueError, match="a share of the tokens above 0 and at most 1, not 0"):
        AuxK(share=0)


def test_inputs_are_drawn_by_their_squared_loss(monkeypatch):
    sae, x, dead = case()
    weights, draw = [], torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda w, *a, **k: (weights.append(w), draw(w, *a, **k))[1])
    loss = (x - sae(x)).detach().square().sum(1)
    Resample().renew(sae, Adam(sae), x, dead, (0.12, 0.13))
    torch.testing.assert_close(weights[0], loss**2)
