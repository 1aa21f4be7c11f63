"""What would go wrong silently is refused where it enters; and checksums, to know again what a result depends on."""

import zlib

import torch
from torch import Tensor


def require_finite(x: Tensor, what: str, remedy: str) -> None:
    """Raise ValueError if any of x (..., d) is NaN or infinite. It costs one sum: that is finite only if all are.

    `what` names the values in the plural, `remedy` says what to do.
    """
    if x.sum(-1, dtype=torch.promote_types(x.dtype, torch.float32)).isfinite().all():
        return
    broken = ~x.isfinite()
    if broken.any():  # else the sum alone overflowed
        first = tuple(broken.nonzero()[0].tolist())
        count = f"{int(broken.sum())} of {x.numel()}"
        raise ValueError(f"{count} {what} are NaN or infinite, the first at {first}: {remedy}")


def spread(x: Tensor, what: str = "activations", around: Tensor | None = None) -> Tensor:
    """Sum of squared distances of x (n, ...) from their mean, or from `around`: what an error is a share of. ()

    Raises ValueError for x that is not finite, and where there is no distance but rounding, as for one row or none.
    """
    require_finite(x, what, "check the subject and its dtype")
    total = (x - (x.mean(0) if around is None else around)).square().sum()
    if not total > 1e-12 * x.square().sum():
        raise ValueError(f"{len(x)} {what} without variance: the error has no scale; take more, which differ")
    return total


def checksum(x: Tensor, start: int = 0) -> int:
    """A number that tells x (rows, columns) from any other, also from its own rows or columns in another order or cut.

    `start` is the checksum of what came before. It sums bits as integers, so it is the same on any device and for any
    number of threads, and costs about a hundredth of a training step.
    """
    bits = torch.atleast_2d(x.detach()).contiguous().view(INTEGERS[x.element_size()])
    bits = bits if bits.element_size() > 2 else bits.int()
    weights = GOLDEN * (2 * torch.arange(bits.shape[-1], device=x.device) + 1)  # odd, and far from each other
    mixed = (bits ^ bits >> 15) * weights.to(bits.dtype)  # wraps around; a sign, the highest bit, reaches others
    return zlib.crc32(mixed.sum(-1).cpu().numpy(), zlib.crc32(repr(tuple(x.shape)).encode(), start))


GOLDEN = 2_654_435_761  # 2^32 over the golden ratio
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
