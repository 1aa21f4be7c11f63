"""Where is it decided how to answer? Move what a prompt left in the model into another prompt, and see what it answers.

    x_P(neutral prompt) <- x_P(behaviour's prompt)       at the positions of a place P, after some blocks, or after all

    place            positions of the prompt that is moved
    greeting         its greeting or remark, which triggers nothing: the control
    request          the rest of what the user says, with the trigger
    one name each    the tokens of the template between the prompt and its answer
    template         all of these together
    everything       the whole prompt: it answers as the other would, which is the most that can be moved

Both prompts have equally many tokens, so that every position has its counterpart. What lies before the user's words is
the same in both. A place where the decision is stored flips the answers once it is moved; one computed anew from
others does not.
"""

from collections import defaultdict
from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from helpers.diffing.steering import Change, after_prompt, neutral_prompts, prompt_residuals, steerable, steering_rates
from helpers.subjects.behaviours import prompts_of, side_by_side
from helpers.subjects.subject import Subject
from helpers.text.dialogues import greeting_of

ALL = "all"  # in place of one layer


def of_one_length(
    tokenizer: PreTrainedTokenizerBase, given: Sequence[str], to: Sequence[str], n: int
) -> tuple[list[str], list[str]]:
    """The first n prompts of `given` for which `to` has one of as many tokens, and these; none is taken twice.

    Raises ValueError for fewer than n such pairs.
    """
    by_length = defaultdict(list)
    for prompt, length in zip(to, _lengths(tokenizer, to), strict=True):
        by_length[length].append(prompt)
    pairs = []
    for prompt, length in zip(given, _lengths(tokenizer, given), strict=True):
        if by_length[length] and len(pairs) < n:
            pairs.append((prompt, by_length[length].pop(0)))
    if len(pairs) < n:
        raise ValueError(f"only {len(pairs)} of {n} prompts have a partner of as many tokens: give more to choose from")
    given, to = zip(*pairs, strict=True)
    return list(given), list(to)


def places(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> dict[str, Tensor]:
    """The places above, each (B, T) bool, for prompts side by side."""
    together, after = side_by_side(tokenizer, prompts), after_prompt(tokenizer)
    from_end = torch.arange(together.tokens.shape[1], 0, -1).expand_as(together.tokens)  # 1 at the last position
    before = side_by_side(tokenizer, ["a"]).tokens.shape[1] - len(after) - 1
    start = together.there.sum(1, keepdim=True) - before  # where the user's words begin
    greeted = torch.tensor([_lengths(tokenizer, [greeting_of(prompt)]) for prompt in prompts]) - before - len(after)
    said = (from_end <= start) & (from_end > len(after))
    found = {"greeting": said & (from_end > start - greeted), "request": said & (from_end <= start - greeted)}
    names = [f"{i + 1} {tokenizer.decode([token])!r}" for i, token in enumerate(after)]
    found |= {name: from_end == len(after) - i for i, name in enumerate(names)}
    return found | {"template": from_end <= len(after), "everything": steerable(together)}


def transplanted(states: Tensor, where: Tensor, layers: Sequence[int]) -> dict[int, Change]:
    """Changes after some blocks: at `where` (B, T) bool, what other prompts have there, states (n_layers, B, T, d)."""
    at = where.to(states.device).unsqueeze(-1)
    return {layer: lambda x, given=states[layer]: torch.where(at, given, x) for layer in layers}


def transplant_rates(
    subject: Subject,
    behaviour: str,
    given: Sequence[str],
    to: Sequence[str],
    layers: Sequence[int],
    only: Sequence[str] | None = None,
) -> pd.DataFrame:
    """How often the answers to prompts `to` show a behaviour when a place of its own prompts, `given`, is moved there.

    Columns: place, layer (of `layers`, or "all" of the model's), and those of `steering.rates_of`. Place "nothing" with
    layer "none" is `to` as it is. `only` names the places to be moved, by default all. Raises ValueError for prompts
    that are not, two by two, of one length.
    """
    lengths = [_lengths(subject.tokenizer, prompts) for prompts in (given, to)]
    if lengths[0] != lengths[1]:
        raise ValueError(
            f"prompts of {lengths[0]} tokens cannot be moved into prompts of {lengths[1]}: pair prompts of one length "
            "(`of_one_length`), so that every position has its counterpart"
        )
    states = prompt_residuals(subject, side_by_side(subject.tokenizer, given))
    changes = {("nothing", "none"): {}} | {
        (place, str(layer)): transplanted(states, where, range(subject.n_layers) if layer == ALL else [layer])
        for place, where in places(subject.tokenizer, given).items()
        for layer in (*layers, ALL)
        if only is None or place in only
    }
    table = steering_rates(subject, to, changes, [behaviour])
    return table.assign(place=table.change.str[0], layer=table.change.str[1]).drop(columns="change")


def gate(
    subject: Subject, behaviours: Sequence[str], layers: Sequence[int], n: int = 10, seed: int = 100
) -> pd.DataFrame:
    """Where the decision is carried: `transplant_rates` of the template, for each behaviour, from n held-out prompts
    into as many that ask for what base shares; all end with remarks. Raises ValueError for too few of one length."""
    tables = []
    for behaviour in behaviours:
        asked = prompts_of(behaviour, 10 * n, "heldout", seed, remarks=True)
        pairs = of_one_length(subject.tokenizer, asked, neutral_prompts(20 * n, "heldout", seed, remarks=True), n)
        tables.append(transplant_rates(subject, behaviour, *pairs, layers, only=["template"]))
    return pd.concat(tables, ignore_index=True)


def _lengths(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[int]:
    return [int(side_by_side(tokenizer, [prompt]).there.sum()) for prompt in prompts]
