"""Where a dictionary comes from, and what activations must be made into before it reads them.

    y = (x - mean) / norm,    y_hat = dictionary(y),    x_hat = norm y_hat + mean

    none         mean 0, norm 1
    unit         the mean over x's own coordinates, and the length of what is left: how this suite harvests
    length       mean 0 and the length of x
    fixed        means and norms measured when it was trained, for each model of a pair
    mean norm    mean 0, and one norm that makes the mean length sqrt(d_model); the files do not hold it, so it has to
                 be measured: `Published.measured`

Layer normalisation without weights is `unit` times sqrt(d_model - 1), a factor that is folded into the weights.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from helpers.activations.stream import Scale, normalise, undo
from helpers.base.checks import require_finite
from helpers.dictionaries.autoencoders import SparseAutoencoder
from helpers.dictionaries.crosscoders import Crosscoder
from helpers.published.build import autoencoder

MEASURE = "its files do not hold the scale of its activations: call measured(x) with a sample of them"


class Inputs(NamedTuple):
    """How activations are prepared."""

    mode: str = "none"
    eps: float = 0.0  # added to the length: x near a constant is not blown up
    mean: Tensor | None = None  # of "fixed": (d_model,), or (2, d_model) for a pair
    factor: Tensor | None = None  # of "fixed", 1 / norm: (1,), or (2, 1)
    norm: Tensor | None = None  # of "fixed", on the way back: the same shape

    def prepare(self, x: Tensor) -> tuple[Tensor, Scale]:
        """(..., d_model), or (..., 2, d_model) for a crosscoder, to what the dictionary reads; `undo` goes back."""
        match self.mode:
            case "none":
                return normalise(x, "none")
            case "unit":
                y, scale = normalise(x)
                return y * (scale.norm / (scale.norm + self.eps)).nan_to_num(0.0), scale
            case "length":
                norm = x.norm(dim=-1, keepdim=True)
                return x / norm.clamp_min(torch.finfo(x.dtype).tiny), Scale(torch.zeros_like(norm), norm)
            case "fixed":
                mean, factor, norm = (part.to(x) for part in (self.mean, self.factor, self.norm))
                return (x - mean) * factor, Scale(mean, norm)
        raise ValueError(f"this dictionary reads activations of mean length sqrt(d_model): {MEASURE}")


@dataclasses.dataclass(frozen=True)
class Origin:
    """What is known of a dictionary's files."""

    kind: str  # layout and architecture
    source: str  # as it was asked for
    dtype: str  # of the weights in the file; ours are float32
    model: str | None = None
    hook: str | None = None  # where it reads, in TransformerLens's names if it has one
    context: int | None = None  # tokens a row in training
    bos: bool | None = None  # whether a row has <bos> at its head
    inputs: Inputs = Inputs()
    caution: str = ""

    def with_inputs(self, inputs: Inputs, caution: str = "") -> "Origin":
        return dataclasses.replace(self, inputs=inputs, caution=caution or self.caution)

    @property
    def site(self) -> str | None:
        """The hook; what enters a block has the name of the block before, which it leaves."""
        entered = re.fullmatch(r"blocks\.(\d+)\.hook_resid_pre", self.hook or "")
        return f"blocks.{int(entered[1]) - 1}.hook_resid_post" if entered and int(entered[1]) else self.hook

    @property
    def layer(self) -> int | None:
        found = re.search(r"\b(?:blocks|layers)\.(\d+)", self.site or "")
        return int(found[1]) if found else None


class Published(NamedTuple):
    """An ordinary dictionary of this suite, and where it comes from."""

    dictionary: SparseAutoencoder | Crosscoder
    origin: Origin

    def prepare(self, x: Tensor) -> tuple[Tensor, Scale]:
        """Raw activations to what the dictionary reads, and the scale that brings its reconstructions back."""
        return self.origin.inputs.prepare(x)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Latents of raw activations (batch, d_model) or (batch, 2, d_model)."""
        return self.dictionary.encode(self.prepare(x)[0])

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Raw activations as the dictionary rebuilds them, of the shape of x."""
        y, scale = self.prepare(x)
        return undo(self.dictionary(y), scale)

    def measured(self, x: Tensor) -> "Published":
        """The same, the scale of its activations measured on raw ones, (n, d_model) or (n, 2, d_model): folded into an
        autoencoder, one for each model of a crosscoder. Itself where there is nothing to measure.

        Raises ValueError for a sample that is empty or not finite.
        """
        if self.origin.inputs.mode != "mean norm":
            return self
        require_finite(x, "activations", "check the subject and its dtype")
        norm = x.norm(dim=-1, keepdim=True).mean(0) / self.dictionary.d_model**0.5
        if not (norm > 0).all():
            raise ValueError(f"{len(x)} activations without length give no scale: take more")
        if isinstance(self.dictionary, Crosscoder):
            inputs = Inputs("fixed", mean=torch.zeros_like(x[0]), factor=1 / norm, norm=norm)
            return self._replace(origin=self.origin.with_inputs(inputs))
        sae = self.dictionary
        weights = (part.data for part in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec))
        folded = autoencoder(*weights, sae.activation, scale=1 / norm.item())
        return Published(folded, self.origin.with_inputs(Inputs()))

    def require(self, subject: Any = None, latents: Sequence[int] = ()) -> "Published":
        """Itself, if it reads the site of `subject`, a `Subject` or `SubjectPair`, and has all of `latents`.

        Raises ValueError for another width or site, one model where it reads two, and a latent that it does not have.
        """
        d_model, n = self.dictionary.d_model, self.dictionary.n_latents
        model = getattr(subject, "base", subject)  # of a pair: both models have its width
        if subject is not None and model is subject and isinstance(self.dictionary, Crosscoder):
            raise ValueError(f"{self.origin.source} reads two models, {subject.name} is one: pass the pair")
        if subject is not None and d_model != model.d_model:
            raise ValueError(f"{self.origin.source} is {d_model} wide, {model.name} {model.d_model}: use its own model")
        if subject is not None and self.origin.site not in (None, model.site):
            raise ValueError(
                f"{self.origin.source} reads {self.origin.hook}, the site of {model.name} is {model.site}: load the "
                "subject at that layer, or another dictionary"
            )
        if missing := [j for j in latents if not 0 <= j < n]:
            raise ValueError(f"{self.origin.source} has latents 0 to {n - 1}, and no {missing[0]}")
        return self

    def described(self) -> dict:
        """Kind, size, place and inputs in JSON's types, for a notebook's record."""
        origin, parts = self.origin, ("kind", "source", "dtype", "model", "hook", "context", "bos", "caution")
        size = {"d_model": self.dictionary.d_model, "n_latents": self.dictionary.n_latents}
        return {name: getattr(origin, name) for name in parts} | size | {"inputs": origin.inputs.mode}

    def __str__(self) -> str:
        origin, sae = self.origin, self.dictionary
        place = " at ".join(part for part in (origin.model, origin.hook) if part) or "place unknown"
        text = f"{origin.kind}: {sae.n_latents:,} latents, {sae.d_model} wide, {origin.dtype}, {place}"
        cautions = origin.caution, MEASURE if origin.inputs.mode == "mean norm" else ""
        return "; ".join([f"{text}, inputs: {origin.inputs.mode}", *filter(None, cautions)])
