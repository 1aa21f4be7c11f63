"""What does a reconstruction cost the language model? Splice it in and read the loss (Gao et al. 2024, section 4.1).

    r_hat = undo(sae(normalise(r)))           in place of the residual r at the site; the blocks above run on
    delta_ce  = CE(spliced) - CE(original)                              nats a token
    kl        = sum_v p_v (log p_v - log q_v)                           p original, q spliced
    recovered = (CE(ablated) - CE(spliced)) / (CE(ablated) - CE(original))
    compute share = tokens after which the subject itself had lost as much / all its tokens

Positions: what autoencoders are not trained on (`Subject.studied`) keeps its own residual. The prediction made at the
first token cannot change, so it is not counted: a row of T tokens counts the T - 2 predictions of positions 1 to T - 2.

Ablations: zero is the zero residual. Mean is the mean of the normalised activations, undone with each token's own mean
and norm: the very predictor whose NMSE is 1, so that both rulers have the same zero.

Compute: the shipped subject ends with a decay of its learning rate, which no point of the constant-rate curve has had.
To compare like with like, delta_ce is counted from the end of that curve. This assumes that a decay would gain as much
from any other point of it. The difference also takes out that the curve was measured on other text.

Simulated latents (section 4.4) take the place of the true ones. A prediction s knows when a latent a is on, and little
of how much. The least-squares scale is fitted on training text,

    c = E[s a] / E[s^2],    x_hat = sum_j c_j s_j W_dec[j] + b_dec,

and x_hat takes the place of the residual stream at the site. Mean and length of each residual stay the true ones: a
code does not hold them.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse
import torch
from torch import Tensor
from tqdm import tqdm

from helpers.activations.stream import Scale, normalise, undo
from helpers.base.checks import require_finite
from helpers.base.stats import ROUNDING, recovered, resampled_columns
from helpers.dictionaries.autoencoders import SparseAutoencoder
from helpers.subjects.subject import Subject, token_losses

Replace = Callable[[Tensor], Tensor]  # residuals (B, T, d_model) to others of that shape
Prepare = Callable[[Tensor], tuple[Tensor, Scale]]  # residuals to what an autoencoder reads, and the way back
DRAWS = 1000  # resamplings of rows


class Losses(NamedTuple):
    """Mean over the counted positions of each row, in nats a token."""

    original: Tensor  # (n_rows,)
    ce: Tensor  # (n_replacements, n_rows)
    kl: Tensor  # (n_replacements, n_rows)


def downstream(
    subject: Subject, rows: Tensor, saes: Sequence[SparseAutoencoder], mean: Tensor, prepare: Prepare = normalise
) -> pd.DataFrame:
    """A row for each autoencoder, all on the same token rows (n_rows, T); `mean` (d_model,) of prepared activations.

    Columns, in nats a token: ce_original, ce_zero, ce_mean, ce, kl, delta_ce. Shares: recovered_zero, recovered_mean;
    NaN if the ablation costs nothing. delta_ce and the shares have `_low` and `_high`: 95 % of resamplings of
    rows. Rows next to each other share documents, so spread them over the text.
    Raises ValueError for rows of fewer than three tokens, and for an autoencoder of another width.
    """
    if wrong := {sae.d_model for sae in saes} - {subject.d_model}:
        raise ValueError(f"{subject.name} is {subject.d_model} wide, autoencoders are {sorted(wrong)}: use its own")
    replacements = [torch.zeros_like, ablation(mean, prepare), *(reconstruction(sae, prepare) for sae in saes)]
    losses = splice_losses(subject, rows, replacements)
    drawn = (losses.ce - losses.original) @ _weights(len(rows)).T  # (replacements, 1 + draws)
    zero, average, delta_ce = drawn[0], drawn[1], drawn[2:]
    ce_original, (ce_zero, ce_mean, *ce) = losses.original.mean().item(), losses.ce.mean(1).tolist()
    table = {"ce_original": ce_original, "ce_zero": ce_zero, "ce_mean": ce_mean, "ce": ce}
    table |= {"kl": losses.kl[2:].mean(1).tolist()} | resampled_columns("delta_ce", delta_ce)
    table |= resampled_columns("recovered_zero", recovered(delta_ce, zero))
    table |= resampled_columns("recovered_mean", recovered(delta_ce, average))
    return pd.DataFrame(table)


@torch.no_grad()
def splice_losses(subject: Subject, rows: Tensor, replacements: Sequence[Replace]) -> Losses:
    """Losses of the subject, and with each replacement at its site where it is studied, on token rows (n_rows, T).

    Blocks up to the site run once for all. Memory: three tensors of the logits of one of `Subject.passes`, in float32.
    """
    _require_rows(subject, rows)
    parts = tqdm(subject.passes(rows), "splice", unit="batch", delay=2, leave=False)
    original, ce, kl = zip(*(_batch(subject, part, replacements) for part in parts), strict=True)
    losses = Losses(torch.cat(original), torch.cat(ce, 1), torch.cat(kl, 1))
    require_finite(losses.ce, "losses after a splice, by replacement and row,", "check what the replacement gives")
    return losses


def where(studied: Tensor, replace: Replace) -> Replace:
    """The same where `studied` (B, T) is true; elsewhere residuals stay as they are."""
    return lambda residuals: torch.where(studied.to(residuals.device).unsqueeze(-1), replace(residuals), residuals)


def reconstruction(sae: SparseAutoencoder, prepare: Prepare = normalise) -> Replace:
    """Residuals as `sae` rebuilds them; each token keeps its own mean and norm, or what else `prepare` takes away."""

    def replace(residuals: Tensor) -> Tensor:
        x, scale = prepare(residuals)
        return undo(sae.eval()(x.flatten(0, 1)).view_as(x), scale)

    return replace


def decoded(x_hat: Tensor, prepare: Prepare = normalise) -> Replace:
    """Given prepared activations (B, T, d_model); each token keeps its own mean and norm."""
    return lambda residuals: undo(x_hat.to(residuals), prepare(residuals)[1])


def ablation(mean: Tensor, prepare: Prepare = normalise) -> Replace:
    """The same prepared activation (d_model,) for every token; each keeps its own mean and norm."""
    return lambda residuals: decoded(mean.expand_as(residuals), prepare)(residuals)


def rescaled(
    predicted: scipy.sparse.csc_array, fit_predicted: scipy.sparse.csc_array, fit_codes: scipy.sparse.csc_array
) -> scipy.sparse.csc_array:
    """`predicted` (n_tokens, n_latents) times the scale of each latent that fits `fit_predicted` to `fit_codes`.

    A latent that is predicted nowhere in the text of the fit is left out: its scale is unknown.
    """
    squares = np.asarray(fit_predicted.multiply(fit_predicted).sum(0), np.float64)
    products = np.asarray(fit_predicted.multiply(fit_codes).sum(0), np.float64)
    scale = np.divide(products, squares, out=np.zeros_like(squares), where=squares > 0)
    return (predicted @ scipy.sparse.diags_array(scale.astype(np.float32))).tocsc()


@torch.no_grad()
def spliced_loss(subject: Subject, sae: SparseAutoencoder, rows: Tensor, codes: scipy.sparse.csc_array) -> float:
    """Nats a token when the site holds what `codes` (n_rows * T, n_latents) decode to, ids (n_rows, T).

    The mean is over the same predictions as above. Raises ValueError for rows of fewer than three tokens, and for codes
    of other rows.
    """
    _require_rows(subject, rows)
    if codes.shape[0] != rows.numel():
        raise ValueError(f"there are {codes.shape[0]} codes for {rows.numel()} tokens: make them on the same rows")
    if not np.isfinite(codes.data).all():
        raise ValueError("codes are NaN or infinite: check the prediction and its scale")
    x_hat = torch.as_tensor(codes @ sae.W_dec.detach().cpu().numpy()).view(*rows.shape, -1) + sae.b_dec.detach().cpu()
    total = 0.0
    for ids, part in zip(subject.passes(rows), subject.passes(x_hat), strict=True):
        logits = subject.splice(ids, where(subject.studied(ids), decoded(part)))
        total += token_losses(logits, ids)[:, 1:].sum().item()
    return total / (rows.numel() - 2 * len(rows))


class TrainingCurve:
    """Held-out loss, nats a token, against tokens read, from points (tokens, loss) of one recipe; read backwards.

    A point that is not below all before it is left out: what counts is when a loss was first reached.
    Raises ValueError for fewer than two points that fall.
    """

    def __init__(self, points: Iterable[tuple[float, float]]):
        points = np.array(sorted(points), dtype=float).reshape(-1, 2)
        before = np.minimum.accumulate(np.r_[np.inf, points[:, 1]])[:-1]
        self.tokens, self.losses = points[points[:, 1] < before].T
        if len(self.tokens) < 2 or self.tokens[0] <= 0:
            raise ValueError("a training curve needs at least two points (tokens > 0, loss) with falling loss")

    @property
    def reach(self) -> float:
        """The largest delta_ce on the curve: its start above its end."""
        return float(self.losses[0] - self.losses[-1])

    def share(self, delta_ce: float) -> float:
        """Share of the curve's tokens after which it lay `delta_ce` above its end; loss is linear in log tokens.

        Raises ValueError outside the curve: nothing is extrapolated.
        """
        if not -ROUNDING <= delta_ce <= self.reach:
            bound = "more than 100 %" if delta_ce < 0 else f"less than {self.tokens[0] / self.tokens[-1]:.1%}"
            raise ValueError(
                f"delta_ce {delta_ce:.3f} lies outside the training curve, 0 to {self.reach:.3f} nats above its end: "
                f"all it tells is a share of {bound} of the compute"
            )
        log_tokens = np.interp(-self.losses[-1] - delta_ce, -self.losses, np.log(self.tokens))
        return float(np.exp(log_tokens) / self.tokens[-1])


def training_curve(subject: Subject) -> TrainingCurve:
    """The part of the subject's own training at constant learning rate.

    Raises FileNotFoundError for a subject that this suite did not train.
    """
    path = subject.folder / "training.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{subject.name} has no training.json: make a TrainingCurve from the (tokens, loss) of its published "
            "checkpoints, or leave its share of compute out"
        )
    rows = json.loads(path.read_text(encoding="utf-8"))["curve"]
    peak = max(row["lr"] for row in rows)
    return TrainingCurve((row["tokens"], row["heldout"]) for row in rows if row["lr"] == peak)


def compute_shares(frame: pd.DataFrame, curve: TrainingCurve) -> pd.DataFrame:
    """compute_share, its _low and _high, and why_not, for each row of a frame of `downstream`.

    What lies outside the curve is NaN, with a sentence in why_not, so that one poor autoencoder does not end a sweep.
    """
    found = [_share(curve, delta_ce) for delta_ce in frame.delta_ce]
    table = {"compute_share": [share for share, _ in found]}
    table["compute_share_low"] = [_share(curve, delta_ce)[0] for delta_ce in frame.delta_ce_high]
    table["compute_share_high"] = [_share(curve, delta_ce)[0] for delta_ce in frame.delta_ce_low]
    return pd.DataFrame(table | {"why_not": [reason for _, reason in found]}, index=frame.index)


def _require_rows(subject: Subject, rows: Tensor) -> None:
    if rows.ndim != 2 or len(rows) == 0 or rows.shape[1] < 3:
        raise ValueError(f"rows must be (n_rows, T) with at least one row of three tokens, not {tuple(rows.shape)}")
    if subject.padding(rows).any():
        raise ValueError("some rows end in padding, whose losses would count as text's: pass rows of one length")


def _batch(subject: Subject, rows: Tensor, replacements: Sequence[Replace]) -> tuple[Tensor, Tensor, Tensor]:
    residuals, studied = subject.residuals(rows), subject.studied(rows)
    targets = rows[:, 2:].to(residuals.device, torch.int64)
    logits = _counted(subject.resume(residuals))
    p = logits.softmax(-1)
    original, entropy = _cross_entropies(logits, p, targets)
    del logits  # as large as p
    found = []
    for replace in replacements:
        spliced = subject.resume(where(studied, replace)(residuals))
        found.append(_cross_entropies(_counted(spliced), p, targets))
    ce, crossed = (torch.stack(losses) for losses in zip(*found, strict=True))
    return original, ce, crossed - entropy


def _counted(logits: Tensor) -> Tensor:
    """Logits of the predictions that count."""
    return logits[:, 1:-1].float()


def _cross_entropies(logits: Tensor, p: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Row means (B,) of -log q(target) and of -sum_v p_v log q_v, without a tensor of log q."""
    log_z = logits.logsumexp(-1)
    drawn = log_z - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    expected = log_z - torch.linalg.vecdot(p, logits)
    return tuple(losses.double().mean(1).cpu() for losses in (drawn, expected))


def _weights(n_rows: int) -> Tensor:
    """(1 + DRAWS, n_rows): equal weights, then those of rows drawn with replacement."""
    random = torch.Generator().manual_seed(0)
    chosen = torch.randint(n_rows, (DRAWS, n_rows), generator=random)
    counts = torch.zeros(DRAWS, n_rows, dtype=torch.float64).scatter_add_(1, chosen, torch.ones(chosen.shape).double())
    return torch.cat([torch.ones(1, n_rows, dtype=torch.float64), counts]) / n_rows


def _share(curve: TrainingCurve, delta_ce: float) -> tuple[float, str]:
    try:
        return curve.share(delta_ce), ""
    except ValueError as outside:
        return float("nan"), str(outside)
