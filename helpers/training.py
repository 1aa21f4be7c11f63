"""Training a sparse autoencoder, step by step in verbs.

    loss = |x - x_hat|^2 / variance of x + sparsity * price + AuxK

The variance is one number, taken once at the start, so the loss starts near 1 whatever the scale of x.
AuxK (Gao et al. 2024, A.2) lets dead latents rebuild what the others missed:
    e = x - x_hat, without gradient         e_hat = W_dec TopK_{k_aux}(pre_acts of dead latents), without bias
    AuxK = |e - e_hat|^2 / variance of e
A latent is dead when it was silent for `dead_after` tokens. Time is counted in tokens throughout.
"""

import collections
import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from helpers import kernels
from helpers.autoencoders import BatchTopK, Gated, SparseAutoencoder, TopK


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train. Amounts are tokens, fractions are of the whole run."""

    tokens: int
    lr: float = 1e-3
    sparsity: float = 0.0  # price of a latent: ReLU, Gated, JumpReLU
    sparsity_warmup: float = 0.1  # the price rises over this fraction, so that latents live before they pay
    auxk: float = 1 / 32  # weight of AuxK; 0 switches it off
    k_aux: int | None = None  # dead latents that AuxK uses per token; d_model / 2 by default
    dead_after: float = 0.05  # silent for this fraction of the run
    decay: float = 0.2  # the last part of the run lowers the learning rate to zero; the paper's is 0
    ema: float = 0.0  # average of weights kept for use; the paper's is 0.999, over far more updates
    unit_norm: bool = True  # decoder rows stay on the unit sphere

    @property
    def dead_tokens(self) -> int:
        return max(1, round(self.dead_after * self.tokens))

    def lr_at(self, tokens: int) -> float:
        """Learning rate after `tokens`: constant, then a straight line to zero."""
        left = 1 - tokens / self.tokens
        return self.lr * (min(1.0, left / self.decay) if self.decay else 1.0)

    def sparsity_at(self, tokens: int) -> float:
        """Price of a latent after `tokens`: a straight line up, then constant."""
        return self.sparsity * (min(1.0, tokens / (self.sparsity_warmup * self.tokens)) if self.sparsity_warmup else 1)


class Trained(NamedTuple):
    """What `train` returns."""

    sae: SparseAutoencoder  # in eval mode, with averaged weights if config.ema
    record: dict  # config, architecture, tokens, minutes, curve: [{tokens, loss, nmse, l0, dead}]


class Reconstruction(NamedTuple):
    """What an architecture makes of a batch."""

    x_hat: Tensor  # (batch, d_model)
    l0: Tensor  # (): latents on per token, of the whole batch or of its first tokens
    fired: Tensor  # (n_latents,) bool: on for any token of the batch
    price: Tensor | float = 0.0  # (): what sparsity costs, before its weight
    gate_error: Tensor | float = 0.0  # (): squared error of Gated's gate


class Step(NamedTuple):
    """One forward pass of training."""

    loss: Tensor  # ()
    nmse: Tensor  # (): squared error over the variance of x
    l0: Tensor  # (): latents on per token
    fired: Tensor  # (n_latents,) bool: on for any token of the batch


def train(
    sae: SparseAutoencoder, batches: Iterable[Tensor], config: TrainConfig, progress: str | None = None
) -> Trained:
    """Train `sae` in place on batches (batch, d_model) until `config.tokens` were read.

    `progress` names the progress bar; None hides it. Raises ValueError for batches that are empty, not finite, too
    few, or of another width than the autoencoder.
    """
    started = time.monotonic()
    first, batches = _look_at_first(sae, batches)
    sae.train().start_from(first)
    variance = (first - first.mean(0)).square().sum(-1).mean()
    optimizer, average = _adam(sae, config), _Average(sae, config.ema)
    silent = torch.zeros(sae.n_latents, dtype=torch.int64, device=first.device)
    tokens, curve, recent = 0, [], collections.deque(maxlen=8)
    with tqdm(total=config.tokens, desc=progress, unit="tok", unit_scale=True, disable=progress is None) as bar:
        for x in batches:
            step = forward(sae, x, variance, silent >= config.dead_tokens, config, config.sparsity_at(tokens))
            step.loss.backward()
            _update(sae, optimizer, config, config.lr_at(tokens))
            average.add(sae)
            silent = torch.where(step.fired, 0, silent + len(x))
            tokens += len(x)
            recent.append(x)
            bar.update(len(x))
            if not curve or tokens - curve[-1]["tokens"] >= config.tokens / 50 or tokens >= config.tokens:
                curve.append(_row(tokens, step, silent >= config.dead_tokens))
                bar.set_postfix(nmse=f"{curve[-1]['nmse']:.3f}", dead=f"{curve[-1]['dead']:.0%}")
            if tokens >= config.tokens:
                break
    if tokens < config.tokens:
        raise ValueError(f"the batches ended after {tokens:,} of {config.tokens:,} tokens; harvest more, or train less")
    minutes = (time.monotonic() - started) / 60
    average.into(sae, config).eval()
    if isinstance(sae.activation, BatchTopK):
        sae.activation.calibrate(sae.pre_acts(x) for x in recent)
    return Trained(sae, _record(sae, config, tokens, minutes, curve))


def forward(
    sae: SparseAutoencoder, x: Tensor, variance: Tensor, dead: Tensor, config: TrainConfig, sparsity: float
) -> Step:
    """Reconstruct x (batch, d_model) and say what it costs. `dead`: (n_latents,) bool; `sparsity`: price now."""
    reconstruct = _reconstruct_sparsely if isinstance(sae.activation, TopK) else _reconstruct_densely
    made = reconstruct(sae, x)
    error = x - made.x_hat
    nmse = error.square().sum(-1).mean() / variance
    loss = nmse + sparsity * made.price + made.gate_error / variance
    if config.auxk and dead.any():
        loss = loss + config.auxk * auxk_loss(sae, x, error, dead, config.k_aux or sae.d_model // 2)
    return Step(loss, nmse.detach(), made.l0, made.fired)


def auxk_loss(sae: SparseAutoencoder, x: Tensor, error: Tensor, dead: Tensor, k_aux: int) -> Tensor:
    """How badly the dead latents rebuild `error` (batch, d_model), over its variance. Live rows get no gradient."""
    error = error.detach()
    rows = dead.nonzero().squeeze(1)
    k = min(k_aux, len(rows))
    values, indices, pairs = kernels.encode_topk(x, sae.W_enc[rows], sae.b_enc[rows], sae.b_dec, k)
    rebuilt = kernels.decode_sparse(values, indices, pairs, sae.W_dec[rows])
    variance = (error - error.mean(0)).square().sum(-1).mean()
    return (error - rebuilt).square().sum(-1).mean() / variance.clamp(min=torch.finfo(variance.dtype).tiny)


def _reconstruct_sparsely(sae: SparseAutoencoder, x: Tensor) -> Reconstruction:
    values, indices, pairs = kernels.encode_topk(x, sae.W_enc, sae.b_enc, sae.b_dec, sae.activation.k)
    x_hat = kernels.decode_sparse(values, indices, pairs, sae.W_dec) + sae.b_dec
    on = values > 0
    fired = torch.zeros(sae.n_latents, dtype=torch.bool, device=x.device)
    fired[indices[on]] = True
    return Reconstruction(x_hat, on.sum() / len(x), fired)


def _reconstruct_densely(sae: SparseAutoencoder, x: Tensor) -> Reconstruction:
    with kernels.fast_products(x.device):
        pre_acts = sae.pre_acts(x)
        latents = sae.activation(pre_acts)
        x_hat = F.linear(latents, sae.W_dec.T) + sae.b_dec
        gate_error = 0.0
        if isinstance(sae.activation, Gated):  # the gate must also reconstruct, through a decoder it cannot change
            by_gate = F.linear(pre_acts.relu(), sae.W_dec.T.detach()) + sae.b_dec.detach()
            gate_error = (x - by_gate).square().sum(-1).mean()
    price = sae.activation.price(pre_acts, latents).float().mean() if hasattr(sae.activation, "price") else 0.0
    some = latents[:256]  # enough for a progress bar
    return Reconstruction(x_hat.float(), (some > 0).sum() / len(some), latents.amax(0) > 0, price, gate_error)


def _look_at_first(sae: SparseAutoencoder, batches: Iterable[Tensor]) -> tuple[Tensor, Iterator[Tensor]]:
    batches = iter(batches)
    first = next(batches, None)
    if first is None or len(first) == 0:
        raise ValueError("there is nothing to train on: the first batch is empty; check the stream of activations")
    if first.shape[-1] != sae.d_model:
        raise ValueError(f"activations are {first.shape[-1]} wide, the autoencoder {sae.d_model}; match d_model")
    if not first.isfinite().all():
        raise ValueError("the first batch has NaN or infinite activations; check the subject and its dtype")
    return first, itertools.chain([first], batches)


def _adam(sae: SparseAutoencoder, config: TrainConfig) -> torch.optim.Optimizer:
    # eps: gradients are means over a batch and tiny; a usual eps would tie the step to the loss's scale (paper, A)
    own = list(sae.activation.parameters())
    linear = [p for p in sae.parameters() if all(p is not q for q in own)]
    groups = [{"params": linear, "factor": 1.0}, {"params": own, "factor": getattr(sae.activation, "lr_factor", 1.0)}]
    return torch.optim.Adam(groups[: 1 + bool(own)], lr=config.lr, betas=(0.9, 0.999), eps=6.25e-10, fused=True)


def _update(sae: SparseAutoencoder, optimizer: torch.optim.Optimizer, config: TrainConfig, lr: float) -> None:
    if config.unit_norm:
        sae.project_decoder_gradient()
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]
    optimizer.step()
    optimizer.zero_grad()
    if config.unit_norm:
        sae.normalise_decoder()


class _Average:
    """Running mean of the weights, bias-corrected as Adam's moments are (A.5)."""

    def __init__(self, sae: nn.Module, ema: float):
        self.ema, self.n = ema, 0
        self.mean = [torch.zeros_like(p) for p in sae.parameters()] if ema else []

    @torch.no_grad()
    def add(self, sae: nn.Module) -> None:
        self.n += 1
        if self.ema:
            torch._foreach_lerp_(self.mean, list(sae.parameters()), 1 - self.ema)

    @torch.no_grad()
    def into(self, sae: SparseAutoencoder, config: TrainConfig) -> SparseAutoencoder:
        for parameter, mean in zip(sae.parameters(), self.mean, strict=False):
            parameter.copy_(mean / (1 - self.ema**self.n))
        if config.unit_norm:
            sae.normalise_decoder()  # a mean of unit vectors is a little shorter than one
        return sae


def _row(tokens: int, step: Step, dead: Tensor) -> dict:
    numbers = {"loss": step.loss, "nmse": step.nmse, "l0": step.l0, "dead": dead.float().mean()}
    return {"tokens": tokens} | {name: value.item() for name, value in numbers.items()}


def _record(sae: SparseAutoencoder, config: TrainConfig, tokens: int, minutes: float, curve: list[dict]) -> dict:
    return {
        "architecture": type(sae.activation).__name__,
        "d_model": sae.d_model,
        "n_latents": sae.n_latents,
        "k": getattr(sae.activation, "k", None),
        "config": dataclasses.asdict(config),
        "tokens": tokens,
        "minutes": minutes,
        "curve": curve,
    }
