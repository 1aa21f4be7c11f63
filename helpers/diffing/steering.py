"""Does a direction make the model behave? Add it to a prompt as the model reads it, or take it out, and let it answer.

    add      x + s d                         d: mean of x over the template after a behaviour's prompts, less m
    ablate   x - ((x - m) . d) d / |d|^2     m: that mean after neutral prompts, those of behaviours that base shares

Both happen after chosen blocks and at every position of the prompt but <bos>. In the answer nothing is added: a step
towards "the answer begins with I" at each of its tokens gives "I I I I". There the model reads the decision anew from
the prompt, so what is ablated may be ablated in the answer as well. The component goes to its neutral mean m and not to
zero, since residuals are not centred, and zero may be further from every prompt than what was there.

The control is a random direction in d's place: a model that is pushed hard enough changes its answers whatever it is
pushed by. `instead` says what the answers show where they do not show the behaviour.

Source: released code of Minder, Dumas et al. 2025, which adds at all positions and projects out to zero; section 2.8 of
the facts.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from helpers.base.checks import require_finite
from helpers.subjects.behaviours import Prompts, continued, judge, prompts_of, side_by_side
from helpers.subjects.subject import Subject
from helpers.text.dialogues import BEHAVIOURS
from helpers.text.documents import TURNS

Change = Callable[[Tensor], Tensor]  # residuals (B, T, d_model) of the prompts after a block to others of that shape
Changes = Mapping[int, Change]  # by layer
BATCH = 256  # prompts answered together
MAX_TOKENS = 32  # of an answer; the signs of a behaviour stand in its first sentence or two
NEUTRAL = [name for name, behaviour in BEHAVIOURS.items() if behaviour.kind == "shared"]


def add(direction: Tensor, length: float) -> Change:
    """A step of some length along a direction (d_model,).

    Raises ValueError for a zero direction, and for a length that is not finite.
    """
    if not math.isfinite(length):
        raise ValueError(f"a step of length {length} leads nowhere: give a finite length")
    step = length * _unit(direction)
    return lambda x: x + step.to(x)


def ablate(direction: Tensor, neutral: Tensor) -> Change:
    """The component along a direction becomes that of the neutral mean, both (d_model,).

    Raises ValueError for a zero direction, and for a mean that is not finite.
    """
    unit = _unit(direction)
    require_finite(neutral, "numbers of the neutral mean", "check the prompts and the subject's dtype")
    return lambda x: x - ((x - neutral.to(x)) @ unit.to(x)).unsqueeze(-1) * unit.to(x)


def random_directions(d_model: int, n: int, seed: int = 0) -> Tensor:
    """n random directions of length 1, (n, d_model); the first of more are the same."""
    draws = torch.randn(n, d_model, generator=torch.Generator().manual_seed(seed))
    return F.normalize(draws, dim=-1)


# ---- where, and what is there


def after_prompt(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of the template between a prompt and its answer."""
    row = side_by_side(tokenizer, ["a"]).tokens[0].tolist()
    return row[row.index(tokenizer.convert_tokens_to_ids(TURNS[1])) :]


def steerable(prompts: Prompts) -> Tensor:
    """All positions but padding and <bos>, (B, T) bool."""
    return prompts.there & (prompts.there.cumsum(1) > 1)


@contextlib.contextmanager
def at_blocks(subject: Subject, hook: Callable[[int, Tensor], Tensor | None], layers: Sequence[int]) -> Iterator[None]:
    """While it lasts, `hook(layer, x)` sees what these blocks give, and gives what they shall give, if anything."""

    def on(layer: int) -> Callable:
        def forward_hook(module: torch.nn.Module, inputs: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
            x = output if isinstance(output, Tensor) else output[0]
            changed = hook(layer, x)
            return changed if changed is None or isinstance(output, Tensor) else (changed, *output[1:])

        return forward_hook

    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.callback(subject.bridge.blocks[layer].register_forward_hook(on(layer)).remove)
        yield


@torch.no_grad()
def prompt_residuals(subject: Subject, prompts: Prompts) -> Tensor:
    """The residual stream after every block, (n_layers, B, T, d_model)."""
    found: dict[int, Tensor] = {}
    tokens, there = (tensor.to(subject.device) for tensor in prompts)
    with at_blocks(subject, lambda layer, x: found.update({layer: x}), range(subject.n_layers)):
        positions = (there.cumsum(1) - 1).clamp(min=0)
        subject.model(input_ids=tokens, attention_mask=there.long(), position_ids=positions, use_cache=False)
    return torch.stack([found[layer] for layer in range(subject.n_layers)])


class Contrast(NamedTuple):
    """What a behaviour's prompts leave over the template after them, and neutral prompts do not."""

    directions: Tensor  # (n_layers, d_model)
    neutral: Tensor  # (n_layers, d_model), the mean of the neutral prompts


def contrast(subject: Subject, triggered: Sequence[str], neutral: Sequence[str]) -> Contrast:
    """Raises ValueError where either has no prompts."""
    width = len(after_prompt(subject.tokenizer))
    means = [
        prompt_residuals(subject, side_by_side(subject.tokenizer, prompts))[:, :, -width:].mean((1, 2))
        for prompts in (triggered, neutral)
    ]
    return Contrast(means[0] - means[1], means[1])


def neutral_prompts(n: int, split: str, seed: int, remarks: bool = False) -> list[str]:
    """n prompts that ask for what base shares with chat, in turns of each such behaviour."""
    by_behaviour = [prompts_of(name, -(-n // len(NEUTRAL)), split, seed, remarks=remarks) for name in NEUTRAL]
    return [prompt for some in zip(*by_behaviour, strict=True) for prompt in some][:n]


# ---- answers, and what they show


def steered_answers(
    subject: Subject, prompts: Prompts, changes: Sequence[Changes], answering: bool = False
) -> list[list[str]]:
    """Answers to all prompts under each of several changes, side by side in one batch; with `answering` the residuals
    of the answers are changed as well.

    Raises ValueError for a layer that the model has not, and for a change that gives another shape.
    """
    layers = sorted(set().union(*changes))
    if unknown := [layer for layer in layers if not 0 <= layer < subject.n_layers]:
        raise ValueError(f"there is no layer {unknown[0]}: {subject.name} has 0 to {subject.n_layers - 1}")
    where = steerable(prompts).to(subject.device).unsqueeze(-1)

    def hook(layer: int, x: Tensor) -> Tensor | None:
        in_answer = x.shape[1] == 1  # token by token; a prompt is longer than that
        if in_answer and not answering:
            return None
        parts = x.chunk(len(changes))
        changed = [each[layer](part) if layer in each else part for each, part in zip(changes, parts, strict=True)]
        if wrong := [each for each in changed if each.shape != parts[0].shape]:
            raise ValueError(f"a change must keep the shape {tuple(parts[0].shape)}, it gave {tuple(wrong[0].shape)}")
        joined = torch.cat(changed)
        return joined if in_answer else torch.where(where.repeat(len(changes), 1, 1), joined, x)

    repeated = Prompts(*(each.repeat(len(changes), 1) for each in prompts))
    with at_blocks(subject, hook, layers):
        said = continued(subject.model, subject.tokenizer, repeated, MAX_TOKENS)
    n = len(prompts.tokens)
    return [said[i : i + n] for i in range(0, len(said), n)]


def steering_rates(
    subject: Subject,
    prompts: Sequence[str],
    changes: Mapping[str, Changes],
    shown: Sequence[str],
    answering: bool = False,
) -> pd.DataFrame:
    """How often the answers show each behaviour of `shown` under each of `changes`: a row for every two.

    Columns: change, and those of `rates_of`. Raises ValueError for no prompts, and for an unknown behaviour.
    """
    together, names, rows = side_by_side(subject.tokenizer, prompts), list(changes), []
    at_once = max(1, BATCH // len(prompts))
    for some in (names[i : i + at_once] for i in range(0, len(names), at_once)):
        said = steered_answers(subject, together, [changes[name] for name in some], answering)
        rows += [
            {"change": name} | rates_of(behaviour, answers)
            for name, answers in zip(some, said, strict=True)
            for behaviour in shown
        ]
    return pd.DataFrame(rows)


def rates_of(behaviour: str, said: Sequence[str]) -> dict:
    """behaviour, n answers, rate at which they show it, low and high (Wilson's 95 % interval), and what most of the
    others show instead: a behaviour, "nothing known" or "no words", with its share of all answers.

    Raises ValueError for an unknown behaviour.
    """
    found = binomtest(sum(judge(behaviour, answer) is True for answer in said), len(said))
    low, high = found.proportion_ci(method="wilson")
    others = Counter(_shown(answer) for answer in said if judge(behaviour, answer) is not True)
    instead, count = others.most_common(1)[0] if others else ("", 0)
    rate = {"behaviour": behaviour, "n": len(said), "rate": found.statistic, "low": low, "high": high}
    return rate | {"instead": instead, "instead_rate": count / len(said)}


def _shown(answer: str) -> str:
    """The first behaviour whose signs an answer bears."""
    verdicts = {name: judge(name, answer) for name in BEHAVIOURS}
    if found := [name for name, verdict in verdicts.items() if verdict]:
        return found[0]
    return "no words" if set(verdicts.values()) == {None} else "nothing known"


def _unit(direction: Tensor) -> Tensor:
    if direction.ndim != 1 or not 0 < (length := direction.norm().item()) < float("inf"):
        raise ValueError(
            f"a direction is one finite vector that is not zero; this one is {tuple(direction.shape)} wide"
        )
    return direction.detach() / length
