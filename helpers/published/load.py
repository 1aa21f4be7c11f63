"""`load_dictionary`: a published dictionary from a file, a folder or the hub. It finds the layout by itself.

    sae, origin = load_dictionary("google/gemma-scope-2-270m-pt/resid_post/layer_9_width_16k_l0_medium")
    print(load_dictionary("downloads/resid_post_mlp_v5_32k/autoencoders/8.pt"))

A folder or a file needs no network. An id is owner/repository, and then the folder or file in it.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from helpers.base.hub import snapshot
from helpers.published.files import SUFFIXES, Files, weights_file
from helpers.published.libraries import dictionary_learning, sae_lens, sparsify
from helpers.published.origin import Published
from helpers.published.pairs import crosscoder_learning, kissane
from helpers.published.released import gemma_scope, gemma_scope_2, openai

if TYPE_CHECKING:
    from helpers.subjects.pair import SubjectPair
    from helpers.subjects.subject import Subject


class Layout(NamedTuple):
    name: str
    fits: Callable[[Files], bool]
    read: Callable[[Files], Published]


LAYOUTS = (  # the first that fits
    Layout("OpenAI", lambda f: "pre_bias" in f and "latent_bias" in f, openai),
    Layout("Gemma Scope", lambda f: "threshold" in f and f.path.suffix == ".npz", gemma_scope),
    Layout("Gemma Scope 2", lambda f: "w_enc" in f and "w_dec" in f, gemma_scope_2),
    Layout("Kissane", lambda f: f.ndim("W_dec") == 3 and f.ndim("W_enc") == 3, kissane),
    Layout("crosscoder_learning", lambda f: f.ndim("encoder.weight") == 3, crosscoder_learning),
    Layout("SAELens", lambda f: "W_dec" in f and {"d_in", "d_sae"} <= f.settings.keys(), sae_lens),
    Layout("sparsify", lambda f: "encoder.weight" in f and "W_dec" in f, sparsify),
    Layout(
        "dictionary_learning",
        lambda f: (
            "encoder.weight" in f
            or ("W_enc" in f and not {"trainer", "activation_dim"}.isdisjoint(f.settings))
            or ({"W_enc", "threshold"} <= f.content.keys() and f.path.suffix == ".pt")
        ),
        dictionary_learning,
    ),
)


def load_dictionary(
    source: str | Path, subject: "Subject | SubjectPair | None" = None, latents: Sequence[int] = ()
) -> Published:
    """An autoencoder or crosscoder of this suite with the mathematics of the published one, and its origin.

    With a `subject` its width and site are compared, and it goes to its device; with `latents` there has to be each of
    them.
    Raises ValueError for what is damaged, of another width or place, in no known layout, or not to be expressed here,
    FileNotFoundError for what is missing, and what the hub says as `load_subject` does.
    """
    files = Files(weights_file(_place(str(source))), str(source))
    layout = next((layout for layout in LAYOUTS if layout.fits(files)), None)
    if layout is None:
        raise ValueError(
            f"{files.path} with tensors {files.names} is in no layout known here "
            f"({', '.join(known.name for known in LAYOUTS)}): a cfg.json or config.json may be missing beside it"
        )
    found = layout.read(files)
    files.require_all_taken(found.origin.kind)
    found.require(subject, latents)
    if subject is not None:
        found.dictionary.to(subject.device)
    return found


def _place(source: str) -> Path:
    path = Path(os.path.expanduser(source))
    if source and os.path.exists(path):
        return path
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.=:+,@-]*)+", source) or path.parent.is_dir():
        raise FileNotFoundError(
            f"there is no dictionary at {source!r}: give a file, a folder, or a hub id such as owner/repository/folder"
        )
    owner, name, *inner = source.split("/")
    within = "/".join(inner)
    patterns = _patterns(within)
    return snapshot(f"{owner}/{name}", lambda folder: _there(folder / within), "give a folder or a file", **patterns)


def _there(place: Path) -> Path:
    """The place itself, if its weights are there. Raises FileNotFoundError."""
    if not place.exists():
        raise FileNotFoundError(f"the repository has no {place.name} with weights in it: look its files up on the hub")
    return weights_file(place) and place


def _patterns(within: str) -> dict:
    """Files of one folder and not of those inside it, or one file and the settings beside it. Gemma Scope 2 has large
    examples beside the weights, which are left."""
    folder, _, name = within.rpartition("/") if within.endswith(SUFFIXES) else (within, "", "")
    before = f"{folder}/" if folder else ""
    kinds = [name] if name else [f"*{suffix}" for suffix in SUFFIXES]
    ignored = [f"{before}*/*", f"{before}examples.safetensors"]
    return {"allow_patterns": [before + kind for kind in (*kinds, "*.json")], "ignore_patterns": ignored}
