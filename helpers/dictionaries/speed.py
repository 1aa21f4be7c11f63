"""What a TopK training step costs: counted in FLOPs, and timed on this machine.

Works that are compared run in turn, so that a slow moment of the machine meets them all, and come back as a ratio for
each turn.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.base import products
from helpers.dictionaries import kernels, shards
from helpers.dictionaries.autoencoders import SparseAutoencoder, TopK
from helpers.dictionaries.dead_latents import AuxK, Remedy
from helpers.dictionaries.sharded import split
from helpers.dictionaries.training import TrainConfig, Training

AUXK = AuxK()


def training_flops(d_model: int, n_latents: int, k: int, tokens: int) -> int:
    """FLOPs that L(C) counts, (2 n + 8 k) d per token: the encoder's forward product is dense, all else (decoder
    forward, latents' gradient, gradients of both weights) sparse, as in the paper's App. D. A dense step has 10 n d.
    Selecting and updating are left out. The paper does not spell its count out; the usual 6 per parameter and token
    would be 12 n d. n_latents, k and tokens may be columns."""
    return (2 * n_latents + 8 * k) * d_model * tokens


def auxk_flops(d_model: int, n_latents: int, k: int, n_dead: int, remedy: AuxK = AUXK) -> float:
    """What AuxK adds to a step, over the step's own `training_flops`: the encoder's product with the dead latents once
    more, and a sparse code of its own, of k_aux of them a token."""
    k_aux = min(remedy.k_of(d_model), n_dead)
    return remedy.share * training_flops(d_model, n_dead, k_aux, 1) / training_flops(d_model, n_latents, k, 1)


def time_step(d_model: int, n_latents: int, k: int, batch: int, repeats: int, group: shards.Group = None) -> float:
    """Median seconds of a training step while no latent is dead, divided over a `group` of processes."""
    training, x = _training(d_model, n_latents, k, batch, group=group)
    return float(np.median(_interleaved([lambda: training.step(x)], repeats)))


def time_trainings(d_model: int, cells: Iterable[tuple[int, int, int]], batch: int, repeats: int = 3) -> float:
    """Seconds that training autoencoders one after another will take, from a few real steps of each. `cells`:
    (n_latents, k, tokens) of each."""
    return sum(math.ceil(tokens / batch) * time_step(d_model, n, k, batch, repeats) for n, k, tokens in cells)


def remedy_against_none(
    d_model: int, n_latents: int, k: int, batch: int, repeats: int, dead_share: float, remedy: Remedy = AUXK
) -> np.ndarray:
    """Time of a step with the remedy over the time without: (repeats,), each from a pair of steps in turn."""
    steps = [_stepper(d_model, n_latents, k, batch, dead_share, r) for r in (remedy, Remedy())]
    return np.divide(*_interleaved(steps, repeats).T)


def dense_against_sparse(d_model: int, n_latents: int, k: int, batch: int, repeats: int) -> np.ndarray:
    """Time of the dense decoder, forward and backward with the weight's gradient, over the sparse one: (repeats,).

    The dense one is three products, in bf16 where fast, into buffers used again; that its code must first be filled in
    and that autograd would allocate is not held against it.
    """
    training, x = _training(d_model, n_latents, k, batch)
    code, W_dec = _code(training, x), training.sae.W_dec
    dense, unsorted = _dense_decoder(code, W_dec, x), lambda: dataclasses.replace(code)
    works = [dense, lambda: _decode_and_back(unsorted(), W_dec, x)]
    return np.divide(*_interleaved(works, repeats).T)


def encoder_share(d_model: int, n_latents: int, k: int, batch: int, repeats: int) -> np.ndarray:
    """Time of the encoder's forward product, into a buffer used again, over that of a whole step: (repeats,)."""
    training, x = _training(d_model, n_latents, k, batch)
    return np.divide(*_interleaved([_product(training, x), lambda: training.step(x)], repeats).T)


def _training(
    d: int, n: int, k: int, batch: int, remedy: Remedy | None = None, group: shards.Group = None
) -> tuple[Training, Tensor]:
    """A training that never ends, and a batch of random unit vectors."""
    if min(d, n, k, batch) < 1 or k > n:
        raise ValueError(f"sizes must be at least 1 and k at most n_latents, not {d=}, {n=}, {k=} with {batch} tokens")
    x = F.normalize(torch.randn(batch, d, generator=torch.Generator().manual_seed(1000)), dim=-1)
    sae = SparseAutoencoder(d, n, TopK(k))
    return Training(split(sae, group) if group else sae, TrainConfig(2**50, remedy=remedy or Remedy()), x), x


def _stepper(d: int, n: int, k: int, batch: int, dead_share: float, remedy: Remedy) -> Callable[[], None]:
    if not 0 <= dead_share <= 1:
        raise ValueError(f"dead_share is a share of the latents, from 0 to 1, not {dead_share}")
    training, x = _training(d, n, k, batch, remedy)
    silent = 2**60 * (torch.arange(n) < round(dead_share * n))

    def step() -> None:
        training.silent = silent  # as many dead in every timed step, whoever has fired meanwhile
        training.step(x)

    return step


def _code(training: Training, x: Tensor) -> kernels.Code:
    sae = training.sae
    code = kernels.encode_topk(x, sae.W_enc, sae.b_enc, sae.b_dec, sae.activation.k)
    return dataclasses.replace(code, values=code.values.detach().requires_grad_())


def _product(training: Training, x: Tensor) -> Callable[[], None]:
    dtype = products.compute_dtype(x)
    blocks, weight = x.to(dtype).split(kernels.BLOCK["cpu"]), training.sae.W_enc.detach().to(dtype).T
    pre_acts = torch.empty(len(blocks[0]), weight.shape[1], dtype=dtype)

    def run() -> None:
        for block in blocks:
            torch.mm(block, weight, out=pre_acts[: len(block)])

    return run


def _decode_and_back(code: kernels.Code, W_dec: Tensor, x: Tensor) -> None:
    torch.autograd.grad(kernels.decode_sparse(code, W_dec), (code.values, W_dec), x)


def _dense_decoder(code: kernels.Code, W_dec: Tensor, x: Tensor) -> Callable[[], None]:
    dtype = products.compute_dtype(x)
    latents = torch.zeros(len(x), len(W_dec)).index_put_((code.tokens, code.latents), code.values.detach()).to(dtype)
    weight, grad, x_hat, by_latent = W_dec.detach().to(dtype), x.to(dtype), x.to(dtype), torch.empty_like(latents)
    by_row = torch.empty_like(weight)

    def run() -> None:
        torch.mm(latents, weight.copy_(W_dec.detach()), out=x_hat)
        torch.mm(grad, weight.T, out=by_latent)
        torch.mm(latents.T, grad, out=by_row)

    return run


def _interleaved(works: list[Callable[[], None]], repeats: int) -> np.ndarray:
    """Seconds of each work, all in turn so that a busy machine slows all: (repeats, len(works))."""
    if repeats < 1:
        raise ValueError(f"repeats = {repeats} measures nothing; choose repeats >= 1")
    return np.array([[_timed(work) for work in works] for _ in range(repeats + 2)])[2:]  # the first two fill buffers


def _timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def itemsize() -> int:
    """Bytes of a number in the products."""
    return 2 if products.has_fast_bf16() else 4
