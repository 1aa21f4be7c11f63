"""Latents divided over processes: what these must tell each other for the result to be that of one process.

    every process   n / p of the latents: their rows of W_enc, b_enc and W_dec, their moments, their silence;
                    all of the batch, b_dec and the loss, which are the same everywhere
    winners         top-k: each process offers its k best of a token, all see all offers and keep who is on
    kth_largest     batch top-k: the same with the k * batch best of a batch
    summed          x_hat is the sum of the parts, whose gradient is that of x_hat
    shared          b_dec is read by the latents of all, whose gradients add up

The last two are g and f of Shoeybi et al. 2019, section 3.

Everything takes `group`, the processes that take part; None is one process that holds all latents, and costs nothing.
A process that loses another raises ConnectionError at the next exchange.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Group = dist.ProcessGroup | None


def span(n: int, group: Group) -> tuple[int, int]:
    """First and last + 1 of n latents that this process holds; the processes' shares differ by one at most."""
    if group is None:
        return 0, n
    rank, size = group.rank(), group.size()
    if n < size:
        raise ValueError(f"{n} latents are too few for {size} processes: start as many as there are latents, or fewer")
    return n * rank // size, n * (rank + 1) // size


def winners(values: Tensor, k: int, group: Group) -> Tensor:
    """Of every process's values (batch, m), at least zero, those among the k largest of a token; zero in the others'
    place. Of equals the process that holds earlier latents has its way, so that no more than k win."""
    if group is None:
        return values
    m = values.shape[1]
    offers = gathered(F.pad(values, (0, k - m)), group).transpose(0, 1)  # (batch, processes, k)
    best = offers.flatten(1).sort(dim=1, descending=True, stable=True).indices[:, :k]
    won = torch.zeros_like(offers, dtype=torch.bool).flatten(1).scatter_(1, best, True).view(offers.shape)
    return values * won[:, group.rank(), :m]


def kth_largest(values: Tensor, k: int, group: Group) -> Tensor:
    """The k-th largest of all values of all processes, at least zero. ()"""
    best = values.flatten().topk(min(k, values.numel()), sorted=False).values
    if group is not None:
        best = gathered(F.pad(best, (0, k - len(best))), group).flatten().topk(k, sorted=False).values
    return best.min()


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x of every process, all of one shape: (processes, ...)."""
    everyone = x.new_empty(group.size(), *x.shape)
    with _answering():
        dist.all_gather(list(everyone), x.contiguous(), group)
    return everyone


def total(x: Tensor, group: Group) -> Tensor:
    """Sum over processes of a count, or in how many of them something holds. Without gradient."""
    return x if group is None else _added(x.detach().long(), group)


def anyone(holds: bool, group: Group) -> bool:
    """Whether something holds in any process."""
    return holds if group is None else bool(total(torch.tensor(holds), group))


def summed(x: Tensor, group: Group) -> Tensor:
    """Sum over processes; each term's gradient is that of the sum."""
    return x if group is None else _Summed.apply(x, group)


def shared(x: Tensor, group: Group) -> Tensor:
    """x, which is the same everywhere; its gradient is the sum of every process's."""
    return x if group is None else _Shared.apply(x, group)


def require_same(number: int, what: str, group: Group) -> None:
    """Raise ValueError in every process unless all have the same number."""
    if group is not None and len(gathered(torch.tensor([number]), group).unique()) > 1:
        raise ValueError(f"the processes have different {what}: every one of them needs all of the same")


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return _added(x, group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _added(grad, ctx.group), None


def _added(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    with _answering():
        dist.all_reduce(x, group=group)
    return x


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """A process that ends or hangs is seen by the others, which say so."""
    try:
        yield
    except RuntimeError as error:  # of torch.distributed, whose backends raise no other
        raise ConnectionError(
            "another process of this training has ended or does not answer: see what it said last, and start all of "
            "them again; they go on from the last checkpoint"
        ) from error
