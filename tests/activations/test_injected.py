"""Planted directions: each kind is in the models it says, as strong and as often as it says, the same every time."""

import pytest
import torch

from helpers.activations.injected import InjectedPair, MovedPair, Plan
from helpers.activations.stream import ActivationStream, Harvest
from helpers.subjects.subject import Subject

D = 8


class Background:
    """Stands in for a Subject: the residual of token t is a fixed random vector."""

    name, site, device, dtype, d_model, context = "noise", "here", torch.device("cpu"), torch.float32, D, 64
    fingerprint, head = "noise", None
    rows = Subject.rows

    def padding(self, tokens):
        return torch.zeros(tokens.shape, dtype=torch.bool)

    def residuals(self, tokens):
        return torch.randn(1000, D, generator=torch.Generator().manual_seed(0))[tokens]


def stream(n=4096, batch_size=512):
    tokens = torch.randint(0, 1000, (n,), generator=torch.Generator().manual_seed(1))
    harvest = Harvest(context=16, drop="none", normalisation="none")
    return ActivationStream(Background(), tokens, harvest, batch_size=batch_size)


PLAN = Plan(each=2, rhos=(0.25, 0.5), rate=0.05, strength=2.0, rotation=0.0)


def test_base_and_chat_by_definition():
    pair = InjectedPair(stream(), PLAN)
    [(x, truth), *_] = pair.with_truth(512)
    background = next(stream().batches(512))
    torch.testing.assert_close(x[:, 0], background + truth.base @ pair.directions)
    torch.testing.assert_close(x[:, 1], background + truth.chat @ pair.directions)
    torch.testing.assert_close(pair.directions.norm(dim=1), torch.ones(12))


def test_every_kind_is_where_it_should_be():
    pair = InjectedPair(stream(), PLAN)
    truth = pair.sample(torch.randn(20_000, D), seed=0)[1]
    assert pair.labels == [
        kind for kind in ("chat-only", "base-only", "shared", "context", "weak", "weak") for _ in "ab"
    ]
    base, chat = truth.base.T, truth.chat.T
    assert (base[:2] == 0).all() and (chat[:2] > 0).any(1).all()
    assert (chat[2:4] == 0).all() and (base[2:4] > 0).any(1).all()
    assert torch.equal(base[4:6], chat[4:6]) and (chat[4:6] > 0).any(1).all()
    on = torch.stack([base[6:8] > 0, chat[6:8] > 0])  # of the context directions: (model, direction, token)
    cases = torch.stack([on.all(0), on[1] & ~on[0], on[0] & ~on[1]]).sum(-1) / on.any(0).sum(-1)
    assert ((cases - 1 / 3).abs() < 0.05).all()  # both, chat alone, base alone
    assert torch.equal(base[6:8][on.all(0)], chat[6:8][on.all(0)])
    torch.testing.assert_close(base[8:10], 0.25 * chat[8:10])
    torch.testing.assert_close(base[10:12], 0.5 * chat[10:12])
    rho = pair.rho.tolist()
    assert rho[:6] == [0, 0, torch.inf, torch.inf, 1, 1] and rho[8:] == [0.25, 0.25, 0.5, 0.5]
    assert pair.rho[6:8].isnan().all()


def test_exact_delta_is_that_of_the_rows_that_least_squares_gives():
    pair = InjectedPair(stream(), PLAN)
    base, chat = (strength.double() for strength in pair.sample(torch.randn(20_000, D), seed=0)[1])
    on = torch.maximum(base, chat)  # of a latent that fires wherever its direction is
    base, chat = (((on * each).sum(0) / on.square().sum(0)) for each in (base, chat))
    slow = 0.5 * (1 + (chat - base) / torch.maximum(base, chat))
    torch.testing.assert_close(pair.delta.double(), slow, atol=0.03, rtol=0)
    assert pair.delta.tolist() == [1, 1, 0, 0, 0.5, 0.5, 0.5, 0.5, 0.875, 0.875, 0.75, 0.75]


def test_rate_and_strength():
    pair = InjectedPair(stream(), PLAN)
    chat = pair.sample(torch.randn(20_000, D), seed=0)[1].chat[:, :2]
    assert (chat > 0).float().mean().item() == pytest.approx(0.05, rel=0.1)
    sample = torch.cat(list(stream().batches()))
    norm = (sample - sample.mean(0)).norm(dim=1).mean().item()
    assert chat[chat > 0].mean().item() == pytest.approx(2.0 * norm, rel=0.05)
    assert chat[chat > 0].min() >= 0.5 * 2.0 * norm and chat.max() <= 1.5 * 2.0 * norm


def test_rotation_turns_the_background_a_little_and_keeps_norms():
    pair = InjectedPair(stream(), Plan(each=1, rate=1e-9, rotation=0.1))
    x = next(pair.batches(512))
    base, chat = x.unbind(1)
    torch.testing.assert_close(chat.norm(dim=1), base.norm(dim=1), rtol=1e-4, atol=1e-4)
    angle = torch.nn.functional.cosine_similarity(base, chat).arccos()
    assert 0.03 < angle.mean() < 0.3


def test_the_same_every_time_and_another_with_another_seed_or_plan():
    first, again = (torch.cat(list(InjectedPair(stream(), PLAN).batches(1024))) for _ in range(2))
    assert torch.equal(first, again)
    pairs = [InjectedPair(stream(), PLAN), InjectedPair(stream(), PLAN, seed=1), InjectedPair(stream(), Plan(each=2))]
    assert len({pair.fingerprint for pair in pairs}) == 3
    assert not torch.equal(pairs[1].directions, pairs[0].directions)
    x = torch.randn(64, D)
    assert not torch.equal(pairs[0].sample(x, seed=0)[0], pairs[0].sample(x, seed=1)[0])


def test_batches_differ_in_what_is_planted():
    truths = [truth.chat > 0 for _, truth in InjectedPair(stream(), PLAN).with_truth(1024)]
    assert len(truths) == 2 and not torch.equal(*truths)


def test_bad_plans():
    for change in ({"rate": 0.0}, {"each": 0}, {"strength": 0.0}, {"rate": 1.5}):
        with pytest.raises(ValueError, match="plant nothing: give a rate"):
            Plan(**change)


def test_moved_directions_are_in_chat_wherever_they_are_and_in_base_at_two_thirds():
    pair, x = MovedPair(stream(), PLAN), torch.randn(20_000, D)
    moved, plain = pair.sample(x, seed=0)[1], InjectedPair(stream(), PLAN).sample(x, seed=0)[1]
    base, chat = moved.base[:, 6:8], moved.chat[:, 6:8]  # of the context directions
    assert torch.equal(base, plain.base[:, 6:8]) and ((base == chat) | (base == 0)).all()
    assert ((base > 0).sum(0) / (chat > 0).sum(0) - 2 / 3).abs().max() < 0.05
    others = [i for i in range(12) if i not in (6, 7)]
    assert torch.equal(moved.chat[:, others], plain.chat[:, others])
    assert pair.fingerprint != InjectedPair(stream(), PLAN).fingerprint
