"""The fast parts of a training step: exact top-k, and gradients that touch only the latents that are on.

A code has few of n latents per token, so most of a dense step multiplies by zero, and most of the rest moves large
temporaries in and out of memory. Here

    pre_acts   one product, a block of tokens at a time, into a buffer that every step uses again: nothing of size
               (batch, n) exists. It runs in bf16 where the processor has bf16 products (4 to 8 times the speed of fp32)
    topk       the k best of n/4 group maxima, found in the same way, then the k best of their 4 k members. Exact:
               whoever is among the k largest sits in a group whose maximum is among the k largest maxima. Floats above
               zero are ordered like the integers of the same bits, and integers compare faster
    above      what is over a threshold, for ReLU and its kin, found in each block as well
    decode     a weighted sum of decoder rows per token; the gradient of a value is one dot product
    gradients  sort the pairs (token, latent) by latent once; the gradient of a latent's encoder or decoder
               row is then a weighted sum of the rows of its own tokens. `adam` asks for it a block of latents at a
               time (`unsummed`), so that no full gradient exists either

All sums over tokens are in fp32, and so is everything but the product that ranks the latents and gives their values.
"""

import contextlib
import copy
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.base import products
from helpers.dictionaries import shards

GROUP = 4  # members per group in each stage of topk
BLOCK = {"cpu": 1024, "gpu": 16384}  # tokens whose pre-activations are worked on at once
SAMPLE = 256  # tokens that tell whether a batch is sparse
INTEGER = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


Unsummed = dict[Tensor, list[tuple["Code", Tensor, Tensor]]]  # of a weight: its gradient is the sum of `code.sums(...)`

_buffers: dict[tuple, Tensor] = {}
_unsummed: Unsummed = {}

with warnings.catch_warnings(action="ignore"):
    torch.empty(0, 0).to_sparse_csr()  # the first in a process warns that such tensors are in beta


@contextlib.contextmanager
def unsummed(*weights: Tensor) -> Iterator[Unsummed]:
    """Within, `backward` leaves the sparse gradients of these weights (n_latents, d) here and not in `weight.grad`."""
    found: Unsummed = {weight: [] for weight in weights}
    _unsummed.update(found)
    try:
        yield found
    finally:
        for weight in weights:
            del _unsummed[weight]


def topk(x: Tensor, k: int, group: shards.Group = None) -> tuple[Tensor, Tensor]:
    """The k largest of each row of relu(x) (batch, n), in no order: values and indices (batch, k).

    Where fewer than k entries are above zero, the rest of the values is zero and their indices mean nothing. The
    values carry no gradient. With a `group` x is a part of each row, and so are the k largest: the others are zero.
    """
    values, indices = _topk_of_integers(x.contiguous().view(INTEGER[x.dtype]), min(k, x.shape[1]))
    return shards.winners(values.view(x.dtype).relu(), k, group), indices


def _topk_of_integers(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    n_groups = x.shape[1] // GROUP
    if x.shape[1] % GROUP or n_groups <= k:  # no group could be left out
        return _select(x, k)
    maxima = x.view(-1, GROUP, n_groups).amax(1)  # group g holds g, g + n_groups, g + 2 n_groups, ...
    groups = _topk_of_integers(maxima, k)[1]
    members = (groups.unsqueeze(1) + n_groups * torch.arange(GROUP, device=x.device)[:, None]).flatten(1)
    values, place = _select(x.gather(1, members), k)
    return values, members.gather(1, place)


def _select(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of integers, all compared. NumPy partitions integers with vector instructions, several
    times faster than torch, but returns no indices; so the index rides in the low bits."""
    wide, bits = (torch.int32, 16) if x.dtype == torch.int16 and x.shape[1] <= 2**16 else (torch.int64, 32)
    if x.device.type != "cpu" or x.dtype == torch.int64:
        return x.topk(k, sorted=False)
    packed = x.to(wide).bitwise_left_shift_(bits).bitwise_or_(torch.arange(x.shape[1], dtype=wide))
    packed.numpy().partition(x.shape[1] - k, axis=1)
    largest = packed[:, -k:]
    return (largest >> bits).to(x.dtype), (largest & (2**bits - 1)).long()


def batch_topk_threshold(pre_acts: Tensor, k: int, group: shards.Group = None) -> Tensor:
    """The (k * batch)-th largest of all entries of (batch, n), at least the smallest positive number. ()"""
    return _largest_of_batch(lambda m: topk(pre_acts.detach(), m), k, pre_acts.shape[1], group)[2]


def _largest_of_batch(
    topk_of: Callable[[int], tuple[Tensor, Tensor]], k: int, n: int, group: shards.Group
) -> tuple[Tensor, Tensor, Tensor]:
    """Values and indices (batch, m) that hold the k * batch largest of a batch, and the least of those. `topk_of(m)`
    gives the m largest of each row."""
    m = min(n, 4 * k)
    while True:
        values, indices = topk_of(m)
        threshold = shards.kth_largest(values, k * len(values), group)
        if not shards.total((values.amin(1) > threshold).any() & (m < n), group):
            return values, indices, threshold.clamp(min=torch.finfo(values.dtype).tiny)
        m = min(n, 4 * m)  # some row may hold more than it was asked for


@dataclass
class Code:
    """Which latents are on, for which tokens and how much: m pairs (token, latent), token after token."""

    values: Tensor  # (m,) float32, at least zero; carries the gradient
    latents: Tensor  # (m,) int32
    tokens: Tensor  # (m,) int32
    starts: Tensor  # (batch,) int32: where the pairs of each token begin
    n_latents: int
    group: shards.Group = None  # whose processes hold the pairs of other latents
    _sorted: list = field(default_factory=list, init=False, repr=False)  # what `_by_latent` found

    def learning(self, *encoder: Tensor) -> "Code":
        """The same pairs, with values that take their gradient to the `encoder`: centred x, W_enc, b_enc and b_dec.

        A gradient holds the code that it is of; one that held its own gradient would never be freed, so this is a copy.
        """
        code = copy.copy(self)
        code.values = _ValuesGradient.apply(self.values, self, *encoder)
        return code

    def fired(self) -> Tensor:
        """(n_latents,) bool: on for any token."""
        return self.values.new_zeros(self.n_latents).index_add_(0, self.latents, self.values.detach()) > 0

    def largest(self, k: int) -> "Code":
        """The k largest of each token; all tokens must have the same number of pairs. Gradients go on to this code."""
        values, latents = (each.view(len(self.starts), -1) for each in (self.values, self.latents))
        place = values.detach().topk(k, sorted=False).indices
        starts = self.starts[: len(values)] // values.shape[1] * k
        tokens = torch.arange(len(values), dtype=torch.int32, device=values.device).repeat_interleave(k)
        return Code(
            values.gather(1, place).flatten(), latents.gather(1, place).flatten(), tokens, starts, self.n_latents
        )

    def sums(self, values: Tensor, rows: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """sum over each latent's tokens of value * row: (m,), (batch, d) -> (last - first, d), for those latents."""
        order, tokens, starts = self._by_latent
        last = self.n_latents if last is None else last
        whole = (first, last) == (0, self.n_latents)
        begin, end = (0, len(order)) if whole else starts[[first, last]].tolist()
        weights = values.index_select(0, order[begin:end])  # several times faster than values[...]
        offsets = starts[first:last] - begin
        return F.embedding_bag(tokens[begin:end], rows, offsets, mode="sum", per_sample_weights=weights)

    def dots(self, rows: Tensor, weight: Tensor) -> Tensor:
        """The token's row . the latent's row of weight, for each pair: (batch, d), (n_latents, d) -> (m,)."""
        if rows.device.type != "cpu":
            pairs = self.latents, self.starts, self.tokens
            return torch.ops.aten._embedding_bag_per_sample_weights_backward(rows, weight, *pairs, 0)
        zeros, shape = rows.new_zeros(len(self.latents)), (len(rows), len(weight))
        pairs = torch.sparse_csr_tensor(self._bounds(), self.latents, zeros, shape, check_invariants=False)
        return torch.sparse.sampled_addmm(pairs, rows, weight.T).values()

    @property
    def _by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs sorted by latent: order (m,), tokens (m,), and where each latent's begin (n_latents + 1,)."""
        if not self._sorted:
            self._sorted.append(self._sort())
        return self._sorted[0]

    def _sort(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.latents.device.type == "cpu":  # to count takes a third of the time that sorting takes
            pairs = np.arange(len(self.latents), dtype=np.int32), self.latents.numpy(), self._bounds().numpy()
            found = scipy.sparse.csr_array(pairs, shape=(len(self.starts), self.n_latents)).tocsc()
            return tuple(torch.from_numpy(each) for each in (found.data, found.indices, found.indptr))
        latents, order = self.latents.sort()
        bounds = torch.arange(self.n_latents + 1, device=latents.device, dtype=latents.dtype)
        return order, self.tokens[order], torch.searchsorted(latents, bounds, out_int32=True)

    def _bounds(self) -> Tensor:
        """Where the pairs of each token begin and the last ones end: (batch + 1,)."""
        return F.pad(self.starts, (0, 1), value=len(self.latents))


def code_of(latents: Tensor) -> Code:
    """What is above zero of dense latents (batch, n_latents). No gradient."""
    tokens, which = (latents > 0).nonzero(as_tuple=True)
    starts = torch.searchsorted(tokens, torch.arange(len(latents), device=tokens.device), out_int32=True)
    return Code(latents[tokens, which], which.int(), tokens.int(), starts, latents.shape[1])


def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    k: int,
    sizes: Tensor | None = None,
    among: Tensor | None = None,
    group: shards.Group = None,
) -> Code:
    """TopK code of x (batch, d_model). `sizes` (n_latents,), positive: latents are ranked by their value times this.
    `among` (m,), ascending: only these latents take part. `group`: latents of all its processes compete, and this
    one's that lose have the value zero. No gradient for x and sizes."""
    b_dec = shards.shared(b_dec, group)
    centred, encoder = (x - b_dec).detach(), (W_enc, b_enc, sizes)
    with torch.no_grad():
        if among is not None:
            encoder = [None if each is None else each[among] for each in encoder]
        values, latents = _largest(centred, *encoder, k, group)
        each = values.shape[1]  # k, or all that take part here
        latents = (latents if among is None else among[latents]).flatten().int()
        values = _unscaled(values.flatten(), latents, sizes)
    tokens = torch.arange(len(x), device=x.device, dtype=torch.int32)
    code = Code(values, latents, tokens.repeat_interleave(each), each * tokens, len(W_enc), group)
    return code.learning(centred, W_enc, b_enc, b_dec)


def encode_batch_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    k: int,
    sizes: Tensor | None = None,
    group: shards.Group = None,
) -> Code:
    """BatchTopK code of x (batch, d_model): the k * batch largest of the batch, above zero. As `encode_topk` else."""
    b_dec = shards.shared(b_dec, group)
    centred = (x - b_dec).detach()
    with torch.no_grad():
        values, latents, threshold = _largest_of_batch(
            lambda m: _largest(centred, W_enc, b_enc, sizes, m), k, len(W_enc), group
        )
        tokens, place = (values >= threshold).nonzero(as_tuple=True)
        starts = torch.searchsorted(tokens, torch.arange(len(x), device=x.device), out_int32=True)
        values, latents = values[tokens, place], latents[tokens, place].int()
        values = _unscaled(values, latents, sizes)
    code = Code(values, latents, tokens.int(), starts, len(W_enc), group)
    return code.learning(centred, W_enc, b_enc, b_dec)


def _unscaled(values: Tensor, latents: Tensor, sizes: Tensor | None) -> Tensor:
    """Values over the sizes that they were ranked with, (m,); 0 for a latent of size 0."""
    return values if sizes is None else values / sizes[latents].clamp(min=torch.finfo(sizes.dtype).tiny)


def encode_above(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    window: tuple[Tensor, Tensor] | None = None,
    most: float = 1.0,
) -> tuple[Code, Code | None] | None:
    """The pre-activations of x (batch, d_model) that are above 0, and no second code. With a `window` from a floor to a
    threshold, each (n_latents,): those above the threshold, and those that are above the floor only, without gradient.
    None where both together are more than the share `most` of the first tokens' pre-activations. No gradient for x."""
    centred, parts, begin = (x - b_dec).detach(), [], 0
    floor, threshold = window or (None, None)
    with torch.no_grad():
        for block in _pre_acts(centred, W_enc, b_enc if floor is None else b_enc - floor, first=SAMPLE):
            places = _above_zero(block)
            if not parts and len(places) > most * block.numel():
                return None
            tokens = places // len(W_enc)
            latents = (places - tokens * len(W_enc)).int()
            parts.append((block.view(-1)[places].float(), latents, tokens.int() + begin))
            begin += len(block)
        values, latents, tokens = (torch.cat(part) for part in zip(*parts, strict=True))
        if window:
            values = values + floor[latents]
            on = values > threshold[latents]
            near = _code(values[~on], latents[~on], tokens[~on], x, len(W_enc))
            values, latents, tokens = values[on], latents[on], tokens[on]
    code = _code(values, latents, tokens, x, len(W_enc))
    return code.learning(centred, W_enc, b_enc, b_dec), near if window else None


def _code(values: Tensor, latents: Tensor, tokens: Tensor, x: Tensor, n_latents: int) -> Code:
    """The code of x (batch, d_model) from its pairs (m,), token after token."""
    starts = torch.searchsorted(tokens, torch.arange(len(x), device=x.device, dtype=torch.int32), out_int32=True)
    return Code(values, latents, tokens, starts, n_latents)


def _above_zero(x: Tensor) -> Tensor:
    """Where x (batch, n) is above zero, in the order of memory: (m,). NumPy finds the places several times faster."""
    if x.device.type != "cpu":
        return (x > 0).view(-1).nonzero().squeeze(1)
    above = _scratch("above", x.shape, torch.bool, x.device)
    numbers = x.view(torch.int16) if x.dtype == torch.bfloat16 else x
    np.greater(numbers.numpy(), 0, out=above.numpy())
    return torch.from_numpy(np.flatnonzero(above.numpy()))


def decode_sparse(code: Code, W_dec: Tensor) -> Tensor:
    """sum_j values_j W_dec[latents_j] for each token: (batch, d_model) in float32."""
    return shards.summed(_Decode.apply(code.values, code, W_dec), code.group)


def _largest(
    centred: Tensor, W: Tensor, b: Tensor, sizes: Tensor | None, k: int, group: shards.Group = None
) -> tuple[Tensor, Tensor]:
    """The k largest of sizes * relu(W x + b) for each x of (batch, d): values in fp32 and indices, (batch, k)."""
    parts = [topk(block, k, group) for block in _pre_acts(centred, W, b, sizes)]
    values, indices = (torch.cat(part) for part in zip(*parts, strict=True))
    return values.float(), indices


def _pre_acts(
    centred: Tensor, W: Tensor, b: Tensor, sizes: Tensor | None = None, first: int | None = None
) -> Iterator[Tensor]:
    """sizes * (W x + b) for a block of tokens after another (tokens, n), in the buffer of the block before; the first
    block may be smaller."""
    dtype, most = products.compute_dtype(centred), BLOCK["cpu" if W.device.type == "cpu" else "gpu"]
    if sizes is None:
        weights, bias = _in_type(dtype, "weights", W), b.to(dtype)
    else:
        weights = torch.mul(W, sizes.unsqueeze(-1), out=_scratch("weights", W.shape, dtype, W.device))
        bias = (b * sizes).to(dtype)
    centred = centred.to(dtype)
    for x in (*centred[:first].split(most), *centred[len(centred) if first is None else first :].split(most)):
        if len(x):
            pre_acts = _scratch("pre_acts", (len(x), len(W)), dtype, W.device)
            yield torch.addmm(bias, x, weights.T, out=pre_acts)


def _in_type(dtype: torch.dtype, purpose: str, weight: Tensor) -> Tensor:
    """The weight itself, or a copy of this type in the buffer for this purpose."""
    return weight if weight.dtype == dtype else _scratch(purpose, weight.shape, dtype, weight.device).copy_(weight)


def _scratch(purpose: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer that is kept, as large as the largest so far: fresh ones cost more in page faults than their work."""
    key, size = (purpose, threading.get_ident(), dtype, device), math.prod(shape)
    if key not in _buffers or len(_buffers[key]) < size:
        _buffers[key] = torch.empty(size, dtype=dtype, device=device)
    return _buffers[key][:size].view(shape)


class _ValuesGradient(torch.autograd.Function):
    """Passes the values on; backward takes their gradient to the encoder and the biases."""

    @staticmethod
    def forward(ctx, values, code, centred, W_enc, b_enc, b_dec):
        ctx.save_for_backward(values, centred, W_enc, b_enc)
        ctx.code = code
        return values.clone()

    @staticmethod
    def backward(ctx, grad):
        values, centred, W_enc, b_enc = ctx.saved_tensors
        grad = grad * (values > 0)
        grad_b = torch.zeros_like(b_enc).index_add_(0, ctx.code.latents, grad)
        return None, None, None, _row_gradient(W_enc, ctx.code, grad, centred), grad_b, -(grad_b @ W_enc)


class _Decode(torch.autograd.Function):
    """The reconstruction; backward gives the gradient of the values, in fp32, and takes it to the decoder."""

    @staticmethod
    def forward(ctx, values, code, W_dec):
        ctx.save_for_backward(values, W_dec)
        ctx.code, dtype = code, products.compute_dtype(W_dec)
        rows = _in_type(dtype, "rows", W_dec)
        return F.embedding_bag(code.latents, rows, code.starts, mode="sum", per_sample_weights=values.to(dtype)).float()

    @staticmethod
    def backward(ctx, grad):
        values, W_dec = ctx.saved_tensors
        by_row = _row_gradient(W_dec, ctx.code, values, grad) if ctx.needs_input_grad[2] else None
        return ctx.code.dots(grad, W_dec), None, by_row


def _row_gradient(weight: Tensor, code: Code, values: Tensor, rows: Tensor) -> Tensor | None:
    """Gradient of `weight` (n_latents, d), or none where it is wanted `unsummed`."""
    if weight in _unsummed:
        return _unsummed[weight].append((code, values, rows))
    return code.sums(values, rows)
