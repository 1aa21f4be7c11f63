"""What a run takes, as counted, is what its tensors and its messages take."""

import dataclasses

import pytest
import torch

from helpers.base import products
from helpers.dictionaries import paper_scale, shards
from helpers.dictionaries.autoencoders import SparseAutoencoder, TopK
from helpers.dictionaries.dead_latents import AuxK
from helpers.dictionaries.paper_scale import PAPERS, Machine, Run, memory_bytes, plan, step_seconds, traffic_bytes
from helpers.dictionaries.sharded import split
from helpers.dictionaries.training import TrainConfig, Training

RUN = Run(d=16, n_latents=50, k=4, tokens=6400, batch=64, k_aux=6)


class OneOfTwo:
    """Stands in for a group: the other process offers and adds nothing; what this one would receive is counted."""

    rank, size = staticmethod(lambda: 0), staticmethod(lambda: 2)

    def __init__(self, monkeypatch):
        self.received = 0
        monkeypatch.setattr(shards, "gathered", self.gathered)
        monkeypatch.setattr(shards, "_added", self.added)

    def gathered(self, x, group):
        self.received += x.nbytes
        return torch.stack([x, torch.zeros_like(x) if x.is_floating_point() else x])

    def added(self, x, group):
        self.received += x.nbytes if x.dim() > 1 else 0  # 2 (p - 1) / p; counts and b_dec's gradient are not a token's
        return x


def training(run, group=None):
    sae = SparseAutoencoder(run.d, run.n_latents, TopK(run.k))
    config = TrainConfig(10**6, ema=0.9 if run.ema else 0.0, remedy=AuxK(k=run.k_aux))
    x = torch.randn(run.batch, run.d, generator=torch.Generator().manual_seed(0))
    return Training(split(sae, group) if group else sae, config, x), x


@pytest.mark.parametrize("ema", [False, True])
def test_state_is_all_that_a_checkpoint_holds(ema):
    run = dataclasses.replace(RUN, ema=ema)
    held = sum(t.nbytes for name, t in training(run)[0]._tensors().items() if name not in ("variance", "recent"))
    assert memory_bytes(run, 1, 4, gpu=False)["state"] == held


def test_state_of_two_processes_is_that_of_half_the_latents(monkeypatch):
    held = training(RUN, OneOfTwo(monkeypatch))[0]._tensors()
    held = sum(t.nbytes for name, t in held.items() if name not in ("variance", "recent"))
    assert memory_bytes(RUN, 2, 4, gpu=False)["state"] == held


def test_memory_holds_the_pairs_of_auxk_as_well_which_are_more_than_those_that_are_on():
    with_auxk, without = (
        memory_bytes(run, 1, 4, gpu=False)["working"] for run in (RUN, dataclasses.replace(RUN, k_aux=0))
    )
    assert with_auxk - without == 48 * RUN.k_aux * RUN.batch
    gpt_2 = PAPERS["GPT-2, 131 thousand"]
    assert memory_bytes(gpt_2, 1, 2, gpu=True)["working"] > 48 * 512 * gpt_2.batch


@pytest.mark.parametrize("dead", [False, True])
def test_traffic_is_what_a_step_sends(dead, monkeypatch):
    monkeypatch.setattr(products, "has_fast_bf16", lambda *_: False)
    group = OneOfTwo(monkeypatch)
    running, x = training(RUN, group)
    running.silent += 10**9 * dead
    group.received = 0
    running.step(x)
    assert traffic_bytes(RUN, 2, 4, dead) == group.received


def test_one_process_sends_nothing():
    assert traffic_bytes(RUN, 1, 2, dead=True) == 0


def test_seconds_by_hand():
    """2 latents of width 3, one on, 5 tokens: 60 FLOP; and 32 bytes for each of 12 numbers, 12 for each of 10
    pre-activations, 16 for each of 15 numbers that are summed: 744 bytes."""
    run = Run(d=3, n_latents=2, k=1, tokens=5, batch=5, ema=False)
    machine = Machine(products=10.0, memory=100.0, link=1.0)
    assert step_seconds(run, 1, machine, 4) == pytest.approx(60 / 10 + 744 / 100)


def test_a_plan_adds_up_and_memory_falls_with_processes():
    run = PAPERS["GPT-4, 16 million"]
    table = plan(run, (1, 8, 16, 32))
    assert (table["memory GB"].diff().dropna() < 0).all() and (table["state GB"] < table["memory GB"]).all()
    assert table["state GB"][1] == pytest.approx(16 * 2 * 768 * 2**24 / 1e9, rel=1e-3)
    assert table["days"][8] == pytest.approx(table["seconds"][8] * 4e10 / 2**17 / 86_400)


def test_the_plan_is_held_against_steps(monkeypatch):
    monkeypatch.setattr(paper_scale, "measure_machine", lambda group: Machine(1e9, 1e9, 1e9))
    table = paper_scale.against_measured([(8, 32, 2, 16), (8, 64, 2, 16)], repeats=1)
    assert list(table.n_latents) == [32, 64] and (table.measured > 0).all()
    assert table.ratio.tolist() == pytest.approx((table.measured / table.planned).tolist())


def test_rates_are_measured():
    machine = paper_scale.measure_machine(repeats=1)
    assert machine.products > 1e8 and machine.memory > 1e7 and machine.link == float("inf")
