"""Training a sparse autoencoder, step by step in verbs.

    loss = |x - x_hat|^2 / variance of x + sparsity * price + what the remedy against dead latents adds

A crosscoder's loss takes lengths in place of squares by default, and is counted in the input's typical length.

The variance is one number, taken once at the start, so the loss starts near 1 whatever the scale of x. A latent is dead
when it was silent for `dead_after` tokens. Time is counted in tokens throughout.

A checkpoint holds all that changes from batch to batch. Training that was killed and started again skips the batches
that it had read, and ends with the weights, bit for bit, that it would have had.
"""

import collections
import dataclasses
import functools
import itertools
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from helpers.base import products
from helpers.base.checks import checksum, require_finite
from helpers.base.clock import spent_on
from helpers.base.storage import load_state, save_state
from helpers.dictionaries import kernels, shards
from helpers.dictionaries.adam import Adam
from helpers.dictionaries.autoencoders import BatchTopK, Gated, MultiTopK, SparseAutoencoder, TopK
from helpers.dictionaries.dead_latents import AuxK, Remedy
from helpers.dictionaries.shard_files import own_rows, save_shards

DIVIDED = 0  # in place of the checksum of a start that several processes hold


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train. Amounts are tokens, fractions are of the whole run."""

    tokens: int
    lr: float = 1e-3
    sparsity: float = 0.0  # price of a latent: ReLU, Gated, JumpReLU
    sparsity_warmup: float = 0.1  # the price rises over this fraction, so that latents live before they pay
    remedy: Remedy = AuxK()  # against dead latents; Remedy() does nothing
    dead_after: float = 0.05  # silent for this fraction of the run
    decay: float = 0.2  # the last part of the run lowers the learning rate to zero; the paper's is 0
    ema: float = 0.0  # average of weights kept for use; the paper's is 0.999, over far more updates
    unit_norm: bool = True  # decoder rows stay on the unit sphere
    encoder_scale: float = 1.0  # of the encoder's start, times the rule of A.1

    def __post_init__(self):
        shares = {"sparsity_warmup": self.sparsity_warmup, "decay": self.decay}
        if wrong := [name for name, share in shares.items() if not 0 <= share <= 1]:
            raise ValueError(f"{wrong[0]} = {shares[wrong[0]]} is no fraction of a run: give one between 0 and 1")
        if self.tokens < 1 or not self.lr > 0 or not 0 <= self.ema < 1:
            raise ValueError(
                f"tokens = {self.tokens}, lr = {self.lr}, ema = {self.ema} train nothing: give at least one token, a "
                "learning rate above 0, and an average of weights below 1"
            )

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

    def described(self) -> dict:
        """The settings in JSON's types."""
        remedy = {"name": type(self.remedy).__name__} | dataclasses.asdict(self.remedy)
        return dataclasses.asdict(self) | {
            "remedy": {k: list(v) if isinstance(v, tuple) else v for k, v in remedy.items()}
        }


class Trained(NamedTuple):
    """What `train` returns."""

    sae: SparseAutoencoder  # in eval mode, with averaged weights if config.ema
    record: (
        dict  # config, architecture, tokens, minutes, curve: [{tokens, loss, nmse, l0, dead}], means since the last row
    )


class Reconstruction(NamedTuple):
    """What an architecture makes of a batch."""

    x_hat: Tensor  # (batch, d_model)
    l0: Tensor  # (): latents on per token, of the whole batch or of its first tokens
    fired: Tensor  # (n_latents,) bool: on for any token of the batch
    price: Tensor | float = 0.0  # (): what sparsity costs, before its weight
    other_error: Tensor | float = 0.0  # (): squared error of another one: Gated's gate, MultiTopK's wider code


class Step(NamedTuple):
    """One forward pass of training."""

    loss: Tensor  # ()
    nmse: Tensor  # (): squared error over the variance of x
    l0: Tensor  # (): latents on per token
    fired: Tensor  # (n_latents,) bool: on for any token of the batch


@spent_on("training")
def train(
    sae: SparseAutoencoder,
    batches: Iterable[Tensor],
    config: TrainConfig,
    progress: str | None = None,
    checkpoint: Path | None = None,
    save_every_minutes: float = 1.0,
) -> Trained:
    """Train `sae` in place on batches (batch, d_model) until `config.tokens` were read.

    `progress` names the progress bar; None hides it. `checkpoint` is a file to go on from if it is there, written now
    and then and removed by no one. `sae` moves to the device of the batches.

    Raises ValueError for batches that are empty, not finite, too few, or of another width than the autoencoder, for a
    first batch without variance or with no latent on, for the checkpoint of another training (another start, other
    settings, other batches), and where training diverges.
    """
    first, batches = _look_at_first(sae, batches)
    training = Training(sae, config, first)
    done = training.resume(checkpoint) if checkpoint and Path(checkpoint).is_file() else 0
    shards.require_same(done, "checkpoints", sae.group)
    saved, recent, read, seen = time.monotonic(), collections.deque(maxlen=8), 0, 0
    hidden = {"disable": True} if progress is None else {}  # else as the environment says
    with tqdm(total=config.tokens, initial=done, desc=progress, unit="tok", unit_scale=True, **hidden) as bar:
        for x in batches:
            x, new = _checked(sae, x), read >= done
            read, seen = read + len(x), checksum(x, seen)
            recent.append(x)
            if new:
                training.step(x)
                training.seen = seen
                bar.update(len(x))
                bar.set_postfix({name: f"{training.curve[-1][name]:.3f}" for name in ("nmse", "dead")}, refresh=False)
                due = time.monotonic() - saved >= 60 * save_every_minutes or read >= config.tokens
                if checkpoint and shards.anyone(due, sae.group):
                    training.save(checkpoint)
                    saved = time.monotonic()
            elif read >= done and (read, seen) != (done, training.seen):
                raise ValueError(
                    f"{checkpoint} has read other batches than these; move it away, or train on what it was begun on"
                )
            if read >= config.tokens:
                break
    if read < config.tokens:
        raise ValueError(f"the batches ended after {read:,} of {config.tokens:,} tokens; harvest more, or train less")
    return training.finished(recent)


class Training:
    """One training under way: all that changes from batch to batch. `first` (batch, d_model) is what it starts from."""

    def __init__(self, sae: SparseAutoencoder, config: TrainConfig, first: Tensor):
        if sae.group and type(config.remedy) not in (Remedy, AuxK):
            raise ValueError(f"{type(config.remedy).__name__} is not for several processes: use AuxK() or Remedy()")
        shards.require_same(checksum(first), "batches", sae.group)
        self.sae, self.config = sae.to(first.device), config
        self.n_latents = int(shards.total(torch.tensor(sae.n_latents), sae.group))
        whole = [] if sae.group else sae.parameters()  # a part of a start would tell it by how it was cut
        self.start = functools.reduce(lambda seen, p: checksum(p, seen), whole, DIVIDED)  # as it was given
        self.variance = _variance(first)
        sae.train().start_from(first, config.encoder_scale)
        self.seen = 0  # checksum of the batches read
        self.unit_norm = config.unit_norm and not sae.free_norms
        self.optimizer = Adam(sae, self.unit_norm)
        self.average = [torch.zeros_like(p) for p in sae.parameters()] if config.ema else []
        self.silent = torch.zeros(sae.n_latents, dtype=torch.int64, device=first.device)  # tokens since it fired
        self.tokens, self.minutes, self.curve = 0, 0.0, []
        self.recent = torch.zeros(
            4, device=first.device
        )  # sums of loss, nmse, l0 and 1 since the last row of the curve

    @property
    def dead(self) -> Tensor:
        """(n_latents,) bool."""
        return self.silent >= self.config.dead_tokens

    def step(self, x: Tensor) -> None:
        """Forward, backward, update, and the books, for a batch (batch, d_model)."""
        started, config, dead = time.monotonic(), self.config, self.dead
        step = forward(self.sae, x, self.variance, dead, config, config.sparsity_at(self.tokens))
        with kernels.unsummed(self.sae.W_enc, self.sae.W_dec) as unsummed:
            step.loss.backward()
        self.optimizer.step(config.lr_at(self.tokens), unsummed)
        self.sae.constrain()
        self._average()
        self.silent = torch.where(step.fired, 0, self.silent + len(x))
        progress = (self.tokens / config.tokens, (self.tokens + len(x)) / config.tokens)
        if config.remedy.renew(self.sae, self.optimizer, x, self.dead, progress):
            self.silent[self.dead] = 0
        self.tokens += len(x)
        self.minutes += (time.monotonic() - started) / 60
        self.recent += torch.stack([step.loss.detach(), step.nmse, step.l0, torch.ones_like(step.nmse)])
        if not self.curve or self.tokens - self.curve[-1]["tokens"] >= config.tokens / 50 or progress[1] >= 1:
            self.curve.append(self._row())

    def finished(self, recent: Iterable[Tensor]) -> Trained:
        """The autoencoder as it is to be used. `recent`: the last batches, for a threshold."""
        sae, config = self.sae, self.config
        self._require_converging(*sae.parameters())
        with torch.no_grad():
            for parameter, mean in zip(sae.parameters(), self.average, strict=False):
                parameter.copy_(mean / (1 - config.ema**self.optimizer.n_steps))
        if config.ema and self.unit_norm:
            sae.normalise_decoder()  # a mean of unit vectors is a little shorter than one
        sae.eval()
        if isinstance(sae.activation, BatchTopK):
            sae.calibrate(recent)
        return Trained(sae, self._identity() | {"tokens": self.tokens, "minutes": self.minutes, "curve": self.curve})

    def save(self, path: Path) -> None:
        """Write all of it aside, and rename. Raises ValueError, and writes nothing, once training has diverged."""
        self._require_converging(self.recent)
        counts = {
            "tokens": self.tokens,
            "n_steps": self.optimizer.n_steps,
            "minutes": self.minutes,
            "curve": self.curve,
            "seen": self.seen,
        }
        save = functools.partial(save_shards, group=self.sae.group) if self.sae.group else save_state
        save(Path(path), self._tensors(), identity=self._identity() | self._begun(), **counts)

    def resume(self, path: Path) -> int:
        """Go on from a checkpoint; returns the tokens read. Raises ValueError for one that is broken or another's."""
        tensors, meta = load_state(path)
        ours, theirs = self._identity() | self._begun(), meta.get("identity", {})
        if DIVIDED in (ours["start"], theirs.get("start")):
            theirs |= {"start": ours["start"]}
        if theirs != ours:
            raise ValueError(f"{path} is of another training; move it away, or train with its start and its settings")
        span = shards.span(self.n_latents, self.sae.group)
        tensors = own_rows(Path(path), tensors, meta.get("parts"), *span)
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(tensors[name])
        self.tokens, self.minutes, self.curve = meta["tokens"], meta["minutes"], meta["curve"]
        self.optimizer.n_steps, self.seen = meta["n_steps"], meta["seen"]
        return self.tokens

    def _tensors(self) -> dict[str, Tensor]:
        names = [name for name, _ in self.sae.named_parameters()]
        average = {f"average.{name}": mean for name, mean in zip(names, self.average, strict=False)}
        weights = {f"model.{name}": p for name, p in self.sae.named_parameters()}
        return (
            weights
            | self.optimizer.tensors()
            | average
            | {"silent": self.silent, "variance": self.variance, "recent": self.recent}
        )

    @torch.no_grad()
    def _average(self) -> None:
        """Running mean of the weights, bias-corrected at the end as Adam's moments are (A.5)."""
        if self.average:
            torch._foreach_lerp_(self.average, list(self.sae.parameters()), 1 - self.config.ema)

    def _row(self) -> dict:
        """Means since the last row, and what is dead now."""
        self._require_converging(self.recent)
        loss, nmse, l0, n = self.recent.tolist()
        self.recent.zero_()
        dead = shards.total(self.dead.sum(), self.sae.group).item() / self.n_latents
        return {"tokens": self.tokens, "loss": loss / n, "nmse": nmse / n, "l0": l0 / n, "dead": dead}

    def _require_converging(self, *values: Tensor) -> None:
        if not all(each.isfinite().all() for each in values):
            raise ValueError(
                f"training diverged: after {self.tokens:,} tokens loss or weights are NaN or infinite; lower the "
                f"learning rate (now {self.config.lr:g})"
            )

    def _begun(self) -> dict:
        """What else the weights depend on, for a checkpoint to be taken up: the start, and the type of the products."""
        window = getattr(self.sae.activation, "bandwidth", None)
        return {"start": self.start, "bandwidth": window, "products": str(products.compute_dtype(self.variance))}

    def _identity(self) -> dict:
        sae = self.sae
        sizes = {"d_model": sae.d_model, "n_latents": self.n_latents, "k": getattr(sae.activation, "k", None)}
        kind = {"architecture": type(sae.activation).__name__} | getattr(sae, "switches", {})
        return kind | sizes | {"config": self.config.described()}


def forward(
    sae: SparseAutoencoder, x: Tensor, variance: Tensor, dead: Tensor, config: TrainConfig, sparsity: float
) -> Step:
    """Reconstruct x (batch, d_model) and say what it costs. `dead`: (n_latents,) bool; `sparsity`: price now."""
    if isinstance(sae.activation, TopK | BatchTopK):
        made = _reconstruct_sparsely(sae, x)
    else:
        made = _reconstruct_above(sae, x) or _reconstruct_densely(sae, x)
    nmse = F.mse_loss(made.x_hat, x) * x.shape[1] / variance
    misfit = nmse if sae.squared else sae.misfit(x, made.x_hat) / sae.unit(variance)
    loss = misfit + sparsity * made.price / sae.unit(variance) + made.other_error / variance
    if shards.total(dead.any(), sae.group):
        loss = loss + config.remedy.loss(sae, x, made.x_hat, dead)
    return Step(loss, nmse.detach(), made.l0, made.fired)


def _reconstruct_sparsely(sae: SparseAutoencoder, x: Tensor) -> Reconstruction:
    if isinstance(sae.activation, MultiTopK):
        return _reconstruct_twice(sae, x)
    encode = kernels.encode_topk if isinstance(sae.activation, TopK) else kernels.encode_batch_topk
    weights, competitions = (sae.W_enc, sae.b_enc, sae.b_dec), sae.competitions()
    codes = [encode(x, *weights, each.k, each.sizes, group=sae.group) for each in competitions]
    parts = [kernels.decode_sparse(code, each.rows) for code, each in zip(codes, competitions, strict=True)]
    side_by_side = x.shape[1] // parts[0].shape[1]  # else they write into the same place
    x_hat = (torch.cat(parts, 1) if side_by_side > 1 else functools.reduce(torch.add, parts)) + sae.b_dec
    l0 = shards.total(sum((code.values > 0).sum() for code in codes), sae.group) / (side_by_side * len(x))
    fired = functools.reduce(torch.logical_or, (code.fired() for code in codes))
    return Reconstruction(x_hat, l0, fired, other_error=sae.other_error(x, parts))


def _reconstruct_twice(sae: SparseAutoencoder, x: Tensor) -> Reconstruction:
    """From the k largest latents and from more of them, for one product with the encoder."""
    k, more = sae.activation.k, min(sae.n_latents, sae.activation.wider * sae.activation.k)
    wide = kernels.encode_topk(x, sae.W_enc, sae.b_enc, sae.b_dec, more, sae.sizes())
    code = wide.largest(k)
    x_hat, by_wide = (kernels.decode_sparse(each, sae.W_dec) + sae.b_dec for each in (code, wide))
    other_error = sae.activation.weight * (x - by_wide).square().sum(-1).mean()
    return Reconstruction(x_hat, (code.values > 0).sum() / len(x), code.fired(), other_error=other_error)


def _reconstruct_above(sae: SparseAutoencoder, x: Tensor) -> Reconstruction | None:
    """What `_reconstruct_densely` gives, from the latents that are on and those within a window below: all that count.
    None where they are too many for this to be faster, and for an activation that does not say what its window is."""
    activation = sae.activation
    if not hasattr(activation, "window"):
        return None
    most = activation.dense_cost * _sparse_up_to(x)
    codes = kernels.encode_above(x, sae.W_enc, sae.b_enc, sae.b_dec, activation.window, most)
    if codes is None:
        return None
    code, near = codes
    other_error, sizes = 0.0, sae.sizes()
    if isinstance(activation, Gated):  # the gate must also reconstruct, through a decoder it cannot change
        by_gate = kernels.decode_sparse(code, sae.W_dec.detach()) + sae.b_dec.detach()
        other_error = (x - by_gate).square().sum(-1).mean()
    scale = 1.0 if sizes is None else sizes.index_select(0, code.latents)
    scores = code.values * scale
    latents = activation(scores, code.latents)
    price = activation.price(scores, latents, code.latents)
    code.values = latents if sizes is None else latents / scale.clamp(min=torch.finfo(sizes.dtype).tiny)
    x_hat = kernels.decode_sparse(code, sae.W_dec) + sae.b_dec
    if near is not None:  # zeros, which teach their thresholds alone
        pre_acts, near.values = near.values, activation(near.values, near.latents)
        x_hat = x_hat + kernels.decode_sparse(near, sae.W_dec.detach())
        price = price + activation.price(pre_acts, near.values, near.latents)
    return Reconstruction(x_hat, (latents > 0).sum() / len(x), code.fired(), price / len(x), other_error)


def _sparse_up_to(x: Tensor) -> float:
    """Share of latents that count up to which a sparse step of ReLU is faster than a dense one: measured at 2,048 and
    8,192 latents, on one core and two. Stated, not timed while training, so that the same run takes the same path."""
    return 1 / 20 if products.has_fast_bf16(x.device.type) else 1 / 8


def _reconstruct_densely(sae: SparseAutoencoder, x: Tensor) -> Reconstruction:
    with products.fast_products(x.device):
        pre_acts = sae.scores(x)
        latents = sae.activation(pre_acts)
        x_hat = F.linear(sae.unscaled(latents), sae.W_dec.T) + sae.b_dec
        other_error = 0.0
        if isinstance(sae.activation, Gated):  # the gate must also reconstruct, through a decoder it cannot change
            by_gate = F.linear(pre_acts.relu(), sae.W_dec.T.detach()) + sae.b_dec.detach()
            other_error = (x - by_gate).square().sum(-1).mean()
    price = sae.activation.price(pre_acts, latents).float().mean() if hasattr(sae.activation, "price") else 0.0
    some = latents[:256]  # enough for a progress bar
    return Reconstruction(x_hat.float(), (some > 0).sum() / len(some), latents.amax(0) > 0, price, other_error)


def _look_at_first(sae: SparseAutoencoder, batches: Iterable[Tensor]) -> tuple[Tensor, Iterator[Tensor]]:
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("there is nothing to train on: no batch came; check the stream of activations")
    return _checked(sae, first), itertools.chain([first], batches)


def _checked(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """A batch as training takes it, (batch, d_model); a crosscoder's comes as (batch, 2, d_model)."""
    if len(x) == 0:
        raise ValueError("there is nothing to train on: a batch is empty; check the stream of activations")
    x = x.flatten(1)
    if x.shape[1] != sae.W_dec.shape[1]:
        wide = sae.W_dec.shape[1]
        raise ValueError(f"activations are {x.shape[1]} wide, the {type(sae).__name__} reads {wide}; match d_model")
    require_finite(x, "activations of a batch", "check the subject and its dtype")
    return x


def _variance(x: Tensor) -> Tensor:
    """Mean squared distance of rows (batch, d_model) from their mean. ()"""
    variance = (x - x.mean(0)).square().sum(-1).mean()
    if not variance > 1e-12 * x.square().sum(-1).mean():  # else rounding
        raise ValueError(
            f"the first batch, of {len(x)}, has no variance to measure the loss by: take batches of more than one "
            "activation, of a stream in which they differ"
        )
    return variance
