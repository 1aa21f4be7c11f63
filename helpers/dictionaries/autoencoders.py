"""Sparse autoencoders: one linear encoder, one linear decoder, and the activation between them is the architecture.

    pre_acts = W_enc (x - b_dec) + b_enc        latents = activation(pre_acts)        x_hat = latents W_dec + b_dec

    ReLU       z = max(0, a)                               price sum z             L1
    Gated      z = 1[a > 0] max(0, e^r a + b)              price sum max(0, a)     Rajamanoharan et al. 2024a
    JumpReLU   z = a 1[a > theta]                          price sum 1[a > theta]  Rajamanoharan et al. 2024b
    TopK       the k largest a of each token, above zero   no price                Gao et al. 2024, section 2.3
    MultiTopK  TopK, trained at 4 k as well                no price                the same, section 5.3
    BatchTopK  the k * batch largest a of a batch          no price                Bussmann et al. 2024

A latent is one row of W_enc (what it looks for) and one row of W_dec (what it adds back), both (n_latents, d_model).
Bookkeeping (dead latents, schedules) lives in training.py, so that no architecture can forget it.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.dictionaries import kernels, shards


class ReLU(nn.Module):
    """Keep what is positive. Its price is L1, which also shrinks what it keeps (Gao et al. 2024, section 5.1)."""

    window = None  # of what is off only pre-activations from here to here teach it, each (n_latents,); None for none do
    dense_cost = 1.0  # of a step that multiplies all latents, in those of ReLU

    def forward(self, pre_acts: Tensor, which: Tensor | None = None) -> Tensor:
        """Of pre-activations (batch, n_latents), or of some (m,) and the latents `which` (m,) that they belong to."""
        return pre_acts.relu()

    def price(self, pre_acts: Tensor, latents: Tensor, which: Tensor | None = None) -> Tensor:
        """What sparsity costs each token, (batch,); or all of some pairs (m,) of token and latent, ()."""
        return latents.sum(-1)


class Gated(nn.Module):
    """One reading of the pre-activation decides whether a latent is on, a rescaled one decides how much."""

    window = None
    dense_cost = 2.0

    def __init__(self, n_latents: int):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(n_latents))
        self.bias = nn.Parameter(torch.zeros(n_latents))

    def forward(self, pre_acts: Tensor, which: Tensor | None = None) -> Tensor:
        scale, bias = (_of(p, which).to(pre_acts) for p in (self.log_scale.exp(), self.bias))
        return (pre_acts * scale + bias).relu() * (pre_acts > 0)

    def price(self, pre_acts: Tensor, latents: Tensor, which: Tensor | None = None) -> Tensor:
        """What sparsity costs each token: (batch,). The gate pays, the magnitude does not, so nothing shrinks."""
        return pre_acts.relu().sum(-1)


class JumpReLU(nn.Module):
    """A learned threshold per latent; its gradient comes from a window around it, `bandwidth` wide.

    The defaults suit inputs of unit norm a few hundred wide, whose pre-activations start near 1 / sqrt(d_model).
    """

    lr_factor = 10.0  # thresholds live in log units and have far to go
    dense_cost = 2.0

    def __init__(self, n_latents: int, threshold: float = 0.03, bandwidth: float = 0.03):
        super().__init__()
        self.log_threshold = nn.Parameter(torch.full((n_latents,), math.log(threshold)))
        self.bandwidth = bandwidth

    @property
    def window(self) -> tuple[Tensor, Tensor]:
        """The lower half of each window."""
        threshold = self.log_threshold.detach().exp()
        return threshold - self.bandwidth / 2, threshold

    def forward(self, pre_acts: Tensor, which: Tensor | None = None) -> Tensor:
        return _Jump.apply(pre_acts, _of(self.log_threshold.exp(), which), self.bandwidth)

    def price(self, pre_acts: Tensor, latents: Tensor, which: Tensor | None = None) -> Tensor:
        """What sparsity costs each token: (batch,), the number of latents that are on."""
        return _Step.apply(pre_acts, _of(self.log_threshold.exp(), which), self.bandwidth).sum(-1)


class TopK(nn.Module):
    """Keep the k largest of each token, and of those what is positive."""

    group: shards.Group = None  # whose processes hold latents to compete with

    def __init__(self, k: int):
        super().__init__()
        self.k = _at_least_one(k)

    def forward(self, pre_acts: Tensor) -> Tensor:
        values, indices = kernels.topk(pre_acts.detach(), self.k, self.group)
        return torch.zeros_like(pre_acts).scatter(-1, indices, pre_acts.gather(-1, indices).relu() * (values > 0))


class MultiTopK(TopK):
    """TopK whose training loss is L(k) + L(4 k) / 8, so that its code goes on improving beyond k."""

    wider = 4  # times k
    weight = 1 / 8


class BatchTopK(nn.Module):
    """Keep the k * batch largest of a batch; outside training, what reaches a fixed threshold.

    The threshold is calibrated when training ends and saved with the weights: encoding never depends on the batch.
    """

    group: shards.Group = None  # whose processes hold latents to compete with

    def __init__(self, k: int):
        super().__init__()
        self.k = _at_least_one(k)
        self.register_buffer("threshold", torch.tensor(math.nan))

    def forward(self, pre_acts: Tensor) -> Tensor:
        if self.training:
            threshold = kernels.batch_topk_threshold(pre_acts, self.k, self.group)
        elif self.threshold.isnan():
            raise RuntimeError("BatchTopK has no threshold yet; train it, or call calibrate(batches) on typical data")
        else:
            threshold = self.threshold.to(pre_acts)
        return pre_acts.relu() * (pre_acts >= threshold)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Set the threshold to the least value kept, averaged over batches of pre-activations (batch, n_latents).

        Raises ValueError for no batches.
        """
        thresholds = [kernels.batch_topk_threshold(b, self.k, self.group) for b in batches]
        if not thresholds:
            raise ValueError("there is nothing to calibrate on: no batch came; check the stream of activations")
        self.threshold.copy_(torch.stack(thresholds).mean())


class Competition(NamedTuple):
    """Latents that compete for the same places."""

    k: int  # places for each token
    sizes: Tensor | None  # (n_latents,) what they are ranked with; 0 for who takes no part
    rows: Tensor  # (n_latents, d), of the decoder, that the winners write with


class SparseAutoencoder(nn.Module):
    """Encoder, activation, decoder. `forward(x)` is the reconstruction of x (batch, d_model).

    Starts with encoder and decoder rows parallel and the decoder's of unit norm (Gao et al. 2024, A.1).
    """

    squared = True  # its loss
    free_norms = False  # of decoder rows

    def __init__(self, d_model: int, n_latents: int, activation: nn.Module, seed: int = 0, tied_init: bool = True):
        super().__init__()
        k = getattr(activation, "k", 0)
        if k > n_latents:
            raise ValueError(f"k = {k} is more than the {n_latents} latents there are; choose k <= n_latents")
        random = torch.Generator().manual_seed(seed)
        directions = F.normalize(torch.randn(n_latents, d_model, generator=random), dim=-1)
        untied = F.normalize(torch.randn(n_latents, d_model, generator=random), dim=-1)
        self.W_dec = nn.Parameter(directions)
        self.W_enc = nn.Parameter(directions.clone() if tied_init else untied)
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.activation = activation

    @property
    def d_model(self) -> int:
        return self.W_dec.shape[1]

    @property
    def n_latents(self) -> int:
        return self.W_dec.shape[0]

    @property
    def group(self) -> shards.Group:
        """The processes over which the latents are divided; None where all are here."""
        return getattr(self.activation, "group", None)

    def pre_acts(self, x: Tensor) -> Tensor:
        """(batch, d_model) -> (batch, n_latents), before the activation."""
        return F.linear(x - self.b_dec, self.W_enc, self.b_enc)

    def sizes(self) -> Tensor | None:
        """What latents are multiplied by before they compete, (n_latents,); None for nothing."""
        return None

    def scores(self, x: Tensor) -> Tensor:
        """What the activation sees: pre-activations times sizes, (batch, n_latents)."""
        sizes = self.sizes()
        return self.pre_acts(x) if sizes is None else self.pre_acts(x) * sizes

    def encode(self, x: Tensor) -> Tensor:
        """(batch, d_model) -> latents (batch, n_latents), mostly zero."""
        return self.unscaled(self.activation(self.scores(x)))

    def unscaled(self, active: Tensor) -> Tensor:
        """What the activation gave, divided by sizes again: (batch, n_latents)."""
        sizes = self.sizes()
        return active if sizes is None else active / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)

    def unit(self, variance: Tensor) -> Tensor | float:
        """What prices are counted in, given the variance of the inputs. Here inputs have unit norm."""
        return 1.0

    def decode(self, latents: Tensor) -> Tensor:
        """(batch, n_latents) -> (batch, d_model)."""
        return shards.summed(latents @ self.W_dec.to(latents), self.group) + self.b_dec.to(latents)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def competitions(self) -> list[Competition]:
        """Where latents compete for their places. Just one."""
        return [Competition(self.activation.k, self.sizes(), self.W_dec)]

    def other_error(self, x: Tensor, parts: list[Tensor]) -> Tensor | float:
        """What else is to be rebuilt of x (batch, d), by what the winners of each competition write: a weighted squared
        error, (). Here nothing."""
        return 0.0

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Set the threshold of BatchTopK on batches of inputs."""
        self.activation.calibrate(self.scores(x) for x in batches)

    @torch.no_grad()
    def start_from(self, x: Tensor, encoder_scale: float = 1.0) -> None:
        """Fit the start to a sample (batch, d_model): b_dec its geometric median, encoder scaled so that
        reconstructions have `encoder_scale` times the norm of the inputs (1 in Gao et al. 2024, A.1).

        Raises ValueError if no latent is on, as where inputs are far shorter than a threshold."""
        self.b_dec.copy_(geometric_median(x))
        x = x[:1024]  # enough for a mean, and a dense code of more would take memory that training does not need
        wanted, got = (x - self.b_dec).norm(dim=-1).mean(), (self(x).flatten(1) - self.b_dec).norm(dim=-1).mean()
        if not got > 1e-6 * wanted:
            raise ValueError("no latent is on at the start: scale the activations to unit norm, or lower the threshold")
        self.W_enc.mul_(encoder_scale * wanted / got)

    def constrain(self) -> None:
        """After each update: weights back to what the architecture allows. Here all are allowed."""

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Rows of W_dec back to unit norm."""
        self.W_dec.copy_(F.normalize(self.W_dec, dim=-1))


def geometric_median(x: Tensor, n_iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least summed distance to the rows of x (batch, d): Weiszfeld's iteration. (d,)"""
    point = x.mean(0)
    for _ in range(n_iterations):
        weights = 1 / (x - point).norm(dim=-1, keepdim=True).clamp(min=1e-12)
        previous, point = point, (weights * x).sum(0) / weights.sum()
        if (point - previous).norm() <= tolerance * point.norm():
            break
    return point


def _of(parameter: Tensor, which: Tensor | None) -> Tensor:
    """A parameter (n_latents,) of the latents `which`: (m,). Of all for None."""
    return parameter if which is None else parameter.index_select(0, which)


def _at_least_one(k: int) -> int:
    if k < 1:
        raise ValueError(f"k = {k} keeps nothing; choose k >= 1")
    return k


class _Jump(torch.autograd.Function):
    """a 1[a > theta]: the gradient of theta is -theta / bandwidth inside the window (eq. 11 of that paper)."""

    @staticmethod
    def forward(ctx, pre_acts, threshold, bandwidth):
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return pre_acts * (pre_acts > threshold.to(pre_acts))

    @staticmethod
    def backward(ctx, grad):
        pre_acts, threshold = ctx.saved_tensors
        local = threshold.to(pre_acts)
        near = ((pre_acts - local).abs() < ctx.bandwidth / 2) * grad
        return grad * (pre_acts > local), -threshold / ctx.bandwidth * near.float().sum_to_size(threshold.shape), None


class _Step(torch.autograd.Function):
    """1[a > theta]: the gradient of theta is -1 / bandwidth inside the window, none reaches a (eq. 12)."""

    @staticmethod
    def forward(ctx, pre_acts, threshold, bandwidth):
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return (pre_acts > threshold.to(pre_acts)).to(pre_acts)

    @staticmethod
    def backward(ctx, grad):
        pre_acts, threshold = ctx.saved_tensors
        near = ((pre_acts - threshold.to(pre_acts)).abs() < ctx.bandwidth / 2) * grad
        return None, -near.float().sum_to_size(threshold.shape) / ctx.bandwidth, None
