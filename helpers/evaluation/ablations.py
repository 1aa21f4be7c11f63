"""What happens to the logits when one direction is removed at one token, and how many of them move.

    D(tau, v)  =  logits after - logits before, at the token and the T - 1 after it, less its median over v
    share      =  (|D|_1 / |D|_2)^2 / (T V)            1 / (T V): one logit moves;  2 / pi: Gaussian;  1: all, equally

The squared ratio counts the entries that matter; a shift of all logits by one number changes no probability, so the
median goes first (Gao et al. 2024, section 4.5). What is removed, and but for the last kind at the token alone:

    latent                  the term of an active latent in the reconstruction, z_j W_dec[j] in the stream's own scale
    random direction        as long as such a term, pointing anywhere
    channel                 a coordinate of the stream, all of it
    channel, equal norm     as long as such a term, along a coordinate
    channel at all tokens   a coordinate of the stream at the token and the T - 1 after it

A direction that only touches the prediction at its own token has a share of 1 / T at most, however many logits it
moves: `share_here` is the share with T = 1. Neither tells how large an effect is.
"""

from collections.abc import Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.activations.stream import normalise
from helpers.dictionaries.autoencoders import SparseAutoencoder
from helpers.evaluation.downstream import reconstruction, where
from helpers.subjects.subject import Subject

AFTER = 16  # T: tokens whose logits are looked at, from the one on at which something is removed
FIRST = 16  # the earliest position, as the first tokens of a row have few to attend to and odd norms


@torch.no_grad()
def ablate(
    subject: Subject,
    sae: SparseAutoencoder,
    rows: Tensor,
    n_tokens: int,
    kinds: Sequence[str] = ("latent",),
    per_token: int = 16,
    keep_error: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """Remove directions one by one at tokens drawn from `rows` (n, L): a row per token and direction, with columns
    token, kind, share and share_here.

    At most `per_token` of a token's active latents are drawn, and as many of every other kind. The same seed draws the
    same tokens whatever the autoencoder. With `keep_error` a term is subtracted from the activation itself; without,
    from the reconstruction, which then stands wherever dictionaries read, in what it is compared with as well.
    Raises ValueError for too few or too short rows, an unknown kind, and latents that are never on.
    """
    if unknown := set(kinds) - KINDS.keys():
        raise ValueError(f"there is no kind {', '.join(sorted(unknown))}: choose of {', '.join(KINDS)}")
    random = torch.Generator().manual_seed(1000 + seed)  # not the stream that the autoencoder starts from
    rows, positions = draw_tokens(rows, subject.studied(rows), n_tokens, random)
    replace, found = where(subject.studied(rows), reconstruction(sae)), []
    read = subject.residuals(rows)
    rebuilt = read if keep_error else replace(read)
    for token, (residuals, around, t) in enumerate(zip(read, rebuilt, positions, strict=True)):
        terms = active_terms(sae, residuals[t], per_token, random)
        around = around[: t + AFTER]
        for kind in kinds if len(terms) else ():
            removed = KINDS[kind](around[t:], terms, random)
            effects = effects_of_removing(subject, around, t, removed)
            shares = {"share": effective_share(effects), "share_here": effective_share(effects[:, :1])}
            found.append(pd.DataFrame({"token": token, "kind": kind} | {k: v.tolist() for k, v in shares.items()}))
    if not found:
        raise ValueError(f"no latent is on at any of the {n_tokens} tokens: take an autoencoder that is trained")
    return pd.concat(found, ignore_index=True)


def effective_share(effects: Tensor) -> Tensor:
    """Share of the logits that an effect moves, (..., T, V) -> (...). NaN for no effect at all."""
    centred = effects - effects.median(-1, keepdim=True).values
    absolute, square = centred.abs().sum((-2, -1)), centred.square().sum((-2, -1))
    return absolute.square() / square / (effects.shape[-2] * effects.shape[-1])


def effects_of_removing(subject: Subject, residuals: Tensor, position: int, removed: Tensor) -> Tensor:
    """Change of the logits from `position` on when each of m removals is subtracted there.

    residuals (L, d_model), removed (m, P, d_model) for P positions -> (m, L - position, V).
    """
    rows = residuals.repeat(1 + len(removed), 1, 1)
    rows[1:, position : position + removed.shape[1]] -= removed
    after = torch.arange(rows.shape[1]).expand(rows.shape[:2]) >= position
    logits = subject.resume(rows, after).unflatten(0, (len(rows), -1))
    return logits[1:] - logits[0]


def draw_tokens(rows: Tensor, studied: Tensor, n_tokens: int, random: torch.Generator) -> tuple[Tensor, list[int]]:
    """Random rows of (n, L), and in each a random position with FIRST tokens before and AFTER from it on, of those
    that are `studied` (n, L); a row without one is left out."""
    length = rows.shape[1]
    if length >= FIRST + AFTER:
        possible = studied[:, FIRST : length - AFTER + 1]
        rows, possible = (each[possible.any(1)] for each in (rows, possible))
    n_rows = len(rows)
    if n_rows < n_tokens or length < FIRST + AFTER:
        raise ValueError(
            f"{n_tokens} tokens need as many rows of {FIRST + AFTER} tokens or more, "
            f"there are {n_rows} of {length}: take fewer tokens, or longer rows"
        )
    chosen = torch.randperm(n_rows, generator=random)[:n_tokens]
    places = possible[chosen].float().multinomial(1, generator=random)
    return rows[chosen], (FIRST + places).squeeze(1).tolist()


def active_terms(sae: SparseAutoencoder, residual: Tensor, at_most: int, random: torch.Generator) -> Tensor:
    """What active latents, `at_most` drawn at random, add to the stream at one token: (d_model,) -> (m, d_model)."""
    x, scale = normalise(residual)
    latents = sae.encode(x[None])[0]
    on = latents.nonzero().squeeze(1)
    on = on[torch.randperm(len(on), generator=random)[:at_most]]
    return latents[on, None] * sae.W_dec[on] * scale.norm


# Each kind: residuals (T, d_model) from the token on and terms (m, d_model) -> what is removed (m, 1 or T, d_model).


def _latents(residuals: Tensor, terms: Tensor, random: torch.Generator) -> Tensor:
    return terms[:, None]


def _random_directions(residuals: Tensor, terms: Tensor, random: torch.Generator) -> Tensor:
    directions = F.normalize(torch.randn(terms.shape, generator=random), dim=-1)
    return (directions.to(terms) * terms.norm(dim=-1, keepdim=True))[:, None]


def _channels(residuals: Tensor, terms: Tensor, random: torch.Generator) -> Tensor:
    return residuals[:1] * _axes(terms, random)


def _channels_of_equal_norm(residuals: Tensor, terms: Tensor, random: torch.Generator) -> Tensor:
    return _axes(terms, random) * terms.norm(dim=-1)[:, None, None]


def _channels_at_all_tokens(residuals: Tensor, terms: Tensor, random: torch.Generator) -> Tensor:
    return residuals * _axes(terms, random)


def _axes(terms: Tensor, random: torch.Generator) -> Tensor:
    """A random coordinate's unit vector for each term: (m, 1, d_model)."""
    m, d_model = terms.shape
    return F.one_hot(torch.randint(d_model, (m, 1), generator=random), d_model).to(terms)


KINDS = {
    "latent": _latents,
    "random direction": _random_directions,
    "channel": _channels,
    "channel, equal norm": _channels_of_equal_norm,
    "channel at all tokens": _channels_at_all_tokens,
}
