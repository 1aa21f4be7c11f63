"""Muon, an optimiser of weight matrices: momentum whose directions are made about equally large before each step.

torch.optim.Muon does the same with products in bf16 whatever the processor. Without bf16 in hardware, as in most
laptops, one of its updates takes tens of times as long as in fp32 (tests/benchmarks/test_muon.py).

Source: Jordan et al. 2024 (the iteration); Liu et al. 2025, arXiv 2502.16982 (the length of a step, AdamW's).
"""

import torch
from torch import Tensor

from helpers.base import products

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of a x + b x^3 + c x^5, which brings 0 to 1 near 1 fast
STEPS = 5


class Muon(torch.optim.Muon):
    """torch's, with Nesterov's momentum and steps as long as AdamW's; products in bf16 only where those are fast."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                moving = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                moving.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonal(weight.grad.lerp(moving, group["momentum"]))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * 0.2 * max(weight.shape) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """U S' V^T of a matrix (m, n) that is U S V^T, with S' between 0.7 and 1.2: by Newton-Schulz, without its SVD."""
    a, b, c = COEFFICIENTS
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide.to(products.compute_dtype(matrix))
    x = x / x.norm().clamp(min=1e-7)  # no singular value above 1
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if wide is not matrix else x
