"""The grid asks for every layer, step and control, at one length for all; no model is run."""

import types

import pandas as pd
import pytest
import torch

from helpers.diffing import steering_grid
from helpers.diffing.steering import Contrast
from helpers.diffing.steering_grid import ablated, added, contrasts

SUBJECT = types.SimpleNamespace(d_model=2, n_layers=4, layer=2)
FITTED = {
    "identity": Contrast(torch.tensor([[3.0, 4.0]] * 4), torch.zeros(4, 2)),  # 5 long
    "brief": Contrast(torch.tensor([[0.0, 7.0]] * 4), torch.zeros(4, 2)),
}
LATENTS = {"diff-SAE": {"brief": torch.tensor([0.5, 0.0])}}


@pytest.fixture(autouse=True)
def prompts(monkeypatch):
    monkeypatch.setattr(steering_grid, "neutral_prompts", lambda n, *which: [("neutral", i, *which) for i in range(n)])
    monkeypatch.setattr(steering_grid, "prompts_of", lambda name, n, *which: [(name, i, *which) for i in range(n)])


@pytest.fixture
def asked(monkeypatch):
    calls = []

    def rates(subject, prompts, changes, shown, answering=False):
        calls.append((prompts, changes, answering))
        return pd.DataFrame([{"change": name, "behaviour": each, "rate": 0.5} for name in changes for each in shown])

    monkeypatch.setattr(steering_grid, "steering_rates", rates)
    return calls


def test_steps_are_equally_long_for_direction_latent_and_chance(asked):
    found = added(SUBJECT, FITTED, LATENTS, [0, 2], [1.0, 3.0], n_controls=3, n=5, seed=0)
    assert found.groupby(["by", "layers"]).size().to_dict() == {
        ("diff-SAE", "2"): 2,  # steps
        ("direction", "0"): 4,  # behaviours and steps
        ("direction", "2"): 4,
        ("random", "0"): 12,  # controls, behaviours and steps
        ("random", "2"): 12,
    }
    for prompts, changes, answering in asked:
        assert prompts == [("neutral", i, "heldout", 0) for i in range(5)] and not answering
        for step, change in changes.items():
            ((_, move),) = change.items()
            assert move(torch.zeros(1, 1, 2)).norm().item() == pytest.approx(6 * step)  # the mean of 5 and 7


def test_ablations_are_asked_at_each_layer_and_at_the_inner_ones_together(asked):
    found = ablated(SUBJECT, FITTED, LATENTS, [0, 2], n_controls=3, n=5, seed=0)
    one = found[found.behaviour == "brief"]
    assert one.groupby(["by", "layers", "where"]).size().to_dict() == {
        ("diff-SAE", "2", "prompt and answer"): 1,
        ("direction", "0", "prompt and answer"): 1,
        ("direction", "1 to 2", "prompt"): 1,
        ("direction", "1 to 2", "prompt and answer"): 1,
        ("direction", "2", "prompt and answer"): 1,
        ("nothing", "none", "prompt and answer"): 1,
        ("random", "1 to 2", "prompt and answer"): 3,
        ("random", "2", "prompt and answer"): 3,
    }
    assert len(found) == 2 * len(one) - 1  # of identity no latent is known
    inner = [(set(c["direction"]), answering) for _, c, answering in asked if len(c.get("direction", {})) > 1]
    assert inner == [({1, 2}, True), ({1, 2}, False)] * 2
    assert {prompts[0] for prompts, _, _ in asked} == {(name, 0, "heldout", 0) for name in FITTED}
    moved = asked[-1][1]["diff-SAE"][2](torch.tensor([[[2.0, 2.0]]]))
    assert moved.tolist() == [[[0.0, 2.0]]]


def test_a_contrast_of_each_behaviour_with_the_same_neutral_prompts(monkeypatch):
    monkeypatch.setattr(steering_grid, "contrast", lambda subject, triggered, neutral: (triggered, neutral))
    found = contrasts(SUBJECT, ["identity", "brief"], 4, seed=1)
    assert list(found) == ["identity", "brief"] and found["identity"][1] == found["brief"][1]
    assert [found["brief"][i][3] for i in range(2)] == [("brief", 3, "train", 1), ("neutral", 3, "train", 1)]
