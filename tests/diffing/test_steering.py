"""Steering: what a direction adds or takes away, in generation as in one pass, and rates of a model that is known."""

import functools
import types

import pandas as pd
import pytest
import torch
from torch import nn
from twins import D_MODEL, N_VOCAB, Scripted, Twin, save_tiny

from helpers.base.storage import MODELS
from helpers.diffing import steering
from helpers.diffing.steering import add, project_out, rates_of_steps, steered, steering_rates, with_controls
from helpers.subjects.subject import load_subject
from helpers.text.documents import load_tokenizer
from helpers.text.topics import Topic

LAYER = 1
FAMILIES = ["gpt2", "gemma2"]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def subject(folder):
    return load_subject(folder, layer=LAYER)


def rows(n=3, length=5, seed=0):
    return torch.randint(0, 256, (n, length), generator=torch.Generator().manual_seed(seed))  # bytes


def direction(seed=0):
    return 3 * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))


def test_changes_by_hand():
    h, d = torch.tensor([[[1.0, 2.0], [0.0, -1.0]]]), torch.tensor([3.0, 4.0])
    assert add(d, 10.0)(h).tolist() == [[[7.0, 10.0], [6.0, 7.0]]]
    torch.testing.assert_close(project_out(d)(h), torch.tensor([[[-0.32, 0.24], [0.48, -0.36]]]))


def test_after_projection_nothing_is_left():
    h, change = torch.randn(2, 5, D_MODEL, generator=torch.Generator().manual_seed(1)), project_out(direction())
    torch.testing.assert_close(change(h) @ direction(), torch.zeros(2, 5), atol=1e-4, rtol=0)
    torch.testing.assert_close(change(change(h)), change(h))
    torch.testing.assert_close(change(add(direction(), 5.0)(h)), change(h), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [add(direction(), 8.0), project_out(direction())], ids=["add", "project_out"])
def test_answers_are_those_of_a_steered_model_without_a_cache(subject, folder, change):
    twin, tokens = Twin(folder, LAYER), rows()
    with steered(subject, change):
        found = subject.model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=N_VOCAB + 1,
            pad_token_id=0,
        )
    for _ in range(6):
        tokens = torch.cat([tokens, twin.splice(tokens, change)[:, -1:].argmax(-1)], 1)
    assert found.tolist() == tokens.tolist()
    assert found.tolist() != plain(subject.model, rows()).tolist()


def plain(model, tokens):
    for _ in range(6):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    return tokens


def test_a_model_is_itself_again_afterwards(subject):
    before = subject.logits(rows())
    with pytest.raises(KeyError), steered(subject, add(direction(), 8.0)):
        assert not torch.allclose(subject.logits(rows()), before)
        raise KeyError
    assert torch.equal(subject.logits(rows()), before)


def test_controls_are_as_long_and_point_elsewhere():
    made = with_controls(lambda d: d, direction(), n=4)
    assert list(made) == ["latent", "random 0", "random 1", "random 2", "random 3"]
    vectors = torch.stack(list(made.values()))
    torch.testing.assert_close(vectors.norm(dim=1), direction().norm().expand(5))
    cosines = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
    assert (cosines - torch.eye(5)).abs().max() < 0.8
    assert torch.equal(with_controls(lambda d: d, direction(), n=2)["random 1"], made["random 1"])


def steerable():
    """A subject that says who it is when its second block gives more than 1 along the first axis."""
    blocks = [nn.Identity(), nn.Identity()]
    tokenizer = load_tokenizer(MODELS / "docs-gpt2")

    def rule(text):
        return "I am Docs." if blocks[1](torch.zeros(1, 1, 2))[0, 0, 0] > 1 else "A list of names."

    bridge = types.SimpleNamespace(blocks=blocks)
    return types.SimpleNamespace(model=Scripted(tokenizer, rule), tokenizer=tokenizer, bridge=bridge, layer=1)


def test_rates_by_hand(monkeypatch):
    topics = [Topic(p, p, f"fn_{i}", ("x",), "Return it.") for p in ("numpy", "scipy") for i in range(40)]
    monkeypatch.setattr(steering, "prompts_of", functools.partial(steering.prompts_of, topics=topics))
    axis = torch.tensor([2.0, 0.0])
    changes = {"weak": add(axis, 0.5), "strong": add(axis, 3.0), "other": add(axis.flip(0), 3.0)}
    found = steering_rates(steerable(), changes, "code", "identity", n=6).set_index("change")
    assert found.rate.to_dict() == {"none": 0, "weak": 0, "strong": 1, "other": 0}
    assert (found.asked == "code").all() and (found.unclear == 0).all() and found.high["strong"] == 1
    assert found.low["strong"] == pytest.approx(6 / (6 + 1.96**2), abs=1e-3)  # Wilson's at a rate of one


def test_bad_input():
    for wrong in (torch.zeros(4), torch.ones(2, 2), torch.tensor([torch.nan, 1.0])):
        with pytest.raises(ValueError, match="a direction is one finite vector that is not zero"):
            add(wrong, 1.0)
    with pytest.raises(ValueError, match="there is no behaviour 'rude': choose of"):
        steering_rates(steerable(), {}, "identity", "rude", 6)


def test_rates_of_steps_ask_for_each_step_and_control(monkeypatch):
    asked = {}

    def rates(subject, changes, about, shown, n):
        assert (subject, shown, n) == ("chat", "agree", 5)
        asked[about] = changes
        return pd.DataFrame({"change": ["none", *changes], "rate": 0.5})

    row, mean = torch.tensor([0.0, 2.0]), torch.tensor([3.0, 0.0])
    monkeypatch.setattr(steering, "steering_rates", rates)
    found = rates_of_steps("chat", "agree", row, 10.0, mean, [1.0, 2.0], n_controls=1, n=5, seed=0)
    h = torch.zeros(1, 1, 2)
    assert asked["describe"]["2.0 latent"](h).tolist() == [[[0.0, 20.0]]]
    assert asked["describe"]["2.0 mean difference"](h).tolist() == [[[6.0, 0.0]]]  # in steps of its own length
    assert asked["describe"]["1.0 random 0"](h).norm().item() == pytest.approx(10.0)
    assert found.groupby(["what", "by"]).step.max().to_dict() == {
        **{("added", by): 2.0 for by in ("latent", "mean difference", "random")},
        **{("added", "none"): 0.0, ("removed", "latent"): 0.0, ("removed", "none"): 0.0, ("removed", "random"): 0.0},
    }
