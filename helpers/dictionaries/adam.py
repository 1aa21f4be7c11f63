"""Adam for an autoencoder, a block of latents at a time.

    g    gradient of the rows of a block, summed from the sparse code there and then, or a slice of `weight.grad`
    g   -= (g . w) w                                             only decoder rows, which keep unit norm
    m, v = b1 m + (1 - b1) g, b2 v + (1 - b2) g^2;   w -= lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
    w   /= |w|                                                   only decoder rows

Doing all of it while a block is in the processor's cache saves most of the traffic that four passes over the weights
would cost, and the memory of a gradient. The result is that of `torch.optim.Adam` on the full matrices.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from helpers.dictionaries.autoencoders import SparseAutoencoder
from helpers.dictionaries.kernels import Unsummed

BETAS = (0.9, 0.999)
EPS = (
    6.25e-10  # gradients are means over a batch and tiny; a usual eps would tie the step to the loss's scale (paper, A)
)
BLOCK = {"cpu": 2**21, "gpu": 2**30}  # bytes of a weight's rows that are updated at once


class Adam:
    """Updates all parameters of `sae`; its state is `tensors()`."""

    def __init__(self, sae: SparseAutoencoder, unit_norm: bool = True):
        self.sae, self.unit_norm = sae, unit_norm
        self.n_steps = 0
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in sae.named_parameters()}

    @torch.no_grad()
    def step(self, lr: float, unsummed: Unsummed) -> None:
        """One update by `weight.grad` and by what `kernels.unsummed` holds; no gradient is left."""
        self.n_steps += 1
        own = {f"activation.{name}" for name, _ in self.sae.activation.named_parameters()}
        factor = getattr(self.sae.activation, "lr_factor", 1.0)
        for name, weight in self.sae.named_parameters():
            for gradient, rows, *moments in self._blocks(name, weight, unsummed.get(weight, [])):
                unit = self.unit_norm and weight is self.sae.W_dec
                if unit:
                    gradient.addcmul_(torch.linalg.vecdot(gradient, rows).unsqueeze(1), rows, value=-1)
                self._adam(rows, gradient, *moments, lr * factor if name in own else lr)
                if unit:
                    rows.div_(torch.linalg.vector_norm(rows, dim=-1, keepdim=True))
            weight.grad = None

    def _blocks(self, name: str, weight: nn.Parameter, sparse: list) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Gradient, rows and both moments of each block of a parameter with a gradient; the last three are views."""
        if weight.grad is None and not sparse:
            return
        size = max(1, BLOCK["cpu" if weight.device.type == "cpu" else "gpu"] // (weight[0].numel() * weight.itemsize))
        for first in range(0, len(weight), size):
            last = min(first + size, len(weight))
            parts = [] if weight.grad is None else [weight.grad[first:last]]
            parts += [code.sums(values, rows, first, last) for code, values, rows in sparse]
            yield sum(parts[1:], parts[0]), *(t[first:last] for t in (weight.data, *self.moments[name]))

    def _adam(self, weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, lr: float) -> None:
        step = torch.tensor(float(self.n_steps), device=weight.device)
        torch._fused_adam_(  # the kernel of torch.optim.Adam(fused=True)
            [weight], [gradient], [mean], [square], [], [step], lr=lr, beta1=BETAS[0], beta2=BETAS[1], eps=EPS,
            weight_decay=0.0, amsgrad=False, maximize=False,
        )  # fmt: skip

    @torch.no_grad()
    def forget(self, latents: Tensor) -> None:
        """Clear the moments of some latents, (n_latents,) bool: they are new."""
        for name in ("W_enc", "W_dec", "b_enc"):
            for moment in self.moments[name]:
                moment[latents] = 0.0

    def tensors(self) -> dict[str, Tensor]:
        """Both moments of every parameter, named `adam.<parameter>.0` and `.1`: the tensors themselves."""
        return {f"adam.{name}.{i}": t for name, both in self.moments.items() for i, t in enumerate(both)}
