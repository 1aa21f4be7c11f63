"""The fast parts of a TopK training step: exact top-k, and gradients that touch only the latents that are on.

A TopK code has k of n latents per token, so most of a dense step multiplies by zero. Here
    pre_acts   one product, in bf16 where the processor has bf16 products (4 to 8 times the speed of fp32)
    topk       in two stages: the k best of n/16 group maxima, then the k best of their 16 k members. Exact: whoever
               is among the k largest sits in a group whose maximum is among the k largest maxima
    decode     a weighted sum of k decoder rows per token
    gradients  sort the batch * k pairs (token, latent) by latent once; the gradient of a latent's encoder or decoder
               row is then a weighted sum of the rows of its own tokens
No (batch, n) buffer is ever filled with zeros, and the sums over tokens stay in fp32.
"""

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 16  # members per group in the first stage of topk


@functools.cache
def has_fast_bf16(device_type: str = "cpu") -> bool:
    """Whether products in bf16 run in hardware: any recent GPU, or a CPU with AVX-512 bf16 or AMX."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device_type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def compute_dtype(x: Tensor) -> torch.dtype:
    """bfloat16 where its products are fast, else the dtype of x."""
    return torch.bfloat16 if has_fast_bf16(x.device.type) else x.dtype


def fast_products(device: torch.device) -> contextlib.AbstractContextManager:
    """Products in bf16 where they are fast, sums and everything delicate in fp32."""
    return torch.autocast(device.type, torch.bfloat16) if has_fast_bf16(device.type) else contextlib.nullcontext()


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of x (batch, n), in no order: values and indices (batch, k)."""
    batch, n = x.shape
    n_groups = n // GROUP
    if n % GROUP or n_groups <= 2 * k:  # too few groups to gain from a first stage
        return x.topk(k, sorted=False)
    maxima = x.view(batch, GROUP, n_groups).amax(1)  # group g holds g, g + n_groups, g + 2 n_groups, ...
    groups = maxima.topk(k, sorted=False).indices
    members = (groups.unsqueeze(1) + n_groups * torch.arange(GROUP, device=x.device)[:, None]).flatten(1)
    values, place = x.gather(1, members).topk(k, sorted=False)
    return values, members.gather(1, place)


def batch_topk_threshold(pre_acts: Tensor, k: int) -> Tensor:
    """The (k * batch)-th largest of all entries of (batch, n), at least the smallest positive number. ()"""
    batch, n = pre_acts.shape
    candidates = pre_acts if n <= 4 * k else topk(pre_acts.detach(), 4 * k)[0]
    threshold = candidates.flatten().topk(k * batch, sorted=False).values.min()
    if candidates is not pre_acts and (candidates.amin(1) > threshold).any():  # a row may hold more than 4 k of them
        threshold = pre_acts.flatten().topk(k * batch, sorted=False).values.min()
    return threshold.clamp(min=torch.finfo(pre_acts.dtype).tiny)


class Transposed:
    """The pairs (token, latent) of `indices` (batch, k), sorted by latent, for sums over each latent's tokens."""

    def __init__(self, indices: Tensor, n_latents: int):
        latents, self.order = indices.flatten().to(torch.int32).sort()
        self.tokens = self.order // indices.shape[1]
        bounds = torch.arange(n_latents, device=indices.device, dtype=torch.int32)
        self.starts = torch.searchsorted(latents, bounds)

    def sum(self, values: Tensor, rows: Tensor) -> Tensor:
        """sum over each latent's tokens of value * row: (batch, k), (batch, d) -> (n_latents, d), in fp32."""
        weights = values.flatten()[self.order].float()
        return F.embedding_bag(self.tokens, rows.float(), self.starts, mode="sum", per_sample_weights=weights)


def encode_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int) -> tuple[Tensor, Tensor, Transposed]:
    """TopK code of x (batch, d): values >= 0 and latent indices, both (batch, k), and the pairs sorted by latent."""
    return _EncodeTopK.apply(x, W_enc, b_enc, b_dec, k)


def decode_sparse(values: Tensor, indices: Tensor, pairs: Transposed, W_dec: Tensor) -> Tensor:
    """sum_j values_j W_dec[indices_j]: (batch, k) twice -> (batch, d)."""
    return _DecodeSparse.apply(values, indices, pairs, W_dec)


class _EncodeTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_enc, b_dec, k):
        dtype = compute_dtype(x)
        centred = x - b_dec
        pre_acts = F.linear(centred.to(dtype), W_enc.to(dtype), b_enc.to(dtype))
        values, indices = topk(pre_acts, k)
        values = values.relu().float()
        pairs = Transposed(indices, len(W_enc))
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(centred, W_enc, values)
        ctx.pairs = pairs
        return values, indices, pairs

    @staticmethod
    def backward(ctx, grad_values, _indices, _pairs):
        centred, W_enc, values = ctx.saved_tensors
        grad_values = grad_values * (values > 0)
        grad_W = ctx.pairs.sum(grad_values, centred)
        grad_b = ctx.pairs.sum(grad_values, torch.ones_like(centred[:, :1])).squeeze(1)
        return None, grad_W, grad_b, -(grad_b @ W_enc), None


class _DecodeSparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, indices, pairs, W_dec):
        ctx.save_for_backward(values, indices, W_dec)
        ctx.pairs = pairs
        return F.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum")

    @staticmethod
    def backward(ctx, grad):
        values, indices, W_dec = ctx.saved_tensors
        dtype = compute_dtype(grad)
        grad_values = (grad.to(dtype) @ W_dec.to(dtype).T).gather(1, indices).float()
        return grad_values, None, None, ctx.pairs.sum(values, grad)
