"""Views of a pair, what they are trained on and stored as, and the bridge between a crosscoder and a diff-SAE."""

import dataclasses

import pytest
import torch
from twins import CountingSubject

from helpers.activations.stream import ActivationStream, Harvest
from helpers.activations.views import VIEWS, ViewedStream, view_of
from helpers.base import products
from helpers.dictionaries import training
from helpers.dictionaries.autoencoders import BatchTopK, ReLU, SparseAutoencoder
from helpers.dictionaries.crosscoders import Crosscoder
from helpers.dictionaries.quality import evaluate
from helpers.dictionaries.sweeps import Cell, CrosscoderCell, sweep
from helpers.dictionaries.training import TrainConfig
from helpers.diffing.latent_scaling import sae_table

D, N = 8, 16
PAIR = torch.tensor([[[1.0, 2.0], [4.0, 8.0]], [[0.0, 0.0], [-1.0, 1.0]]])  # two tokens


class Pairs:
    """A stream of pairs: common noise, and two directions that only the second model has."""

    batch_size, fingerprint = 64, "pairs"

    def batches(self, n_tokens, batch_size=None):
        return (self.draw(64, i) for i in range(n_tokens // 64))

    def draw(self, n, seed):
        random = torch.Generator().manual_seed(seed)
        common = torch.randn(n, D, generator=random)
        own = torch.zeros(n, D)
        chance = torch.rand(n, generator=random)
        own[:, 0], own[:, 1] = 3 * (chance < 0.2), 3 * (chance > 0.8)
        return torch.stack([common, common + own], 1)


def test_views_by_hand():
    assert view_of(PAIR, "difference").tolist() == [[3.0, 6.0], [-1.0, 1.0]]
    assert view_of(PAIR, "chat").tolist() == [[4.0, 8.0], [-1.0, 1.0]]
    assert view_of(PAIR, "base").tolist() == [[1.0, 2.0], [0.0, 0.0]]


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_reads_what_the_pair_reads_in_its_order(view):
    viewed, whole = ViewedStream(Pairs(), view), Pairs().batches(256)
    for found, x in zip(viewed.batches(256), whole, strict=True):
        assert torch.equal(found, view_of(x, view))


def test_pairs_that_come_side_by_side():
    harvest = Harvest(context=8, normalisation="none")
    stream = ActivationStream(CountingSubject(), torch.arange(64), harvest, batch_size=16)  # (id, position | 1, 2)
    [batch] = ViewedStream(stream, "difference").batches(8, 8)
    [both] = stream.batches(8, 8)
    assert batch.tolist() == (both[:, 2:] - both[:, :2]).tolist()


def test_views_are_told_apart_and_so_are_streams():
    other = type("Other", (Pairs,), {"fingerprint": "others"})()
    streams = [ViewedStream(of, view) for of in (Pairs(), other) for view in VIEWS]
    assert len({stream.fingerprint for stream in streams} | {"pairs", "others"}) == 8
    assert ViewedStream(Pairs(), "chat").fingerprint == ViewedStream(Pairs(), "chat").fingerprint


def test_other_processes_get_the_streams_own_reader():
    class Cached(Pairs):
        def reader(self):
            return Reader()

    class Reader(Pairs):
        pass

    reader = ViewedStream(Cached(), "chat").reader()
    assert type(reader.stream) is Reader and reader.view == "chat"
    assert type(ViewedStream(Pairs(), "chat").reader().stream) is Pairs


def test_a_sweep_stores_each_view_apart_and_the_diff_sae_rebuilds_the_difference(tmp_path):
    cell, heldout = Cell("BatchTopK", N, 1, lr=0.01), Pairs().draw(1024, 10**6)
    found = {}
    for view in VIEWS:
        stream = ViewedStream(Pairs(), view)
        for _ in range(2):  # the second time it is loaded
            found[view] = sweep([cell], stream.batches, view_of(heldout, view), 12_800, tmp_path).saes[cell]
    assert len(list(tmp_path.glob("*.safetensors"))) == len(VIEWS)
    assert evaluate(found["difference"], view_of(heldout, "difference")).nmse < 0.05
    torch.testing.assert_close(found["difference"].W_dec.norm(dim=-1), torch.ones(N), atol=1e-4, rtol=0)


def test_a_ratio_by_hand():
    sae = SparseAutoencoder(2, 2, ReLU())
    sae.W_enc.data = sae.W_dec.data = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    table = sae_table(sae, "chat", torch.tensor([[[1.0, 0.0], [4.0, 0.0]], [[2.0, 1.0], [1.0, 1.0]]]))
    assert table.rate.tolist() == [1.0, 0.0]
    assert table.nu_activation[0] == pytest.approx((4 * 1 + 1 * 2) / (4 * 4 + 1 * 1))  # sums of f times both models' x
    assert table.nu_activation.isna().tolist() == [False, True]


def some_crosscoder(bridge=0.0, squared=True):
    crosscoder = Crosscoder(D, N, BatchTopK(3), squared=squared, bridge=bridge).train()
    random = torch.Generator().manual_seed(2)
    for parameter in crosscoder.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=random)
    return crosscoder


def loss_of(crosscoder, x, variance):
    config = TrainConfig(tokens=1024)
    return training.forward(crosscoder, x.flatten(1), variance, torch.zeros(N, dtype=torch.bool), config, 0.0).loss


@pytest.mark.parametrize("bridge", [-0.25, -0.5, -1.0])
def test_loss_and_gradients_with_a_bridge_equal_the_formula(bridge, monkeypatch):
    monkeypatch.setattr(products, "compute_dtype", lambda t: t.dtype)
    x, variance = Pairs().draw(48, 0), torch.tensor(0.7)
    ours, twin = some_crosscoder(bridge), some_crosscoder(bridge)
    loss = loss_of(ours, x, variance)
    base, chat = (x - twin(x)).unbind(1)
    rows = [c @ c + b @ b + 2 * bridge * (c @ b) for b, c in zip(base, chat, strict=True)]
    slow = torch.stack(rows).mean() / variance
    torch.testing.assert_close(loss, slow)
    loss.backward(), slow.backward()
    for a, b in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


def test_the_ends_of_the_bridge(monkeypatch):
    monkeypatch.setattr(products, "compute_dtype", lambda t: t.dtype)
    x, variance = Pairs().draw(48, 0), torch.tensor(1.0)
    crosscoder = some_crosscoder(-1.0)
    missed = view_of(x, "difference") - view_of(crosscoder(x), "difference")
    torch.testing.assert_close(loss_of(crosscoder, x, variance), missed.square().sum(1).mean())
    nearly = some_crosscoder(-1e-9)
    torch.testing.assert_close(loss_of(nearly, x, variance), loss_of(some_crosscoder(), x, variance))


def test_error_of_the_difference_per_row():
    base, chat = (Pairs().draw(48, 0) - some_crosscoder()(Pairs().draw(48, 0))).detach().double().unbind(1)
    apart = chat.square().sum(1) + base.square().sum(1) - 2 * (chat * base).sum(1)
    torch.testing.assert_close((chat - base).square().sum(1), apart)


def test_at_the_far_end_the_common_part_is_not_rebuilt(tmp_path):
    near = CrosscoderCell("BatchTopK", N, 1, lr=0.01, squared=True)
    cells, heldout = [near, dataclasses.replace(near, bridge=-1.0)], Pairs().draw(1024, 10**6)
    saes = list(sweep(cells, Pairs().batches, heldout, 12_800, tmp_path).saes.values())
    errors = [
        (view_of(heldout, view) - view_of(sae(heldout), view)).detach().square().sum(1).mean().item()
        for sae in saes
        for view in ("difference", "chat")
    ]
    assert errors[2] < 0.3 < errors[0] and errors[3] > errors[1]


def test_without_a_bridge_nothing_that_is_stored_changes_its_name():
    usual = {"init_norm": 1.0, "size": "sum", "squared": True, "decoupled": False}
    cell = CrosscoderCell("BatchTopK", N, 1, squared=True)
    assert cell.switches() == usual and "bridge" not in cell.build(D).switches
    bridged = dataclasses.replace(cell, bridge=-1)
    assert bridged.switches() == usual | {"bridge": -1.0} and bridged.build(D).switches["bridge"] == -1.0
    assert bridged.build(D).switches["squared"] and dataclasses.replace(bridged, decoupled=True).build(D).bridge == -1.0


def test_bad_input():
    with pytest.raises(ValueError, match="there is no view 'sum' of a pair: choose of difference, chat, base"):
        ViewedStream(Pairs(), "sum")
    with pytest.raises(ValueError, match=r"have shape \(..., 2, d_model\), not \(5, 3\)"):
        view_of(torch.zeros(5, 3), "chat")
    for bridge, squared in ((-0.5, False), (0.5, True), (-1.5, True)):
        with pytest.raises(ValueError, match="a bridge is from 0 to -1, and needs squared=True"):
            Crosscoder(D, N, ReLU(), squared=squared, bridge=bridge)
