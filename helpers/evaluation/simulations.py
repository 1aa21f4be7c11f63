"""What a language model loses with predicted latents in the place of the true ones. Gao et al. 2024, section 4.4.

A prediction s knows when a latent a is on, and little of how much. The least-squares scale is fitted on training text,

    c = E[s a] / E[s^2],    x_hat = sum_j c_j s_j W_dec[j] + b_dec,

and x_hat takes the place of the residual stream at the site, on every token but the first of a row. Mean and length of
each residual stay the true ones: a code does not hold them.
"""

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from helpers.activations.stream import normalise, undo
from helpers.dictionaries.autoencoders import SparseAutoencoder
from helpers.subjects.subject import Subject, token_losses


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
def spliced_loss(
    subject: Subject, sae: SparseAutoencoder, rows: Tensor, codes: scipy.sparse.csc_array, rows_a_pass: int = 16
) -> float:
    """Nats a token when the site holds what `codes` (n_rows * T, n_latents) decode to, ids (n_rows, T).

    The mean is over the predictions made after replaced tokens: all but the first of each row.
    """
    if codes.shape[0] != rows.numel():
        raise ValueError(f"there are {codes.shape[0]} codes for {rows.numel()} tokens: make them on the same rows")
    x_hat = torch.as_tensor(codes @ sae.W_dec.detach().cpu().numpy()).view(*rows.shape, -1) + sae.b_dec.detach().cpu()
    total = 0.0
    for ids, part in zip(rows.split(rows_a_pass), x_hat.split(rows_a_pass), strict=True):
        logits = subject.splice(ids, lambda residuals, part=part: _replaced(residuals, part))
        total += token_losses(logits, ids)[:, 1:].sum().item()
    return total / (rows.numel() - 2 * len(rows))


def _replaced(residuals: Tensor, x_hat: Tensor) -> Tensor:
    replaced = undo(x_hat.to(residuals), normalise(residuals)[1])
    return torch.cat([residuals[:, :1], replaced[:, 1:]], dim=1)
