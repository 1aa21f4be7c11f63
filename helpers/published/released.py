"""What laboratories have released: OpenAI's autoencoders of GPT-2 small, and Google DeepMind's two Gemma Scopes.

    OpenAI         pre_bias, latent_bias; inputs of TopK (v5) are layer-normed, those of ReLU (v1, v4) are raw
    Gemma Scope    npz; JumpReLU, b_dec is not subtracted from the input
    Gemma Scope 2  safetensors, w_enc and w_dec; the same mathematics

Sources: openai/sparse_autoencoder model.py and paths.py; the loaders of SAELens 6.
"""

import re

from torch import Tensor, nn

from helpers.dictionaries.autoencoders import ReLU, SparseAutoencoder
from helpers.published import build
from helpers.published.files import Files
from helpers.published.origin import Inputs, Origin, Published

OPENAI_HOOKS = {
    "mlp_post_act": "mlp.hook_post",
    "resid_delta_attn": "hook_attn_out",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_post_mlp": "hook_resid_post",
}
SCOPE_HOOKS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
SCOPE_2_FOLDERS = {"resid_post": "hook_resid_post", "attn_out": "attn.hook_z", "mlp_out": "hook_mlp_out"}
SCOPE_2_HOOKS = {
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "post_feedforward_layernorm.output": "hook_mlp_out",
}
EPS = 1e-5  # of layer normalisation


def openai(files: Files) -> Published:
    n, d = files.shape("encoder.weight", 2)
    name = files.setting("activation", str, "ReLU", files.content)
    state = files.setting("activation_state_dict", dict, {}, files.content)
    after = state.get("postact_fn", "ReLU")
    if name not in ("ReLU", "TopK") or after != "ReLU":
        raise files.cannot(f"its activation is {name}, then {after}, and ours is ReLU, or TopK of what is positive")
    weights = files.take("encoder.weight", n, d), files.take("decoder.weight", d, n).T
    parts = *weights, files.take("latent_bias", n), files.take("pre_bias", d)
    found = re.search(rf"({'|'.join(OPENAI_HOOKS)})\w*/(?:autoencoders/)?(\d+)\.pt$", files.place)
    hook = f"blocks.{found[2]}.{OPENAI_HOOKS[found[1]]}" if found else None
    origin = Origin(f"OpenAI {name}", files.source, files.dtype("encoder.weight"), "gpt2-small", hook)
    if name == "ReLU":
        return Published(build.autoencoder(*parts, ReLU()), origin)
    return layer_normed(*parts, build.top_k(files.number("activation.k", state.get("k"))), origin)


def gemma_scope(files: Files) -> Published:
    if aside := re.search(r"gemma-scope[^/]*-(transcoder)s\b|(?:^|/)(embedding)/", files.place):
        raise files.cannot(f"it is one of Gemma Scope's {aside[1] or aside[2]}s, and no autoencoder of one place")
    W = "W" if "W_enc" in files else "w"
    n, _ = files.shape(f"{W}_dec", 2)
    files.agree({"width": _width(files)}, {"width": _short(n)})
    of = re.search(r"gemma-scope-(\w+)-(pt|it)-(res|mlp|att)\b", files.place)
    layer = re.search(r"layer_(\d+)", files.place)
    model = f"gemma-2-{of[1]}{'-it' if of[2] == 'it' else ''}" if of else None
    hook = f"blocks.{layer[1]}.{SCOPE_HOOKS[of[3]]}" if of and layer else None
    sae = _jump_relu(files, f"{W}_enc", f"{W}_dec")
    return Published(sae, _of_gemma(files, "Gemma Scope", f"{W}_enc", model, hook))


def gemma_scope_2(files: Files) -> Published:
    settings, reads = files.settings, files.word("hf_hook_point_in") or ""
    if (files.ndim("w_enc"), files.ndim("w_dec")) != (2, 2):
        raise files.cannot("it reads or writes several layers of one model, and our crosscoders are over two models")
    transcodes = re.search(r"(?:^|/)(?:transcoder(?:_all)?|clt)/", files.place) or settings.get("type", "sae") != "sae"
    elsewhere = settings.get("hf_hook_point_out") not in (None, reads) or "affine_skip_connection" in files
    if transcodes or elsewhere:
        raise files.cannot("it is a transcoder, which writes another place than it reads")
    if (architecture := settings.get("architecture", "jump_relu")) != "jump_relu":
        raise files.cannot(f"its architecture is {architecture}, and that of its layout is jump_relu")
    n, _ = files.shape("w_dec", 2)
    at, named = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", reads), re.search(r"layer_(\d+)", files.path.parent.name)
    said = {"width": _width(files), "layer": named and named[1]}
    files.agree(said, {"width": _short(n)} | ({"layer": at[1]} if at else {}))
    folder = re.search(rf"\b({'|'.join(SCOPE_2_FOLDERS)})(?:_all)?/layer_(\d+)_", files.place)
    named_hook = f"blocks.{folder[2]}.{SCOPE_2_FOLDERS[folder[1]]}" if folder else None  # where there are no settings
    hook = f"blocks.{at[1]}.{SCOPE_2_HOOKS.get(at[2], at[2])}" if at else reads or named_hook
    model = (files.word("model_name") or "").removeprefix("google/") or None
    return Published(_jump_relu(files, "w_enc", "w_dec"), _of_gemma(files, "Gemma Scope 2", "w_enc", model, hook))


def layer_normed(
    W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor, activation: nn.Module, origin: Origin, centred=True
) -> Published:
    """An autoencoder of layer-normed activations, which are sqrt(d_model - 1) long, as one of unit ones."""
    longer = (len(b_dec) - 1) ** 0.5
    sae = build.autoencoder(W_enc, W_dec, b_enc, b_dec, activation, centred, scale=longer)
    return Published(sae, origin.with_inputs(Inputs("unit", eps=EPS * longer)))


def _jump_relu(files: Files, encoder: str, decoder: str) -> SparseAutoencoder:
    n, d = files.shape(decoder, 2)
    weights = files.take(encoder, d, n).T, files.take(decoder, n, d)
    biases = files.take("b_enc", n), files.take("b_dec", d)
    return build.autoencoder(*weights, *biases, build.jump_relu(files.take("threshold", n)), centred=False)


def _of_gemma(files: Files, release: str, tensor: str, model: str | None, hook: str | None) -> Origin:
    return Origin(f"{release} JumpReLU", files.source, files.dtype(tensor), model, hook, context=1024, bos=True)


def _width(files: Files) -> str | None:
    """The number of latents as the folder's name gives it: 16k, 1m."""
    named = re.search(r"width_(\d+[km])", files.place)
    return named and named[1]


def _short(n: int) -> str:
    return f"{n // 1000}k" if n < 10**6 else f"{n // 10**6}m"
