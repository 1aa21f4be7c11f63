"""Many autoencoders on one stream of activations, and how to compare them fairly.

Two methods are compared at matched L0: each method's NMSE is interpolated along its own frontier, and the ratio of two
NMSEs is averaged (geometrically) over the L0 values that both have reached. One number per seed; seeds give intervals.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import pandas as pd
from torch import Tensor, nn
from tqdm.auto import tqdm

from helpers.autoencoders import BatchTopK, Gated, JumpReLU, ReLU, SparseAutoencoder, TopK
from helpers.metrics import at_matched_l0, evaluate
from helpers.training import TrainConfig, train

ACTIVATIONS: dict[str, Callable[[int, float], nn.Module]] = {  # of n_latents and sparsity
    "ReLU": lambda n, sparsity: ReLU(),
    "Gated": lambda n, sparsity: Gated(n),
    "JumpReLU": lambda n, sparsity: JumpReLU(n),
    "TopK": lambda n, k: TopK(int(k)),
    "BatchTopK": lambda n, k: BatchTopK(int(k)),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One autoencoder of a sweep. `sparsity` is k for TopK and BatchTopK, the price of a latent for the others."""

    method: str
    n_latents: int
    sparsity: float
    seed: int = 0
    lr: float = 3e-3
    unit_norm: bool = True

    def build(self, d_model: int) -> SparseAutoencoder:
        """Raises ValueError for a method that does not exist."""
        if self.method not in ACTIVATIONS:
            raise ValueError(f"there is no method {self.method!r}; choose one of {', '.join(ACTIVATIONS)}")
        return SparseAutoencoder(
            d_model, self.n_latents, ACTIVATIONS[self.method](self.n_latents, self.sparsity), seed=self.seed
        )

    def config(self, tokens: int) -> TrainConfig:
        price = 0.0 if self.method in ("TopK", "BatchTopK") else self.sparsity
        return TrainConfig(tokens, lr=self.lr, sparsity=price, unit_norm=self.unit_norm)


def grid(**choices: Iterable) -> list[Cell]:
    """A cell for each combination: grid(method=["TopK"], n_latents=[512], sparsity=[16, 32], seed=range(3))."""
    return [Cell(**dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values())]


def sweep(
    cells: Sequence[Cell], batches: Callable[[int], Iterable[Tensor]], heldout: Tensor, tokens: int
) -> tuple[pd.DataFrame, dict[Cell, SparseAutoencoder]]:
    """Train every cell on the same `tokens`; measure it on `heldout` (n, d_model).

    `batches(tokens)` yields the training batches, the same each time. Returns the autoencoders, and a frame with one
    row per cell: its fields, nmse, l0, l0_sd, dead, minutes, and loss, the training objective over the last tenth.
    """
    rows, saes = [], {}
    for cell in (bar := tqdm(list(dict.fromkeys(cells)), unit="autoencoder")):
        bar.set_description(f"{cell.method} n={cell.n_latents}")
        saes[cell], record = train(cell.build(heldout.shape[1]), batches(tokens), cell.config(tokens))
        quality = evaluate(saes[cell], heldout)._asdict()
        del quality["density"]
        losses = [row["loss"] for row in record["curve"] if row["tokens"] > 0.9 * tokens]
        cost = {"loss": sum(losses) / len(losses), "minutes": record["minutes"]}
        rows.append(dataclasses.asdict(cell) | quality | cost)
    return pd.DataFrame(rows), saes


def matched_ratios(
    frame: pd.DataFrame, numerator: str, denominator: str, at: Sequence[float], by: Sequence[str] = ("seed",)
) -> pd.Series:
    """NMSE of one method over another's at matched L0: a geometric mean over `at`, one value for each value of `by`.

    Only the L0 values that both methods reached count. Raises ValueError if a group has none.
    """
    return frame.groupby(list(by)).apply(_geometric_ratio, numerator, denominator, at, include_groups=False)


def _geometric_ratio(frame: pd.DataFrame, numerator: str, denominator: str, at: Sequence[float]) -> float:
    a, b = (frame[frame.method == method] for method in (numerator, denominator))
    low, high = max(a.l0.min(), b.l0.min()), min(a.l0.max(), b.l0.max())
    inside = [value for value in at if low <= value <= high]
    if not inside:
        raise ValueError(
            f"{numerator} and {denominator} share L0 {low:.1f} to {high:.1f} only, which holds none of {list(at)}; "
            "widen the sweep of either"
        )
    logs = [math.log(at_matched_l0(a.l0, a.nmse, v) / at_matched_l0(b.l0, b.nmse, v)) for v in inside]
    return math.exp(sum(logs) / len(logs))
