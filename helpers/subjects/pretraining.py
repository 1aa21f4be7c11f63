"""Training a small language model to study: the recipe of notebook 90.

    batch     rows of `context` tokens from one long stream of documents, a new random cut each epoch
    update    Muon for the matrices inside the blocks, AdamW for embeddings, norms and biases
    schedule  short warm-up, constant, linear decay to zero; the curve of the constant part is kept,
              because "fraction of pretraining compute" (Gao et al. 2024, section 4.1) inverts it

Everything is counted in tokens. A run is a function of its config and text, and resumes bitwise from a checkpoint.
"""

import copy
import dataclasses
import functools
import json
import math
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.base import products
from helpers.base.checks import checksum
from helpers.base.storage import load_state, restore_training, save_state, training_tensors, write_atomic, written_aside
from helpers.subjects.muon import Muon

Loss = Callable[[PreTrainedModel, Tensor], Tensor]  # of a model on (batch, context) ids: nats a token


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """How to train. All amounts are tokens, all fractions are of the whole run."""

    tokens: int  # read in all, repeats counted
    context: int = 256
    batch: int = 16_384  # per update
    micro_batch: int = 2_048  # per backward pass: what fits the processor's cache
    lr: float = 4e-3
    warmup: float = 0.02
    decay: float = 0.25  # the last quarter falls linearly to zero
    weight_decay: float = 0.05
    evaluations: int = 40  # held-out losses along the run, evenly spaced in log tokens
    seed: int = 0

    def __post_init__(self) -> None:
        ordered = 1 < self.context <= self.micro_batch <= self.batch <= self.tokens
        if not ordered or self.batch % self.micro_batch or self.micro_batch % self.context:
            sizes = f"context {self.context}, micro_batch {self.micro_batch} and batch {self.batch}"
            raise ValueError(f"{sizes} must each divide the next, and tokens {self.tokens} must fill a batch")
        if min(self.warmup, self.decay) < 0 or self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} must be fractions that sum to at most 1")

    @property
    def n_steps(self) -> int:
        return self.tokens // self.batch

    def lr_at(self, step: int) -> float:
        """Learning rate of update `step`, as a multiple of `lr`."""
        rising = min(1.0, (step + 1) / max(1.0, self.warmup * self.n_steps))
        falling = (1 - step / self.n_steps) / self.decay if self.decay else 1.0
        return min(rising, falling)


@dataclasses.dataclass
class _Progress:
    """What a checkpoint holds beside tensors and config."""

    text: int  # checksum of the tokens, training and held out
    start: int  # checksum of the weights before the first update
    objective: str  # the function whose value is trained on
    step: int = 0  # updates
    curve: list[dict] = dataclasses.field(default_factory=list)
    running: list[float] = dataclasses.field(default_factory=list)  # losses since the last row of the curve
    minutes: float = 0.0


def token_loss(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """Next-token cross-entropy of (batch, context) ids; products in bf16 where the processor has them."""
    rows = rows.to(model.device)
    return F.cross_entropy(next_logits(model, rows).flatten(0, 1), rows[:, 1:].flatten())


def next_logits(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """Logits of every token but a row's first: (batch, context) ids -> (batch, context - 1, n_vocab)."""
    with products.fast_products(rows.device):
        return model(rows, use_cache=False).logits[:, :-1].float()


def pretrain(
    model: PreTrainedModel,
    train: np.ndarray,
    heldout: np.ndarray,
    config: PretrainConfig,
    directory: Path,
    save_every_minutes: float = 5.0,
    loss: Loss = token_loss,
) -> list[dict]:
    """Train `model` in place on the token stream `train`; return the curve.

    The curve is a list of {tokens, loss, heldout, lr, minutes}, losses in nats a token. `directory` receives
    `checkpoint.safetensors`; a run that finds one there goes on from it. While its learning rate is constant it may be
    given another length or decay; only its warm-up is then that of the first length. `loss` of the model on (batch,
    context) ids is what is trained on; by default it is that of `heldout_loss`. Raises ValueError for the checkpoint of
    another run, for a model with dropout or fewer positions than `config.context`, and where training diverges.
    """
    _check(model, config)
    optimizers = _optimizers(model, config)
    path = Path(directory) / "checkpoint.safetensors"
    text = zlib.crc32(np.ascontiguousarray(heldout), zlib.crc32(np.ascontiguousarray(train)))
    start = functools.reduce(lambda seen, p: checksum(p, seen), model.parameters(), 0)
    done = _resume(path, model, optimizers, config, _Progress(text, start, loss.__qualname__))
    marks = _evaluation_steps(config)
    saved = time.monotonic()
    started = saved - 60 * done.minutes
    size = {"total": config.n_steps * config.batch, "initial": done.step * config.batch}
    with tqdm(**size, unit="tok", unit_scale=True, smoothing=0.05) as bar:
        for step in range(done.step, config.n_steps):
            rows = _rows(train, config, step)
            done.running.append(_update(model, optimizers, rows, config, step, loss))
            bar.update(config.batch)
            bar.set_postfix(loss=f"{done.running[-1]:.3f}")
            done.step, done.minutes = step + 1, (time.monotonic() - started) / 60
            if done.step in marks:
                done.curve.append(_curve_row(model, heldout, config, done))
                done.running = []
            if time.monotonic() - saved >= 60 * save_every_minutes or done.step == config.n_steps:
                save_state(path, training_tensors(model, optimizers), config=vars(config), **vars(done))
                saved = time.monotonic()
    return done.curve


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, tokens: np.ndarray, context: int, n_tokens: int = 131_072) -> float:
    """Mean loss in nats a token over the first `n_tokens` of a stream, in rows of `context` tokens."""
    n_rows = min(len(tokens), n_tokens) // context
    if n_rows == 0:
        raise ValueError(
            f"{min(len(tokens), n_tokens)} held-out tokens do not fill one row of {context}; use more text"
        )
    rows = torch.from_numpy(tokens[: n_rows * context].reshape(n_rows, context).astype(np.int64))
    training = model.training
    model.eval()
    losses = [token_loss(model, batch).item() * len(batch) for batch in rows.split(8)]
    model.train(training)
    return sum(losses) / n_rows


def ngram_losses(train: np.ndarray, heldout: np.ndarray, n_vocab: int) -> dict[str, float]:
    """Held-out nats a token of the baselines a language model must beat: unigram, and bigram backed off to it.

    The bigram's backing-off strength is chosen on the last tenth of `train`, left out of its (n_vocab, n_vocab) counts.
    Raises ValueError for too few tokens to predict one from another.
    """
    fit, tune = np.split(train.astype(np.int64), [len(train) * 9 // 10])
    if min(len(tune), len(heldout)) < 2:
        raise ValueError(f"{len(train)} tokens to fit and {len(heldout)} held out hold no pair each: use more text")
    unigram = (np.bincount(fit, minlength=n_vocab) + 1) / (len(fit) + n_vocab)
    pairs = np.bincount(fit[:-1] * n_vocab + fit[1:], minlength=n_vocab**2).reshape(n_vocab, n_vocab)
    firsts = pairs.sum(1)

    def bigram(tokens: np.ndarray, strength: float) -> float:
        a, b = tokens[:-1], tokens[1:]
        return float(-np.log((pairs[a, b] + strength * unigram[b]) / (firsts[a] + strength)).mean())

    best = min((2.0**i for i in range(12)), key=lambda strength: bigram(tune, strength))
    held = heldout.astype(np.int64)
    return {"unigram": float(-np.log(unigram[held[1:]]).mean()), "bigram": bigram(held, best)}


def ship(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, training: dict) -> None:
    """Write a Hugging Face model directory in bf16, with `training.json` beside the weights. `model` stays as it is."""
    model = copy.deepcopy(model).to(torch.bfloat16)
    model.config.dtype, model.config.architectures = torch.bfloat16, [type(model).__name__]
    model.config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    tokenizer.backend_tokenizer.save(str(Path(directory, "tokenizer.json")), pretty=False)  # half the size
    weights = {k: v.contiguous() for k, v in model.state_dict().items() if k not in model.all_tied_weights_keys}
    with written_aside(Path(directory, "model.safetensors")) as aside:
        safetensors.torch.save_file(weights, aside, {"format": "pt"})
    write_atomic(Path(directory, "training.json"), json.dumps(training, indent=1) + "\n")


def _check(model: PreTrainedModel, config: PretrainConfig) -> None:
    if config.context > (positions := model.config.max_position_embeddings):
        raise ValueError(f"rows of {config.context} tokens do not fit the model's {positions} positions; lower context")
    if any(isinstance(module, nn.Dropout) and module.p for module in model.modules()):
        raise ValueError("the model has dropout, so a resumed run would not repeat itself; set it to 0 in its config")


def _update(
    model: PreTrainedModel, optimizers: list, rows: Tensor, config: PretrainConfig, step: int, loss_of: Loss
) -> float:
    parts, total = rows.split(config.micro_batch // config.context), 0.0
    for part in parts:
        loss = loss_of(model, part) / len(parts)
        loss.backward()
        total += loss.item()
    if not math.isfinite(total):
        raise ValueError(
            f"training diverged: the loss of update {step + 1} is {total}; lower the learning rate (now {config.lr:g})"
        )
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * config.lr_at(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # keeping the buffers saves the page faults of new ones
    return total


def _optimizers(model: PreTrainedModel, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    head = model.get_output_embeddings()  # if tied, its weight is the embedding's
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) or m is head}
    inside = [p for p in model.parameters() if p.ndim == 2 and id(p) not in tables]
    outside = [p for p in model.parameters() if p.ndim != 2 or id(p) in tables]
    decayed = {"lr": config.lr, "weight_decay": config.weight_decay}
    muon = Muon(inside, momentum=0.95, **decayed)
    adam = torch.optim.AdamW(outside, betas=(0.9, 0.98), lr=config.lr, weight_decay=0.0, fused=True)
    for group in muon.param_groups + adam.param_groups:
        group["peak_lr"] = config.lr
    return [muon, adam]


def _rows(stream: np.ndarray, config: PretrainConfig, step: int) -> Tensor:
    """Rows of update `step`, (batch / context, context): a function of seed and step alone."""
    per_step = config.batch // config.context
    per_epoch = (len(stream) - config.context) // config.context // per_step
    if per_epoch < 1:
        raise ValueError(f"{len(stream):,} tokens do not fill a batch of {config.batch:,} and one row; use more text")
    epoch, within = divmod(step, per_epoch)
    order = np.random.default_rng((config.seed, epoch))
    shift = int(order.integers(config.context))
    chosen = order.permutation(per_epoch * per_step)[within * per_step :][:per_step]
    rows = stream[shift:][: per_epoch * config.batch].reshape(-1, config.context)
    return torch.from_numpy(rows[chosen].astype(np.int64))


def _evaluation_steps(config: PretrainConfig) -> set[int]:
    early = np.geomspace(max(1, config.n_steps // 200), config.n_steps, config.evaluations)
    last_constant = config.n_steps - round(config.decay * config.n_steps)
    return {*np.ceil(early).astype(int).tolist(), last_constant, config.n_steps}


def _curve_row(model: PreTrainedModel, heldout: np.ndarray, config: PretrainConfig, done: _Progress) -> dict:
    losses = {"loss": float(np.mean(done.running)), "heldout": heldout_loss(model, heldout, config.context)}
    lr = config.lr * config.lr_at(done.step - 1)
    return {"tokens": done.step * config.batch, **losses, "lr": lr, "minutes": done.minutes}


def _resume(path: Path, model: PreTrainedModel, optimizers: list, config: PretrainConfig, new: _Progress) -> _Progress:
    if not path.is_file():
        return new
    tensors, meta = load_state(path)
    before, done = PretrainConfig(**meta.pop("config")), _Progress(**meta)
    other = _differing(before, config, done.step)
    other += [name for name in ("text", "start", "objective") if getattr(done, name) != getattr(new, name)]
    if other:
        raise ValueError(
            f"{path} is from a run with other {', '.join(other)}: use the same ones (length and decay may change while "
            "the learning rate is constant) or move it away"
        )
    restore_training(tensors, model, optimizers)
    return done


def _differing(before: PretrainConfig, now: PretrainConfig, step: int) -> list[str]:
    """Settings for which the first `step` updates of the two runs are not the same."""
    names = ["context", "batch", "micro_batch", "lr", "weight_decay", "seed", "evaluations"]
    if not (before.lr_at(step - 1) == now.lr_at(step - 1) == 1 and step <= now.n_steps):
        names += ["tokens", "warmup", "decay"]  # these may change only while the rate is constant
    return [name for name in names if getattr(before, name) != getattr(now, name)]
