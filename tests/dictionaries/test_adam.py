"""Updating a block of latents at a time equals Adam on whole matrices."""

import pytest
import torch
import torch.nn.functional as F

from helpers.dictionaries import adam as updates
from helpers.dictionaries import kernels
from helpers.dictionaries.adam import Adam
from helpers.dictionaries.autoencoders import JumpReLU, SparseAutoencoder, TopK


def backward(sae, x):
    """What is unsummed of the gradients."""
    with kernels.unsummed(sae.W_enc, sae.W_dec) as unsummed:
        loss_of(sae, x).backward()
    return unsummed


def x_of(step):
    return torch.randn(32, 6, generator=torch.Generator().manual_seed(step))


def loss_of(sae, x):
    code = kernels.encode_topk(x, sae.W_enc, sae.b_enc, sae.b_dec, 3)
    twice = kernels.encode_topk(2 * x, sae.W_enc, sae.b_enc, sae.b_dec, 2)  # two codes share the weights
    both = kernels.decode_sparse(code, sae.W_dec) + kernels.decode_sparse(twice, sae.W_dec)
    return (both + sae.b_dec - x).square().mean() + sae.W_enc.square().mean()  # and a dense gradient beside them


@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
def test_blocks_equal_torch_adam_on_whole_matrices(unit_norm, rows_at_once, monkeypatch):
    monkeypatch.setitem(updates.BLOCK, "cpu", 4 * 6 * rows_at_once)
    ours, twin = SparseAutoencoder(6, 20, TopK(3)), SparseAutoencoder(6, 20, TopK(3))
    optimizer = Adam(ours, unit_norm)
    slow = torch.optim.Adam(twin.parameters(), lr=0.01, betas=updates.BETAS, eps=updates.EPS)
    for i in range(5):
        optimizer.step(0.01, backward(ours, x_of(i)))
        slow.zero_grad()
        loss_of(twin, x_of(i)).backward()
        if unit_norm:
            along = (twin.W_dec.grad * twin.W_dec.data).sum(1, keepdim=True)
            twin.W_dec.grad -= along * twin.W_dec.data
        slow.step()
        if unit_norm:
            twin.W_dec.data = F.normalize(twin.W_dec.data, dim=1)
    for (name, a), b in zip(ours.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_a_step_leaves_no_gradient_and_a_parameter_without_one_stays():
    sae = SparseAutoencoder(6, 20, TopK(3))
    optimizer, before = Adam(sae), [p.detach().clone() for p in sae.parameters()]
    optimizer.step(0.1, {})
    assert all(torch.equal(a, b) for a, b in zip(before, sae.parameters(), strict=True))
    optimizer.step(0.1, backward(sae, x_of(0)))
    assert all(p.grad is None for p in sae.parameters())


def test_own_parameters_of_the_activation_have_their_own_rate():
    sae = SparseAutoencoder(6, 20, JumpReLU(20))
    before = sae.activation.log_threshold.detach().clone(), sae.b_enc.detach().clone()
    sae.activation.log_threshold.grad, sae.b_enc.grad = torch.ones(20), torch.ones(20)
    Adam(sae).step(0.01, {})  # a first step of Adam has the length of its rate
    torch.testing.assert_close(before[0] - sae.activation.log_threshold, torch.full((20,), 0.01 * JumpReLU.lr_factor))
    torch.testing.assert_close(before[1] - sae.b_enc, torch.full((20,), 0.01))


def test_forgotten_latents_have_no_moments_and_others_keep_theirs():
    sae = SparseAutoencoder(6, 20, TopK(3))
    optimizer = Adam(sae)
    optimizer.step(0.01, backward(sae, x_of(0)))
    some = torch.arange(20) < 7
    kept = {name: [m[~some].clone() for m in both] for name, both in optimizer.moments.items() if name != "b_dec"}
    optimizer.forget(some)
    for name, both in kept.items():
        for now, before in zip(optimizer.moments[name], both, strict=True):
            assert (now[some] == 0).all() and torch.equal(now[~some], before) and before.any()
