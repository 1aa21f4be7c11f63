"""Two ways into a dictionary: the latents in which two models differ, and those that are on in a text of one's own.

    diff_explorer   Delta_norm against nu; a click opens the latent, with what the rows of both models do
    planted_pages   latents of an injected pair, on the text beneath it, with the lengths of their rows
    OwnText         a field to type in, for a live kernel; `read_text` is the same as HTML

Source: sections 2.3 and 2.4 of the facts on Minder, Dumas et al. 2025, for Delta_norm and nu.
"""

import dataclasses
from collections.abc import Callable, Iterable
from html import escape

import ipywidgets
import numpy as np
import pandas as pd
import scipy.sparse
import torch
from IPython.display import HTML, display
from transformers import PreTrainedTokenizerBase

from helpers.dictionaries.crosscoders import Crosscoder
from helpers.dictionaries.pair_collection import Heldout
from helpers.figures.browser import INK, LatentBrowser, card, dialogue_pages, section
from helpers.figures.records import Direction, LatentRecord, Window, checked_latents, directions_of, latent_record
from helpers.figures.tokens import token_text
from helpers.subjects.pair import SubjectPair
from helpers.subjects.subject import Subject

NAMES = {  # columns of a `latent_table`, and how the explorer calls them
    "delta": "Δ",
    "nu_error": "ν error",
    "nu_reconstruction": "ν reconstruction",
    "cosine": "cosine of the rows",
    "class": "class",
}
MODELS = ("base", "chat")
NO_ANSWER = "<small>No field, or one that does not answer? Its kernel was restarted: run this cell again.</small>"
Encode = Callable[[torch.Tensor], torch.Tensor]  # ids (1, T) to codes (T, n_latents)


def diff_explorer(
    crosscoder: Crosscoder,
    table: pd.DataFrame,
    code: scipy.sparse.csr_array,
    reading: Heldout,
    pair: SubjectPair,
    n: int = 400,
    seed: int = 0,
) -> LatentBrowser:
    """A browser of the latents of a `latent_table` that fire, by Delta_norm and the ratio nu of errors.

    Windows are from the first n dialogues of `reading`, where `code` (tokens, n_latents) is on. Raises ValueError for a
    table in which none fires.
    """
    alive = table[table.rate > 0]
    decoders = crosscoder.decoders.detach().float().cpu().numpy()
    rows = [
        directions_of(decoder, unembedding(subject), lambda i: token_text(pair.base.tokenizer, i), alive.index, model)
        for decoder, subject, model in zip(decoders, (pair.base, pair.chat), MODELS, strict=True)
    ]
    pages = dialogue_pages(code, reading, alive.index, pair.base.tokenizer, n, seed)
    facts = alive[list(NAMES)].rename(columns=NAMES).to_dict("records")
    parts = zip(pages, facts, zip(*rows, strict=True), strict=True)
    records = [dataclasses.replace(record, facts=known, directions=both) for record, known, both in parts]
    return LatentBrowser(records, n_static=1, scatter=(NAMES["delta"], NAMES["nu_error"]))


def planted_pages(
    crosscoder: Crosscoder,
    code: scipy.sparse.csr_array,
    tokens: np.ndarray,
    chosen: Iterable[int],
    tokenizer: PreTrainedTokenizerBase,
    row: int = 64,
    seed: int = 0,
) -> list[LatentRecord]:
    """A page for each chosen latent of a code (tokens, n_latents) of an injected pair; `tokens` (tokens,) are the text
    in which directions were planted, and windows lie in rows of it."""
    n, norms = len(tokens) // row * row, crosscoder.decoders.detach().norm(dim=-1)  # (model, n_latents)
    text = tokens[:n].reshape(-1, row)
    options = {"densities": (code > 0).mean(0), "n_random": 2, "n_top": 3, "n_quarter": 1, "seed": seed}
    return [
        latent_record(
            j,
            code[:n, [j]].toarray().reshape(-1, row),
            text,
            lambda token: token_text(tokenizer, token),
            directions=[Direction(model, norm.item()) for model, norm in zip(MODELS, norms[:, j], strict=True)],
            **options,
        )
        for j in checked_latents(chosen, code.shape[1])
    ]


@torch.no_grad()
def unembedding(subject: Subject) -> np.ndarray:
    """What a residual adds to the logits directly, (d_model, n_vocab): the gain of the last norm times the head.

    The norm's scale, which depends on all of the residual, is left out, and so is its centring.
    """
    x = torch.ones(subject.d_model, device=subject.device)
    x[1::2] = -1  # of mean zero and mean square one: no norm changes it but by its gain and bias
    norm = subject.bridge.ln_final
    gain = (norm(x[None, None]) - norm(-x[None, None]))[0, 0] / 2 * x
    return (subject.model.get_output_embeddings().weight.float() * gain.float()).T.cpu().numpy()


class OwnText(ipywidgets.VBox):
    """A field for a text, and one for a latent; whatever is wrong with them is said in place."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encode: Encode, context: int, text: str = ""):
        self.text = ipywidgets.Textarea(text, description="Your text", continuous_update=False)
        self.latent = ipywidgets.Text(description="Latent", placeholder="the strongest", continuous_update=False)
        self.button = ipywidgets.Button(description="Read it")
        self.result = ipywidgets.HTML()
        self._parts = (tokenizer, encode, context)
        self.text.observe(self._read, "value")
        self.latent.observe(self._read, "value")
        self.button.on_click(self._read)
        super().__init__([self.text, ipywidgets.HBox([self.latent, self.button]), self.result])
        self._read()

    def _repr_mimebundle_(self, **which: object) -> dict:
        """Where no kernel runs, as on a page that shows notebooks, its first reading is what is seen."""
        return super()._repr_mimebundle_(**which) | {"text/html": self.result.value}

    def _ipython_display_(self) -> None:
        """The note stands outside of the widget, which is gone when its kernel was restarted and the page reloaded."""
        display(self._repr_mimebundle_(), raw=True)
        display(HTML(NO_ANSWER))

    def _read(self, _: object = None) -> None:
        try:
            self.result.value = read_text(self.text.value, *self._parts, self.latent.value)
        except ValueError as error:
            self.result.value = card([f'<p role="alert" style="{INK}">{escape(str(error))}</p>'])


@torch.no_grad()
def read_text(
    text: str, tokenizer: PreTrainedTokenizerBase, encode: Encode, context: int, latent: str = "", n: int = 8
) -> str:
    """The n latents that are strongest on a text, or the one that is named, as HTML.

    Raises ValueError for a text that is empty, too long for the context or no text, and for a latent that is not
    there or not active.
    """
    ids, latent = _ids(text, tokenizer, context), latent.strip()
    codes = encode(torch.tensor([ids])).float().cpu().numpy()
    peaks = codes.max(0)
    chosen = [_number(latent, len(peaks))] if latent else np.argsort(-peaks, kind="stable")[:n]
    chosen = [int(j) for j in chosen if peaks[j] > 0]
    tokens = tuple(token_text(tokenizer, i) for i in ids)
    windows = [Window(tokens, tuple(codes[:, j].tolist()), int(codes[:, j].argmax())) for j in chosen]
    if not windows:
        raise ValueError(
            f"Latent {latent} is not active on this text." if latent else "No latent is active on this text."
        )
    return card(
        part
        for j, window in zip(chosen, windows, strict=True)
        for part in section(f"Latent {j}: {peaks[j]:.3g} at most", [window], peaks[j])
    )


def _ids(text: str, tokenizer: PreTrainedTokenizerBase, context: int) -> list[int]:
    if not text.strip():
        raise ValueError("There is no text yet: type some, and press “Read it”.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        bad = f"U+{ord(text[error.start]):04X}"
        raise ValueError(f"Character {error.start + 1} ({bad}) is half of one: it cannot be read; delete it.") from None
    ids = tokenizer(text).input_ids
    if len(ids) > context:
        raise ValueError(f"The text has {len(ids)} tokens, and the model reads at most {context}: shorten it.")
    return ids


def _number(latent: str, n_latents: int) -> int:
    if not latent.lstrip("-").isdecimal():
        raise ValueError(f"{latent!r} is no latent: give a number, 0 to {n_latents - 1}.")
    return checked_latents([int(latent)], n_latents)[0]
