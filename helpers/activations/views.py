"""One model of a pair, or the difference of both: what autoencoders of a pair are trained on and read by.

    difference    x_chat - x_base    of the diff-SAE: all it can say is what chat-tuning changed
    chat          x_chat             of the chat-SAE; Latent Scaling tells which of its latents base has as well
    base          x_base             of the base-SAE

A view of a pair's stream has its tokens, order and batches, so an autoencoder and a crosscoder read the same:

    views = ViewedStream(stream, "difference")
    sweep(cells, views.batches, view_of(heldout, "difference"), tokens, folder)

Activations are as they are, neither centred nor of unit norm. Where the autoencoder's decoder rows have unit norm, a
latent counts in the units of the activations.

Source: Minder, Dumas et al. 2025 and their released code; sections 1.2 and 2.7 of the facts.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from helpers.activations.injected import InjectedPair
from helpers.activations.stream import ActivationStream

VIEWS = ("difference", "chat", "base")


def view_of(x: Tensor, view: str) -> Tensor:
    """(..., 2, d_model) -> (..., d_model). Raises ValueError for another view, and for what is no pair."""
    if view not in VIEWS:
        raise ValueError(f"there is no view {view!r} of a pair: choose of {', '.join(VIEWS)}")
    if x.ndim < 2 or x.shape[-2] != 2:
        raise ValueError(f"activations of a pair have shape (..., 2, d_model), not {tuple(x.shape)}")
    base, chat = x.unbind(-2)
    return {"difference": chat - base, "chat": chat, "base": base}[view]


class ViewedStream:
    """A view of a stream of pairs, with all that a sweep needs; raises ValueError for a view that does not exist.

    `stream` yields (batch, 2, d_model) or (batch, 2 d_model) and has a fingerprint.
    """

    def __init__(self, stream: ActivationStream | InjectedPair, view: str):
        view_of(torch.empty(0, 2, 1), view)
        self.stream, self.view = stream, view
        self.batch_size = stream.batch_size

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the view and of all that the pairs depend on."""
        return hashlib.sha256(repr((self.view, self.stream.fingerprint)).encode()).hexdigest()

    def batches(self, n_tokens: int | None = None, batch_size: int | None = None) -> Iterator[Tensor]:
        """Yield (batch, d_model), as the stream's `batches` does."""
        for x in self.stream.batches(n_tokens, batch_size):
            yield view_of(x if x.ndim == 3 else x.unflatten(1, (2, -1)), self.view)

    def reader(self) -> "ViewedStream":
        """The same for other processes, where the stream has such a thing."""
        return ViewedStream(self.stream.reader() if hasattr(self.stream, "reader") else self.stream, self.view)
