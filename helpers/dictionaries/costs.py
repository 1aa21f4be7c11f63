"""What a TopK training step costs, so that a run can be predicted before it starts.

    B tokens of width d, n latents, k on, m = B k pairs (token, latent); products in e bytes a number (2 in bf16)

    part                FLOPs      bytes
    encoder product     2 B n d    e (B d + n d) read, e B n written
    maxima              B n        e B n: each pre-activation is compared once, and n / 4 or fewer go on
    selection           B s        8 B s: s candidates in all, 4 k at each stage of the top-k
    pairs               m          40 m: sorted by latent, counted, looked up
    decode              2 m d      e m d: k decoder rows are gathered for each token
    latents' gradient   2 m d      4 m d: the same rows, in fp32
    encoder rows        2 m d      4 m d: rows of x are gathered for each latent
    decoder rows        2 m d      4 m d: rows of the error
    activations         16 B d     64 B d: x, x_hat, the error and its gradient pass a few times
    copies              2 n d      (12 + 2 e) n d: both weights are cast for the products, the encoder's is read again
    Adam                30 n d     48 n d: both weights and their moments, read and written; unit norm is done in cache

    A dense step has 2 B n d for each of encoder forward, encoder backward and decoder forward, twice that for decoder
    backward: 10 B n d, against 2 B n d + 8 B k d here. AuxK adds the parts above Adam for the dead latents alone.

A part takes its FLOPs or its bytes, whichever bind it, over a rate that `measure` finds on the machine at hand.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

from tqdm import tqdm

from helpers.dictionaries import adam as updates
from helpers.dictionaries import kernels
from helpers.dictionaries.speed import Machine, candidates, check_sizes, itemsize, measure


class Part(NamedTuple):
    flops: float
    bytes: float
    rate: str  # of `Machine`, that binds it

    def seconds(self, machine: Machine) -> float:
        return (self.bytes if self.rate in ("gather", "stream") else self.flops) / getattr(machine, self.rate)


class Cost(NamedTuple):
    """Of one step."""

    parts: dict[str, Part]  # those of the module's head; AuxK's have its name in front


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Prints as one line."""

    tokens: int  # summed over the autoencoders
    autoencoders: int
    seconds: float
    bytes: int  # peak, of the largest

    def __repr__(self) -> str:
        many, tokens, peak = self.autoencoders, tqdm.format_sizeof(self.tokens), tqdm.format_sizeof(self.bytes, "B")
        plural = "" if many == 1 else "s"
        return (
            f"{many} autoencoder{plural}, {tokens} tokens in all: about {_duration(self.seconds)}, {peak} at the peak"
        )


def step_cost(
    d_model: int, n_latents: int, k: int, batch: int, k_aux: int = 0, dead: int = 0, share: float = 1.0
) -> Cost:
    """Cost of a training step; with AuxK if there are `dead` and `k_aux`, for this `share` of the tokens."""
    check_sizes(d_model, n_latents, k, batch)
    if not (0 <= dead <= n_latents and k_aux >= 0 and 0 < share <= 1):
        raise ValueError(f"AuxK needs dead <= n_latents and a share in (0, 1], not {dead=}, {k_aux=}, {share=}")
    parts = _sparse_parts(d_model, n_latents, n_latents, k, batch)
    parts["Adam"] = Part(30 * n_latents * d_model, 48 * n_latents * d_model, "stream")
    if dead and k_aux:
        extra = _sparse_parts(d_model, n_latents, dead, min(k_aux, dead), share * batch)
        parts |= {f"AuxK {name}": part for name, part in extra.items()}
    return Cost(parts)


def _sparse_parts(d: int, n: int, among: int, k: int, batch: float) -> dict[str, Part]:
    """Forward and backward, where `among` of n latents take part."""
    e, m, selected = itemsize(), batch * k, batch * candidates(among, k)
    row = Part(2 * m * d, 4 * m * d, "gather")
    return {
        "encoder product": Part(2 * batch * among * d, e * (batch * d + among * d + batch * among), "product"),
        "maxima": Part(batch * among, e * batch * among, "maxima"),
        "selection": Part(selected, 8 * selected, "selection"),
        "pairs": Part(m, 40 * m, "pairs"),
        "decode": Part(2 * m * d, e * m * d, "gather"),
        "latents' gradient": row,
        "encoder rows": row,
        "decoder rows": row,
        "activations": Part(16 * batch * d, 64 * batch * d, "stream"),
        "copies": Part(2 * n * d, (8 + e) * n * d + (4 + e) * among * d, "stream"),
    }


def memory(d_model: int, n_latents: int, k: int, batch: int) -> int:
    """Peak bytes of a training without AuxK, the batch included. The start, which fits the encoder's scale to a dense
    code of 1,024 tokens in fp32, may need more than a step does."""
    check_sizes(d_model, n_latents, k, batch)
    weights, e = 4 * (2 * n_latents * d_model + n_latents + d_model), itemsize()
    scratch = e * n_latents * (2 * d_model + kernels.BIAS + min(batch, kernels.BLOCK["cpu"]))
    step = 2 * weights + scratch + batch * (64 * k + 40 * d_model) + 4 * updates.BLOCK["cpu"]
    return weights + max(step, 14 * min(batch, 1024) * n_latents + 40 * batch * d_model)


def training_flops(d_model: int, n_latents: int, k: int, tokens: int) -> int:
    """FLOPs that L(C) counts, (2 n + 8 k) d per token: the encoder's forward product is dense, all else (decoder
    forward, latents' gradient, gradients of both weights) sparse, as in the paper's App. D. Selecting and updating are
    left out. The paper does not spell its count out; the usual 6 per parameter and token would be 12 n d."""
    check_sizes(d_model, n_latents, k, tokens)
    return (2 * n_latents + 8 * k) * d_model * tokens


def part_seconds(cost: Cost, machine: Machine) -> dict[str, float]:
    """Seconds of each part, and of "overhead"."""
    return {name: part.seconds(machine) for name, part in cost.parts.items()} | {"overhead": machine.overhead}


def predict(cost: Cost, machine: Machine) -> float:
    """Seconds of a step."""
    return sum(part_seconds(cost, machine).values())


def estimate(
    d_model: int, cells: Iterable[tuple[int, int, int]], batch: int, machine: Machine | None = None
) -> Estimate:
    """What training autoencoders one after another will take, if no latent dies. `cells`: (n_latents, k, tokens) of
    each. The machine is measured if none is given."""
    cells = list(cells)
    for n, k, tokens in cells:
        check_sizes(d_model, n, k, min(tokens, batch))
    machine = machine or measure()
    seconds = sum(math.ceil(t / batch) * predict(step_cost(d_model, n, k, batch), machine) for n, k, t in cells)
    peak = max((memory(d_model, n, k, batch) for n, k, _ in cells), default=0)
    return Estimate(sum(tokens for *_, tokens in cells), len(cells), seconds, peak)


def _duration(seconds: float) -> str:
    size, unit = next(((s, u) for s, u in ((3600, "h"), (60, "min")) if seconds >= s), (1, "s"))
    number = seconds / size
    return f"{number:.0f} {unit}" if number >= 10 else f"{number:.2g} {unit}"
