"""Which latents carry what chat-tuning changed? Write them into the base activation, and let the chat model run on.

    h_S  = h_base + sum_{j in S} f_j (d_j^chat - d_j^base)  [+ b_dec^chat - b_dec^base]        at every position
    KL   = sum_v p_v (log p_v - log q_v)       nats, at each position; p the chat model, q the chat model from h_S on

    None       h_base                              Error     h_chat - sum_j f_j (d_j^chat - d_j^base)
    All        S is every latent                   Template  h_chat at template positions, h_base elsewhere
    a set      any S, such as half of some latents; S of no latent with the bias shows what the bias does alone

The released code adds a diff-SAE's bias and leaves out the crosscoder's, which gives the mean shift between the models
to the one and not to the other. Here every condition comes with and without it, for both.

    All + bias = h_base + x_hat_chat - x_hat_base                 A set and its complement add up to All
    diff-SAE: d_j and b_dec in place of the differences           chat-SAE: h_base + sum_{j in S} f_j d_j, without bias

Source: Minder, Dumas et al. 2025, section 4, and their released code; section 2.6 of the facts. Index 0 is base.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from helpers.activations.views import view_of
from helpers.base.checks import require_finite
from helpers.dictionaries.autoencoders import SparseAutoencoder
from helpers.dictionaries.crosscoders import DecoupledCrosscoder
from helpers.dictionaries.kernels import Code, code_of
from helpers.subjects.pair import SubjectPair
from helpers.text.turns import Encoded, Rows, rows_of

Latents = Sequence[int] | Tensor | np.ndarray | None  # their numbers; None for all of them
BATCH = 8  # dialogues side by side
NONE = "None"  # the condition that is always measured, as all others are compared with it


@dataclasses.dataclass(frozen=True, eq=False)
class Difference:
    """What a dictionary says that chat has and base has not: code @ rows + bias, for each token."""

    encode: Callable[[Tensor], Tensor]  # activations of the pair (n, 2, d_model) -> code (n, m), at least zero
    rows: Tensor  # (m, d_model)
    bias: Tensor | None  # (d_model,); None where the dictionary's own is no difference
    n_latents: int  # m, or half of it: a decoupled latent has a row in each model

    def latents(self, x: Tensor) -> Tensor:
        """How much each latent is on, (n, n_latents); a decoupled one is on where it is in either model.

        Raises ValueError for a code that does not fit the rows, and for what is not finite.
        """
        code = self.encode(x)
        require_finite(code, "latents", "check the activations and the dictionary's weights")
        if code.shape != (len(x), len(self.rows)):
            raise ValueError(f"{len(self.rows)} rows, but a code of {tuple(code.shape)} for {len(x)} tokens")
        return code.unflatten(1, (-1, self.n_latents)).amax(1)

    def kept(self, latents: Latents) -> Tensor:
        """Which rows are of some latents, (m,) bool; all for None. Raises ValueError for latents it does not have."""
        latents = latents.cpu() if isinstance(latents, Tensor) else latents
        chosen = np.arange(self.n_latents) if latents is None else np.asarray(latents)
        if chosen.size and not np.issubdtype(chosen.dtype, np.integer):
            raise ValueError(f"latents are given by their numbers, not as {chosen.dtype}")
        if wrong := [j for j in chosen if not 0 <= j < self.n_latents]:
            raise ValueError(f"there is no latent {wrong[0]}: the dictionary has 0 to {self.n_latents - 1}")
        kept = torch.zeros(self.n_latents, dtype=torch.bool)
        kept[chosen.astype(np.int64)] = True
        return kept.repeat(len(self.rows) // self.n_latents)


def difference_of(dictionary: SparseAutoencoder, view: str | None = None) -> Difference:
    """What the latents of a crosscoder write: the difference of their decoder rows. Of an autoencoder of a view of the
    pair, "difference" or "chat", they write its rows; one of chat has no bias.

    Raises ValueError for the view "base".
    """
    dictionary.eval()
    if view is None:
        base, chat = dictionary.decoders.detach()
        base_bias, chat_bias = dictionary.biases.detach()
        rows = torch.cat([-base, chat]) if isinstance(dictionary, DecoupledCrosscoder) else chat - base
        bias = chat_bias - base_bias
        return Difference(lambda x: dictionary.encode(x).flatten(1), rows, bias, dictionary.n_latents)
    if view not in ("difference", "chat"):
        raise ValueError(f'an autoencoder of {view!r} says nothing of chat: patch with "difference" or "chat"')
    bias = dictionary.b_dec.detach() if view == "difference" else None
    rows = dictionary.W_dec.detach()
    return Difference(lambda x: dictionary.encode(view_of(x, view)), rows, bias, dictionary.n_latents)


class Site:
    """What both models have at the site, over some dialogues side by side.

    base, chat  (B, T, d_model)
    inside      (B, T) bool: where dictionaries are read; not after the end of a dialogue

    Raises ValueError for a pair with scaled activations, where chat - base is no difference of residuals.
    """

    def __init__(self, pair: SubjectPair, rows: Rows, keep_first: bool = True):
        if tuple(pair.scales) != (1.0, 1.0):
            raise ValueError("the models of this pair are scaled apart: patch the pair without scales")
        self.rows = rows
        self.base = pair.base.residuals(rows.tokens)
        self.chat = pair.chat.residuals(rows.tokens).to(self.base.device)
        self.template = rows.template.to(self.base.device)
        self.inside = (rows.roles >= 0).to(self.base.device)
        self.inside[:, 0] &= not keep_first
        self._codes: dict[Difference, Code] = {}

    def code(self, difference: Difference) -> Code:
        """The code (tokens inside, m) of a dictionary, read once. Raises ValueError for one of another width."""
        if (width := difference.rows.shape[1]) != self.base.shape[-1]:
            raise ValueError(f"the dictionary is {width} wide, the models {self.base.shape[-1]}: use one of their site")
        if difference not in self._codes:
            x = torch.stack([self.base[self.inside], self.chat[self.inside]], 1)
            with torch.no_grad():
                self._codes[difference] = code_of(difference.encode(x.to(difference.rows)))
        return self._codes[difference]

    def added(self, difference: Difference, kept: Tensor, bias: bool) -> Tensor:
        """What some rows (m,) bool of a dictionary add, (B, T, d_model)."""
        code = self.code(difference)
        values = code.values * kept.to(code.values.device)[code.latents]
        found = F.embedding_bag(code.latents, difference.rows, code.starts, mode="sum", per_sample_weights=values)
        if bias:
            found = found + difference.bias
        added = torch.zeros_like(self.base)
        added[self.inside] = found.to(added)
        return added

    def chat_at(self, where: Tensor) -> Tensor:
        """Chat at some positions (B, T) bool, base elsewhere: (B, T, d_model)."""
        return torch.where(where.unsqueeze(-1), self.chat, self.base)


Condition = Callable[[Site], Tensor]  # to residuals (B, T, d_model)


def written(difference: Difference, latents: Latents = None, bias: bool = False) -> Condition:
    """Base and what some latents add, by default all of them. Raises ValueError for latents or a bias it has not."""
    added = _adding(difference, latents, bias)
    return lambda site: site.base + added(site)


def error(difference: Difference, bias: bool = False) -> Condition:
    """Chat without what all latents add: base as the dictionary rebuilds it, and what it misses of chat."""
    added = _adding(difference, None, bias)
    return lambda site: site.chat - added(site)


def template(site: Site) -> Tensor:
    """Chat at the tokens of the template but for <bos>, base elsewhere."""
    return site.chat_at(site.template)


def random_positions(seed: int = 0) -> Condition:
    """Chat at as many positions of each dialogue as `template` has, drawn at random."""

    def patch(site: Site) -> Tensor:
        shape = site.inside.shape
        draws = np.stack([np.random.default_rng((seed, i)).random(shape[1]) for i in site.rows.dialogues])
        draws = torch.from_numpy(draws).to(site.base.device).masked_fill(~site.inside, 2.0)
        places = draws.argsort(1).argsort(1)
        return site.chat_at((places < site.template.sum(1, keepdim=True)) & site.inside)

    return patch


class Patched(NamedTuple):
    """A row for each position that predicts an answer, dialogue by dialogue."""

    positions: pd.DataFrame  # dialogue, position (in it), order (in its answer), first_nine
    kl: pd.DataFrame  # a column for each condition, "None" first; nats


@torch.no_grad()
def patch_kl(
    pair: SubjectPair,
    dialogues: Sequence[Encoded],
    conditions: Mapping[str, Condition],
    keep_first: bool = True,
) -> Patched:
    """KL(chat || patched) at every position that predicts an answer, under "None" and each of `conditions`.

    Both models run once up to the site, then the chat model goes on once for itself and once for each condition.
    With `keep_first` no dictionary writes at the first position, which none was trained on (`Harvest.drop`).
    Memory: four tensors (positions that predict, n_vocab) in float32.
    Raises ValueError for dialogues without an answer, too long, or with roles that do not align, and for a condition
    after which predictions are not finite.
    """
    named = {NONE: lambda site: site.base} | dict(conditions)
    positions, kl = [], []
    for rows in tqdm(list(rows_of(dialogues, pair.context, BATCH)), "patch", unit="batch", delay=2, leave=False):
        site = Site(pair, rows, keep_first)
        log_p = _log_probs(pair, site.chat, rows)
        p = log_p.exp()
        found = {name: _kl(p, log_p, _log_probs(pair, patch(site), rows), name) for name, patch in named.items()}
        kl.append(pd.DataFrame(found))
        positions.append(_positions(rows))
    positions, kl = (pd.concat(parts, ignore_index=True) for parts in (positions, kl))
    in_order = positions.sort_values(["dialogue", "position"]).index
    return Patched(positions.loc[in_order].reset_index(drop=True), kl.loc[in_order].reset_index(drop=True))


def _adding(difference: Difference, latents: Latents, bias: bool) -> Condition:
    kept = difference.kept(latents)
    if bias and difference.bias is None:
        raise ValueError("the bias of an autoencoder of chat is no difference: patch without it")
    return lambda site: site.added(difference, kept, bias)


def _log_probs(pair: SubjectPair, residuals: Tensor, rows: Rows) -> Tensor:
    """Of the chat model from these residuals on, at positions that predict an answer: (positions, n_vocab)."""
    return pair.chat.resume(residuals, rows.order >= 0).log_softmax(-1)


def _kl(p: Tensor, log_p: Tensor, log_q: Tensor, name: str) -> np.ndarray:
    """(positions, n_vocab) each -> (positions,)"""
    kl = torch.linalg.vecdot(p, log_p - log_q)
    if not kl.isfinite().all():
        raise ValueError(f"the chat model's predictions are not finite under {name!r}: check what the condition gives")
    return kl.cpu().numpy()


def _positions(rows: Rows) -> pd.DataFrame:
    row, position = (rows.order >= 0).nonzero(as_tuple=True)
    return pd.DataFrame(
        {
            "dialogue": np.array(rows.dialogues)[row],
            "position": position,
            "order": rows.order[row, position],
            "first_nine": rows.first_nine[row, position],
        }
    )
