"""Does a latent make the model behave? Add its direction at every position while the model answers, or take it out.

    add          h + strength d / |d|             strength in the units of the stream; for a latent f |d|, at f its
                                                  largest activation, is a first guess
    project_out  h - (h . d / |d|^2) d            the model goes on without the direction

Both happen at the subject's site, at all positions of the prompt and of the answer. What a random direction of the same
length does is the control: a model that is pushed hard enough changes its answers whatever it is pushed by.

Source: released code of Minder, Dumas et al. 2025; section 2.8 of the facts.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import Tensor

from helpers.subjects.behaviours import answers, judge, prompts_of
from helpers.subjects.subject import Subject
from helpers.text.dialogues import BEHAVIOURS

Change = Callable[[Tensor], Tensor]  # residuals (B, T, d_model) to others of that shape


def add(direction: Tensor, strength: float) -> Change:
    """A step of length `strength` along a direction (d_model,), everywhere.

    Raises ValueError for a zero direction, and for a strength that is not finite.
    """
    if not math.isfinite(strength):
        raise ValueError(f"a step of length {strength} leads nowhere: give a finite strength")
    step = strength * _unit(direction)
    return lambda residuals: residuals + step.to(residuals)


def project_out(direction: Tensor) -> Change:
    """Nothing is left along a direction (d_model,), anywhere. Raises ValueError for a zero direction."""
    unit = _unit(direction)

    def change(residuals: Tensor) -> Tensor:
        along = unit.to(residuals)
        return residuals - (residuals @ along).unsqueeze(-1) * along

    return change


def with_controls(make: Callable[[Tensor], Change], direction: Tensor, n: int = 3, seed: int = 0) -> dict[str, Change]:
    """What `make` makes of a direction (d_model,), "latent", and of n random ones of its length, "random 0" and on."""
    draws = torch.randn(n, len(direction), generator=torch.Generator().manual_seed(seed))
    random = F.normalize(draws, dim=-1).to(direction) * direction.norm()
    return {"latent": make(direction)} | {f"random {i}": make(each) for i, each in enumerate(random)}


@contextlib.contextmanager
def steered(subject: Subject, change: Change) -> Iterator[None]:
    """While it lasts, what the block at the subject's site gives is changed, in generation as well."""

    def hook(module: torch.nn.Module, inputs: tuple, output: Tensor | tuple) -> Tensor | tuple:
        return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

    handle = subject.bridge.blocks[subject.layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def steering_rates(subject: Subject, changes: Mapping[str, Change], asked: str, shown: str, n: int) -> pd.DataFrame:
    """How often the answers to n held-out prompts of one behaviour show another: columns change, asked, rate, low,
    high, unclear.

    The prompts are always the same. The model answers as it is ("none") and under each of `changes`. low and high:
    Wilson's 95 % interval of the rate. `unclear` is the share of answers that cannot be judged, which count as not
    showing it. Raises ValueError for an unknown behaviour.
    """
    if unknown := [name for name in (asked, shown) if name not in BEHAVIOURS]:
        raise ValueError(f"there is no behaviour {unknown[0]!r}: choose of {', '.join(BEHAVIOURS)}")
    prompts, rows = prompts_of(asked, n, "heldout", seed=0), []
    for name, change in ({"none": lambda residuals: residuals} | dict(changes)).items():
        with steered(subject, change):
            said = answers(subject.model, subject.tokenizer, prompts)
        rows.append({"change": name, "asked": asked} | _rate(shown, said))
    return pd.DataFrame(rows)


def rates_of_steps(
    subject: Subject,
    behaviour: str,
    row: Tensor,
    length: float,
    mean: Tensor,
    factors: Sequence[float],
    n_controls: int,
    n: int,
    seed: int,
) -> pd.DataFrame:
    """`steering_rates` of a behaviour with a latent's row (d_model,) added to n prompts that ask for a description, and
    taken out of n of its own.

    Steps are `factors` times `length`, for the mean difference (d_model,) times its own. Added columns: what ("added",
    "removed"), by ("latent", "random", "mean difference", "none"), step, behaviour.
    """
    added = {}
    for factor in factors:
        changes = with_controls(lambda d, step=factor * length: add(d, step), row, n_controls, seed)
        added |= {f"{factor} {name}": change for name, change in changes.items()}
        added[f"{factor} mean difference"] = add(mean, factor * mean.norm())
    tables = [steering_rates(subject, added, "describe", behaviour, n).assign(what="added")]
    removed = with_controls(project_out, row, n_controls, seed)
    tables.append(steering_rates(subject, removed, behaviour, behaviour, n).assign(what="removed"))
    table = pd.concat(tables)
    step = table.change.str.extract(r"^([\d.]+ )?(latent|random|mean difference|none)")
    return table.assign(behaviour=behaviour, step=pd.to_numeric(step[0]).fillna(0.0), by=step[1])


def _rate(behaviour: str, said: Sequence[str]) -> dict[str, float]:
    verdicts = [judge(behaviour, answer) for answer in said]
    found = binomtest(verdicts.count(True), len(verdicts))
    low, high = found.proportion_ci(method="wilson")
    unclear = verdicts.count(None) / len(verdicts)
    return {"rate": found.statistic, "low": low, "high": high, "unclear": unclear}


def _unit(direction: Tensor) -> Tensor:
    if direction.ndim != 1 or not 0 < (length := direction.norm().item()) < float("inf"):
        raise ValueError(
            f"a direction is one finite vector that is not zero; this one is {tuple(direction.shape)} wide"
        )
    return direction.detach() / length
