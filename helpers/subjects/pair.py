"""Two models that read the same tokens: their residual streams, side by side, as one subject to harvest from.

    x = [ x_base / s_base , x_chat / s_chat ]      (..., 2 d_model);  x.unflatten(-1, (2, d_model)) parts them again

The scales are 1 in the paper. With `scaled`, each model's is such that its mean norm over some text is sqrt(d_model).
They are part of the pair's fingerprint, as norms of crosscoder decoders mean nothing without them.

Half of what a crosscoder reads is plain text and half dialogue: `half_and_half` lays them out in rows of only one.
"""

import dataclasses
import hashlib
import math

import numpy as np
import torch

from helpers.subjects.subject import Subject


@dataclasses.dataclass(frozen=True, eq=False)
class SubjectPair:
    """What `ActivationStream` needs of a subject; `residuals` are twice as wide as a model's.

    Raises ValueError for models that differ in width, site, dtype or tokenizer, and for scales that are not positive
    and finite.
    """

    base: Subject
    chat: Subject
    scales: tuple[float, float] = (1.0, 1.0)  # activations are divided by these

    def __post_init__(self):
        if not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"activations are divided by the scales {self.scales}: make both positive and finite")
        for what, of in {"width": "d_model", "site": "site", "context": "context", "dtype": "dtype"}.items():
            ours, theirs = (getattr(subject, of) for subject in (self.base, self.chat))
            if ours != theirs:
                raise ValueError(
                    f"{self.base.name} has {what} {ours}, {self.chat.name} {theirs}: a pair must agree on it"
                )
        if self.base.tokenizer.get_vocab() != self.chat.tokenizer.get_vocab():
            raise ValueError(
                f"{self.base.name} and {self.chat.name} have different vocabularies: the same token stream cannot go "
                "through both; take models of one family"
            )

    @property
    def name(self) -> str:
        return f"{self.base.name} | {self.chat.name}"

    @property
    def d_model(self) -> int:
        """Of both together."""
        return 2 * self.base.d_model

    @property
    def site(self) -> str:
        return self.base.site

    @property
    def context(self) -> int:
        return self.base.context

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def fingerprint(self) -> str:
        """SHA-256 of both models and the scales."""
        parts = (self.base.fingerprint, self.chat.fingerprint, self.scales)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def special_ids(self) -> list[int]:
        return self.base.special_ids

    @property
    def head(self) -> int | None:
        return self.base.head

    def rows(self, tokens: torch.Tensor | np.ndarray, context: int) -> torch.Tensor:
        """`Subject.rows`."""
        return self.base.rows(tokens, context)

    def studied(self, tokens: torch.Tensor) -> torch.Tensor:
        """`Subject.studied`."""
        return self.base.studied(tokens)

    def padding(self, tokens: torch.Tensor) -> torch.Tensor:
        """`Subject.padding`."""
        return self.base.padding(tokens)

    def residuals(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T, 2 d_model), base first."""
        base = self.base.residuals(tokens)
        chat = base if self.chat is self.base else self.chat.residuals(tokens).to(base.device)
        return torch.cat([base / self.scales[0], chat / self.scales[1]], -1)

    def scaled(self, rows: torch.Tensor) -> "SubjectPair":
        """The pair with each model's mean norm at sqrt(d_model), measured where token rows (B, T) are studied.

        Raises ValueError if none is, or all activations are zero.
        """
        norms = [s.residuals(rows)[self.studied(rows)].norm(dim=-1).mean().item() for s in (self.base, self.chat)]
        width = self.base.d_model**0.5
        return dataclasses.replace(self, scales=(norms[0] / width, norms[1] / width))


def half_and_half(text: np.ndarray, dialogue: np.ndarray, context: int, n_tokens: int) -> np.ndarray:
    """`n_tokens` ids, rounded down to whole rows of `context`: as many rows of plain text as of dialogue, text first.

    Raises ValueError if either has too few tokens.
    """
    if context < 1:
        raise ValueError(f"rows of {context} tokens hold no text: use more")
    each = n_tokens // (2 * context) * context
    for name, tokens in {"plain text": text, "dialogue": dialogue}.items():
        if len(tokens) < each:
            raise ValueError(
                f"{each:,} tokens of {name} are needed, there are {len(tokens):,}: make more, or ask for fewer"
            )
    return np.concatenate([text[:each], dialogue[:each]])
