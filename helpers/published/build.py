"""From tensors to an autoencoder or crosscoder of ours that computes the same, by exact foldings.

Ours subtracts b_dec before the encoder. Where another library does not, or where its inputs are (x - m) g and its
outputs y / g' + m, one reading serves:

    W_enc (g (x - m) - c) + b_enc  =  W_enc' (x - b_dec') + b_enc'          c is b_dec or 0
    W_enc' = g W_enc,   W_dec' = W_dec / g',   b_dec' = b_dec / g' + m,   b_enc' = b_enc + W_enc (g (b_dec' - m) - c)

Pre-activations are the same numbers, so activations and their thresholds are untouched. A crosscoder is not folded so:
its decoder norms rank latents and are what is studied.
"""

import math

import torch
from torch import Tensor, nn

from helpers.dictionaries.autoencoders import BatchTopK, Gated, JumpReLU, SparseAutoencoder, TopK
from helpers.dictionaries.crosscoders import Crosscoder, DecoupledCrosscoder

ROWS = 65_536  # of W_enc in double precision at a time


def autoencoder(
    W_enc: Tensor,
    W_dec: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    activation: nn.Module,
    centred: bool = True,
    scale: float | Tensor = 1.0,
    back: float | Tensor | None = None,
    mean: float | Tensor = 0.0,
) -> SparseAutoencoder:
    """W_enc, W_dec (n_latents, d_model), b_enc (n_latents,), b_dec (d_model,).

    centred   whether b_dec is subtracted before the encoder; folded if not
    scale, back, mean   g, g' (g by default) and m above: one number each, or m (d_model,)
    """
    scale = torch.as_tensor(scale, dtype=torch.float64)
    back = scale if back is None else torch.as_tensor(back, dtype=torch.float64)
    outer = b_dec.double() / back + mean  # b_dec'
    moved = scale * (outer - mean) - (b_dec.double() if centred else 0.0)
    if moved.any():
        b_enc = (b_enc.double() + times(W_enc, moved)).float()
    if scale != 1 or back != 1:
        W_enc, W_dec = W_enc * scale.float(), W_dec / back.float()
    sae = SparseAutoencoder(1, getattr(activation, "k", 1), activation)  # its own weights would take time and memory
    return _filled(sae, W_enc, W_dec, b_enc, outer.float())


def crosscoder(
    W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor, activation: nn.Module, size: str = "sum"
) -> Crosscoder:
    """W_enc, W_dec (2, n_latents, d_model), b_dec (2, d_model), which is not subtracted before the encoder.

    `size` "decoupled" makes a `DecoupledCrosscoder`; it ranks by a latent's norm in each model.
    """
    W_enc, W_dec = (W.transpose(0, 1).flatten(1) for W in (W_enc, W_dec))
    b_dec = b_dec.flatten()
    decoupled = size == "decoupled"
    kind, switches = (DecoupledCrosscoder, {}) if decoupled else (Crosscoder, {"size": size})
    empty = kind(1, getattr(activation, "k", 1), activation, **switches)
    return _filled(empty, W_enc, W_dec, (b_enc.double() + times(W_enc, b_dec)).float(), b_dec)


def times(W: Tensor, vector: Tensor) -> Tensor:
    """W (n, d) times a vector (d,), in double precision without a second W: (n,)."""
    return torch.cat([part.double() @ vector.double() for part in W.split(ROWS)])


def top_k(k: float) -> TopK:
    if k != int(k):
        raise ValueError(f"k = {k} of a TopK is no whole number: the file is damaged")
    return TopK(int(k))


def batch_topk(k: float, threshold: float) -> BatchTopK:
    """Others keep what is above the threshold, ours what reaches it."""
    if k <= 0:
        raise ValueError(f"k = {k} keeps nothing: the file is damaged")
    activation = BatchTopK(max(1, round(k)))
    activation.threshold.copy_(just_above(torch.tensor(threshold)))
    return activation


def jump_relu(threshold: Tensor) -> JumpReLU:
    """From thresholds (n_latents,). Below zero they act as zero, as nothing negative is kept."""
    activation = JumpReLU(len(threshold))
    least = torch.finfo(torch.float32).tiny
    # in double precision, so that exp(log) is the threshold to its last bit in float32
    activation.log_threshold = nn.Parameter(threshold.double().clamp(min=least).log())
    return activation


def gated(log_scale: Tensor, gate_bias: Tensor, magnitude_bias: Tensor) -> Gated:
    """The gate's bias is b_enc of ours, so the magnitude's counts from there: all (n_latents,)."""
    activation = Gated(len(log_scale))
    activation.log_scale.data = log_scale
    activation.bias.data = (magnitude_bias.double() - log_scale.double().exp() * gate_bias.double()).float()
    return activation


def just_above(x: Tensor) -> Tensor:
    return torch.nextafter(x.float(), torch.tensor(math.inf))


def just_below(x: Tensor) -> Tensor:
    return torch.nextafter(x.float(), torch.tensor(-math.inf))


def _filled(sae: SparseAutoencoder, W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor) -> SparseAutoencoder:
    if getattr(sae.activation, "k", 0) > len(W_dec):
        raise ValueError(f"k = {sae.activation.k} is more than the {len(W_dec)} latents there are: the file is damaged")
    for name, value in {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}.items():
        setattr(sae, name, nn.Parameter(value.contiguous()))
    return sae.eval()
