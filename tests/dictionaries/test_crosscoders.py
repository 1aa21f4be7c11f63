"""Crosscoders: what a pair of decoder rows means, what ranks latents, what the loss is, and that training agrees."""

import dataclasses

import pytest
import torch

from helpers.base import products
from helpers.dictionaries import training
from helpers.dictionaries.autoencoders import BatchTopK, Gated, ReLU, TopK
from helpers.dictionaries.crosscoders import Crosscoder, DecoupledCrosscoder
from helpers.dictionaries.dead_latents import AuxK
from helpers.dictionaries.quality import evaluate
from helpers.dictionaries.training import TrainConfig, train

D, N = 16, 40
ALIVE = torch.zeros(N, dtype=torch.bool)
CONFIG = TrainConfig(tokens=256 * 40, lr=1e-2)


def pairs(n, seed=0):
    """(n, 2, D): sums of few of 16 fixed directions; the last four are in the second model only."""
    random = torch.Generator().manual_seed(1000 + seed)
    directions = torch.nn.functional.normalize(torch.randn(16, D, generator=torch.Generator().manual_seed(99)), dim=1)
    on = (torch.rand(n, 16, generator=random) < 0.1) * (0.5 + torch.rand(n, 16, generator=random))
    base = on.clone()
    base[:, 12:] = 0
    return torch.stack([base @ directions, on @ directions], 1) + 0.1


def uneven(activation, kind=Crosscoder, **switches):
    """A crosscoder whose decoder norms differ between latents and models."""
    crosscoder = kind(D, N, activation, **switches)
    random = torch.Generator().manual_seed(5)
    crosscoder.W_dec.data *= 0.2 + 2 * torch.rand(N, 2, 1, generator=random).expand(N, 2, D).reshape(N, 2 * D)
    crosscoder.b_dec.data = 0.1 * torch.randn(2 * D, generator=random)
    crosscoder.b_enc.data = 0.1 * torch.randn(N, generator=random)
    return crosscoder


def test_encode_and_decode_by_hand():
    crosscoder = Crosscoder(2, 1, ReLU())
    crosscoder.W_enc.data = torch.tensor([[1.0, 0.0, 0.0, 2.0]])
    crosscoder.W_dec.data = torch.tensor([[3.0, 4.0, 0.0, 1.0]])
    crosscoder.b_dec.data = torch.tensor([0.0, 0.0, 10.0, 0.0])
    crosscoder.b_enc.data = torch.tensor([-1.0])
    x = torch.tensor([[[5.0, 7.0], [9.0, 2.0]]])  # 1 * 5 + 2 * 2 - 1 = 8
    assert crosscoder.encode(x).tolist() == [[8.0]]
    assert crosscoder(x).tolist() == [[[24.0, 32.0], [10.0, 8.0]]]
    assert crosscoder.decoders.tolist() == [[[3.0, 4.0]], [[0.0, 1.0]]]
    assert crosscoder.encoders.tolist() == [[[1.0, 0.0]], [[0.0, 2.0]]]
    assert crosscoder.biases.tolist() == [[0.0, 0.0], [10.0, 0.0]]
    assert crosscoder.sizes().tolist() == [6.0] and crosscoder.d_model == 2


def test_joint_size_is_the_norm_of_both_rows():
    assert uneven(ReLU(), size="joint").sizes().tolist() == pytest.approx(
        uneven(ReLU()).W_dec.norm(dim=1).tolist(), rel=1e-5
    )


def test_both_models_start_alike():
    crosscoder = Crosscoder(D, N, ReLU(), seed=3, init_norm=0.05)
    assert torch.equal(*crosscoder.decoders) and torch.equal(*crosscoder.encoders)
    torch.testing.assert_close(crosscoder.decoders.norm(dim=-1), torch.full((2, N), 0.05))


def test_batchtopk_ranks_by_value_times_size_and_keeps_k_per_token():
    crosscoder, x = uneven(BatchTopK(3)), pairs(32)
    crosscoder.train()
    latents, free = crosscoder.encode(x), crosscoder.pre_acts(x).relu()
    worth = free * crosscoder.decoders.norm(dim=-1).sum(0)
    least = worth.flatten().topk(3 * 32).values[-1]
    assert (latents > 0).sum() == 3 * 32
    torch.testing.assert_close(latents, torch.where(worth >= least, free, 0))


@pytest.mark.parametrize("activation", [ReLU(), TopK(4), BatchTopK(4)])
def test_scaling_a_latents_decoder_up_and_its_encoder_down_changes_nothing(activation):
    crosscoder, x = uneven(activation).train(), pairs(64)
    variance = torch.tensor(2.0)
    config = dataclasses.replace(CONFIG, remedy=AuxK(k=3))
    before = training.forward(crosscoder, x.flatten(1), variance, ALIVE, config, 0.1).loss
    factors = torch.linspace(0.25, 4, N)
    crosscoder.W_dec.data *= factors[:, None]
    crosscoder.W_enc.data /= factors[:, None]
    crosscoder.b_enc.data /= factors
    after = training.forward(crosscoder, x.flatten(1), variance, ALIVE, config, 0.1).loss
    torch.testing.assert_close(after, before, rtol=0.01, atol=0)  # products may run in bf16


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("size", ["sum", "joint"])
@pytest.mark.parametrize("activation", [ReLU(), TopK(3), BatchTopK(3)])
def test_loss_and_gradients_equal_the_paper_formula(activation, size, squared, monkeypatch):
    monkeypatch.setattr(products, "compute_dtype", lambda t: t.dtype)
    monkeypatch.setattr(products, "has_fast_bf16", lambda device: False)
    x, variance, price = pairs(48), torch.tensor(0.7), 0.05
    ours, twin = (uneven(activation, size=size, squared=squared).train() for _ in range(2))
    price = price if isinstance(activation, ReLU) else 0.0
    training.forward(ours, x.flatten(1), variance, ALIVE, CONFIG, price).loss.backward()
    f = twin.encode(x)
    errors = [x[:, m] - f @ twin.decoders[m] - twin.biases[m] for m in (0, 1)]
    norms = twin.decoders.norm(dim=-1)
    total = norms.sum(0) if size == "sum" else norms.square().sum(0).sqrt()
    if squared:
        loss = (sum(e.square().sum(1).mean() for e in errors) + price * (f * total).sum(1).mean()) / variance
    else:
        halves = sum(e.norm(dim=1).mean() / 2 for e in errors)
        loss = (halves + price * (f * total).sum(1).mean()) / (variance / 2).sqrt()
    loss.backward()
    for (name, a), b in zip(ours.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("activation", "price"), [(ReLU(), 0.06), (BatchTopK(2), 0.0)])
def test_training_learns_which_directions_are_one_models_own(activation, price):
    config = dataclasses.replace(CONFIG, sparsity=price, tokens=60_000)
    crosscoder = train(Crosscoder(D, N, activation), pairs(config.tokens).split(256), config).sae
    test = pairs(2048, seed=1)
    assert evaluate(crosscoder, test).nmse < 0.05
    norms, fires = crosscoder.decoders.detach().norm(dim=-1), (crosscoder.encode(test) > 0).any(0)
    share = (norms[1] / norms.sum(0))[fires]  # 1/2 for shared
    assert (share > 0.9).sum() >= 4 and ((share - 0.5).abs() < 0.1).sum() >= 10


def test_norms_are_free_and_the_threshold_gives_k():
    crosscoder = train(Crosscoder(D, N, BatchTopK(2)), pairs(CONFIG.tokens).split(256), CONFIG).sae
    assert crosscoder.W_dec.norm(dim=1).std() > 0.01
    assert evaluate(crosscoder, pairs(4096, seed=1)).l0 == pytest.approx(2, rel=0.05)


def test_base_against_itself_stays_shared():
    x = pairs(CONFIG.tokens)[:, :1].expand(-1, 2, -1)
    for activation, price in ((ReLU(), 0.05), (BatchTopK(2), 0.0)):
        config = dataclasses.replace(CONFIG, sparsity=price)
        crosscoder = train(Crosscoder(D, N, activation), x.split(256), config).sae
        torch.testing.assert_close(*crosscoder.decoders, rtol=1e-3, atol=1e-4)


def test_resumes_bit_for_bit(tmp_path):
    def run(checkpoint, tokens):
        config = dataclasses.replace(CONFIG, tokens=4096)
        batches = iter(pairs(4096).split(256))
        fed = (next(batches) for _ in range(tokens // 256))
        crosscoder = Crosscoder(D, N, BatchTopK(2))
        return train(crosscoder, fed, config, checkpoint=checkpoint, save_every_minutes=0).sae

    with pytest.raises(ValueError, match="the batches ended"):
        run(tmp_path / "c", 2048)
    resumed, whole = run(tmp_path / "c", 4096), run(None, 4096)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_a_decoupled_latent_may_be_on_in_one_model_only():
    crosscoder, x = uneven(BatchTopK(3), kind=DecoupledCrosscoder).train(), pairs(32)
    latents, free = crosscoder.encode(x), crosscoder.pre_acts(x).relu()
    for m in (0, 1):
        worth = free * crosscoder.decoders[m].norm(dim=-1)
        least = worth.flatten().topk(3 * 32).values[-1]
        assert (latents[:, m] > 0).sum() == 3 * 32
        torch.testing.assert_close(latents[:, m], torch.where(worth >= least, free, 0))
        torch.testing.assert_close(crosscoder(x)[:, m], latents[:, m] @ crosscoder.decoders[m] + crosscoder.biases[m])
    assert ((latents[:, 0] > 0) != (latents[:, 1] > 0)).any()


def test_decoupled_training_equals_the_formula(monkeypatch):
    monkeypatch.setattr(products, "compute_dtype", lambda t: t.dtype)
    x, variance = pairs(48), torch.tensor(0.7)
    ours, twin = (uneven(BatchTopK(3), kind=DecoupledCrosscoder).train() for _ in range(2))
    training.forward(ours, x.flatten(1), variance, ALIVE, CONFIG, 0.0).loss.backward()
    f, on = twin.pre_acts(x).relu(), twin.encode(x) > 0
    errors = [x[:, m] - (f * on[:, m]) @ twin.decoders[m] - twin.biases[m] for m in (0, 1)]
    (sum(e.norm(dim=1).mean() / 2 for e in errors) / (variance / 2).sqrt()).backward()
    for (name, a), b in zip(ours.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_decoupled_thresholds_give_k_in_each_model():
    crosscoder = train(DecoupledCrosscoder(D, N, BatchTopK(2)), pairs(CONFIG.tokens).split(256), CONFIG).sae
    test = pairs(4096, seed=1)
    assert (crosscoder.encode(test) > 0).float().sum(-1).mean(0).tolist() == pytest.approx([2, 2], rel=0.07)
    quality = evaluate(crosscoder, test)
    assert quality.nmse < 0.3 and 2 <= quality.l0 <= 4


def test_bad_input():
    with pytest.raises(ValueError, match="a decoupled crosscoder ranks by BatchTopK, not TopK"):
        DecoupledCrosscoder(D, N, TopK(2))
    with pytest.raises(ValueError, match="unknown size of a latent 'max': use one of sum, joint"):
        Crosscoder(D, N, ReLU(), size="max")
    with pytest.raises(ValueError, match="Gated has no crosscoder: use ReLU, TopK or BatchTopK"):
        Crosscoder(D, N, Gated(N))
    with pytest.raises(ValueError, match="activations are 14 wide, the Crosscoder reads 32"):
        train(Crosscoder(D, N, ReLU()), [torch.randn(8, 2, 7)], CONFIG)


def test_pairs_may_come_side_by_side():
    config = dataclasses.replace(CONFIG, tokens=1024)
    x = pairs(1024)
    apart, flat = (train(Crosscoder(D, N, TopK(2)), each.split(256), config).sae for each in (x, x.flatten(1)))
    assert torch.equal(apart.W_dec, flat.W_dec) and torch.equal(apart(x), flat(x.flatten(1)))
