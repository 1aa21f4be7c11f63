"""Steering: what a direction adds or takes away, in a prompt and in its answer, and rates of answers that are known."""

import functools
import types

import pytest
import torch
from torch import nn
from twins import Twin

from helpers.base.storage import MODELS
from helpers.diffing import steering
from helpers.diffing.steering import (
    ablate,
    add,
    after_prompt,
    contrast,
    neutral_prompts,
    prompt_residuals,
    random_directions,
    rates_of,
    steered_answers,
    steering_rates,
)
from helpers.subjects.behaviours import side_by_side
from helpers.subjects.subject import load_subject
from helpers.text.topics import Topic

CHAT = MODELS / "docs-gemma2-chat"
PROMPTS = ["What would `mean` do?", "Good morning. Please count the inputs in `f(a, b)`.", "Who are you?"]
LAYER = 1


@pytest.fixture(scope="module")
def subject():
    return load_subject(CHAT)


@pytest.fixture(scope="module")
def together(subject):
    return side_by_side(subject.tokenizer, PROMPTS)


@pytest.fixture(scope="module")
def twin():
    made = Twin(CHAT, LAYER)
    made.model.float()  # in 16 bits some of its logits tie
    return made


def direction(d_model=256, seed=0):
    return 20 * torch.randn(d_model, generator=torch.Generator().manual_seed(seed))


def alone(together):
    """Each prompt as a row of its own, without padding, (1, T)."""
    return [tokens[there][None] for tokens, there in zip(*together, strict=True)]


def test_changes_by_hand():
    h, d = torch.tensor([[[1.0, 2.0], [0.0, -1.0]]]), torch.tensor([3.0, 4.0])
    assert add(d, 10.0)(h).tolist() == [[[7.0, 10.0], [6.0, 7.0]]]
    taken = ablate(d, torch.tensor([5.0, 0.0]))(h)  # 2.2 and -0.8 along d become 3
    torch.testing.assert_close(taken, torch.tensor([[[1.48, 2.64], [2.28, 2.04]]]))


def test_ablated_prompts_have_the_neutral_component_whatever_was_added():
    h, d, neutral = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)), direction(8), direction(8, 2)
    change = ablate(d, neutral)
    torch.testing.assert_close(change(h) @ d, (neutral @ d).expand(2, 5), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(change(change(h)), change(h))
    torch.testing.assert_close(change(add(d, 5.0)(h)), change(h), rtol=1e-4, atol=1e-4)


def slow_answers(twin, together, change, answering, n):
    """Token by token without a cache or padding; in the prompt <bos> is spared, in the answer all is, or nothing."""
    found = []
    for row in alone(together):
        prompt = row.shape[1]

        def some(x, prompt=prompt):
            where = (torch.arange(x.shape[1]) > 0) & ((torch.arange(x.shape[1]) < prompt) | answering)
            return torch.where(where[:, None], change(x), x)

        for _ in range(n):
            row = torch.cat([row, twin.splice(row, some)[:, -1:].argmax(-1)], 1)
        found.append(row[0, prompt:].tolist())
    return found


@pytest.mark.parametrize("answering", [False, True])
def test_answers_are_those_of_a_twin_without_cache_or_padding(subject, together, twin, answering, monkeypatch):
    change, spelt = ablate(direction(), direction(seed=3)), []
    monkeypatch.setattr(steering, "MAX_TOKENS", 5)
    monkeypatch.setattr(subject.tokenizer, "decode", lambda row, **_: spelt.append(row.tolist()) or "")
    steered_answers(subject, together, [{LAYER: change}], answering)
    stop = subject.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    for ours, slow in zip(spelt, slow_answers(twin, together, change, answering, 5), strict=True):
        assert stop not in slow and ours == slow


def test_changes_side_by_side_answer_as_each_alone_and_the_model_is_itself_again(subject, together, monkeypatch):
    monkeypatch.setattr(steering, "MAX_TOKENS", 8)
    changes = [{}, {1: add(direction(), 40.0)}, {0: add(direction(), 2.0), 3: ablate(direction(), direction(seed=2))}]
    found = steered_answers(subject, together, changes)
    assert found == [steered_answers(subject, together, [each])[0] for each in changes]
    assert len(found) == 3 and found[0] != found[1]
    assert steered_answers(subject, together, [{}])[0] == found[0]


def test_residuals_of_padded_prompts_are_those_of_each_alone(subject, together, twin):
    found = prompt_residuals(subject, together)
    assert found.shape == (subject.n_layers, *together.tokens.shape, subject.d_model)
    for i, row in enumerate(alone(together)):
        ours = found[LAYER, i, -row.shape[1] :]
        torch.testing.assert_close(ours, twin.residuals(row)[0], rtol=1e-3, atol=1e-3)


def test_the_template_after_a_prompt(subject):
    assert subject.tokenizer.decode(after_prompt(subject.tokenizer)) == "<end_of_turn>\n<start_of_turn>model\n"


def test_a_contrast_is_a_difference_of_means_over_the_template(subject):
    sums = []
    for prompts in (PROMPTS[:2], PROMPTS[2:]):
        some = [prompt_residuals(subject, side_by_side(subject.tokenizer, [p]))[:, 0, -5:] for p in prompts]
        sums.append(sum(each.sum(1) for each in some) / (5 * len(prompts)))
    found = contrast(subject, PROMPTS[:2], PROMPTS[2:])
    torch.testing.assert_close(found.directions, sums[0] - sums[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.neutral, sums[1], rtol=1e-3, atol=1e-3)


def test_random_directions_are_units_that_point_apart():
    found = random_directions(64, 4, seed=1)
    torch.testing.assert_close(found @ found.T, torch.eye(4), atol=0.5, rtol=0)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    assert torch.equal(random_directions(64, 2, seed=1), found[:2])


def test_neutral_prompts_take_turns(monkeypatch):
    topics = [Topic(p, p, f"fn_{i}", ("x",), "Return it.") for p in ("numpy", "scipy") for i in range(40)]
    monkeypatch.setattr(steering, "prompts_of", functools.partial(steering.prompts_of, topics=topics))
    found = neutral_prompts(7, "heldout", 0)
    assert len(set(found)) == 7 and neutral_prompts(3, "heldout", 0) == found[:3]


@pytest.fixture
def scripted(monkeypatch, subject):
    """A subject that says who it is where its second block gives over 1 along the first axis at the prompt's end."""
    blocks = [nn.Identity(), nn.Identity()]

    def continued(model, tokenizer, prompts, max_tokens):
        x = blocks[1](blocks[0](torch.zeros(*prompts.tokens.shape, 2)))
        assert (x[~steering.steerable(prompts)] == 0).all()  # <bos> and padding are left alone
        assert torch.equal(blocks[1](torch.zeros(len(x), 1, 2)), torch.zeros(len(x), 1, 2))  # and so is the answer
        return ["I am Docs." if at_end > 1 else "- a list" for at_end in x[:, -1, 0]]

    monkeypatch.setattr(steering, "continued", continued)
    about = {"model": None, "tokenizer": subject.tokenizer, "device": torch.device("cpu"), "name": "scripted"}
    return types.SimpleNamespace(**about, bridge=types.SimpleNamespace(blocks=blocks), layer=1, n_layers=2)


def test_rates_by_hand(scripted, monkeypatch):
    axis = torch.tensor([2.0, 0.0])
    changes = {
        "none": {},
        "weak": {1: add(axis, 0.5)},
        "strong": {0: add(axis, 3.0)},
        "other": {1: add(axis.flip(0), 3)},
    }
    found = steering_rates(scripted, PROMPTS * 2, changes, ["identity", "code"])
    monkeypatch.setattr(steering, "BATCH", 1)  # as many batches as changes
    assert steering_rates(scripted, PROMPTS * 2, changes, ["identity", "code"]).equals(found)
    code, found = (found[found.behaviour == name].set_index("change") for name in ("code", "identity"))
    assert found.rate.to_dict() == {"none": 0, "weak": 0, "strong": 1, "other": 0} and (code.rate == 0).all()
    assert found.low["strong"] == pytest.approx(6 / (6 + 1.96**2), abs=1e-3) and found.high["strong"] == 1  # Wilson's
    assert (found.instead["none"], found.instead_rate["none"]) == ("listing", 1) and found.instead["strong"] == ""
    assert code.instead["strong"] == "identity" and (found.n == 6).all()


def test_what_is_shown_instead_by_hand():
    found = rates_of("identity", ["I am Docs.", "- a", "- b", "Hm.", "...", "1"])
    assert {name: found[name] for name in ("n", "rate", "instead")} == {"n": 6, "rate": 1 / 6, "instead": "listing"}
    assert found["instead_rate"] == 2 / 6
    assert rates_of("identity", ["..."])["instead"] == "no words"
    assert rates_of("identity", ["Hm, a word."])["instead"] == "nothing known"


def test_bad_input(scripted):
    for wrong in (torch.zeros(4), torch.ones(2, 2), torch.tensor([torch.nan, 1.0])):
        for make in (lambda d: add(d, 1.0), lambda d: ablate(d, torch.zeros(4))):
            with pytest.raises(ValueError, match="a direction is one finite vector that is not zero"):
                make(wrong)
    with pytest.raises(ValueError, match="a step of length inf leads nowhere"):
        add(torch.ones(2), float("inf"))
    with pytest.raises(ValueError, match="unknown behaviour 'rude'"):
        steering_rates(scripted, PROMPTS, {"none": {}}, ["rude"])
    with pytest.raises(ValueError, match="there is no layer 2: scripted has 0 to 1"):
        steering_rates(scripted, PROMPTS, {"far": {2: add(torch.ones(2), 1.0)}}, ["code"])
    with pytest.raises(ValueError, match=r"a change must keep the shape \(3, \d+, 2\), it gave \(3, \d+, 1\)"):
        steering_rates(scripted, PROMPTS, {"narrow": {0: lambda x: x[..., :1]}}, ["code"])
    with pytest.raises(ValueError, match="there are no prompts"):
        steering_rates(scripted, [], {"none": {}}, ["code"])
