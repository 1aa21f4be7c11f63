"""How well do directions, latents and chance steer, at every layer and step? The tables that notebook 12 reads.

    added      to neutral prompts of the held-out split; steps are multiples of the mean length of the behaviours'
               directions at the layer, the same for every direction, so that one set of random ones controls them all
    ablated    on the behaviour's own held-out prompts, in the prompt alone or in the answer as well

A behaviour's direction (`steering.contrast`) knows the labels and is fitted to prompts of the training split, whose
phrases the held-out ones do not share. It is the oracle of a latent, which has only the site to act at.
"""

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from helpers.diffing.steering import (
    Contrast,
    ablate,
    add,
    contrast,
    neutral_prompts,
    random_directions,
    steering_rates,
)
from helpers.subjects.behaviours import prompts_of
from helpers.subjects.subject import Subject

DIRECTION, RANDOM = "direction", "random"
PROMPT, ANSWER = "prompt", "prompt and answer"


def contrasts(subject: Subject, behaviours: Sequence[str], n: int, seed: int) -> dict[str, Contrast]:
    """The direction of each behaviour, fitted to n training prompts of it and n neutral ones."""
    neutral = neutral_prompts(n, "train", seed)
    return {name: contrast(subject, prompts_of(name, n, "train", seed), neutral) for name in behaviours}


def added(
    subject: Subject,
    fitted: Mapping[str, Contrast],
    latents: Mapping[str, Mapping[str, Tensor]],
    layers: Sequence[int],
    steps: Sequence[float],
    n_controls: int,
    n: int,
    seed: int,
) -> pd.DataFrame:
    """Rates of each behaviour when directions are added to n neutral prompts, with columns by, layers, step and those
    of `steering_rates`.

    by: "direction" and "random" at each of `layers`; at the subject's site the names of `latents`, method -> behaviour
    -> (d_model,).
    """
    prompts = neutral_prompts(n, "heldout", seed)
    random = random_directions(subject.d_model, n_controls, seed)
    tables = []

    def measure(by: str, layer: int, directions: Mapping[str, Tensor], shown: Sequence[str] | None = None) -> None:
        length = torch.stack([each.directions[layer].norm() for each in fitted.values()]).mean().item()
        for name, direction in directions.items():
            changes = {step: {layer: add(direction, step * length)} for step in steps}
            table = steering_rates(subject, prompts, changes, shown or [name]).rename(columns={"change": "step"})
            tables.append(table.assign(by=by, layers=str(layer)))

    for layer in layers:
        measure(DIRECTION, layer, {name: each.directions[layer] for name, each in fitted.items()})
        measure(RANDOM, layer, {f"random {i}": each for i, each in enumerate(random)}, list(fitted))
    for method, rows in latents.items():
        measure(method, subject.layer, rows)
    return pd.concat(tables, ignore_index=True)


def ablated(
    subject: Subject,
    fitted: Mapping[str, Contrast],
    latents: Mapping[str, Mapping[str, Tensor]],
    layers: Sequence[int],
    n_controls: int,
    n: int,
    seed: int,
) -> pd.DataFrame:
    """Rates of each behaviour on n prompts of its own when directions are ablated to the neutral mean, with columns by,
    layers, where and those of `steering_rates`.

    by: "nothing"; "direction" at each of `layers` and at all inner ones together; "random" at the site and at the inner
    ones; and, at the site, the names of `latents`, as in `added`. where: "prompt", or "prompt and answer".
    """
    random = random_directions(subject.d_model, n_controls, seed)
    neutral = next(iter(fitted.values())).neutral
    site, inner = [subject.layer], list(range(1, subject.n_layers - 1))
    tables = []

    def measure(by: str, behaviour: str, at: Sequence[int], directions: Tensor, where: str = ANSWER) -> None:
        changes = {by: {layer: ablate(directions.expand(len(neutral), -1)[layer], neutral[layer]) for layer in at}}
        table = steering_rates(subject, own, changes, [behaviour], where == ANSWER)
        named = f"{at[0]} to {at[-1]}" if len(at) > 1 else str(at[0]) if at else "none"
        tables.append(table.assign(by=by, layers=named, where=where))

    for behaviour, each in fitted.items():
        own = prompts_of(behaviour, n, "heldout", seed)
        measure("nothing", behaviour, [], each.directions)
        for at in (*([layer] for layer in layers), inner):
            measure(DIRECTION, behaviour, at, each.directions)
        measure(DIRECTION, behaviour, inner, each.directions, PROMPT)
        for at in (site, inner):
            for direction in random:
                measure(RANDOM, behaviour, at, direction)
        for method, rows in latents.items():
            if behaviour in rows:
                measure(method, behaviour, site, rows[behaviour])
    return pd.concat(tables, ignore_index=True)
