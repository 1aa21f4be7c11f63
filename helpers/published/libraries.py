"""What training libraries write for one model: SAELens, sparsify, dictionary_learning and its fork crosscoder_learning.

    SAELens              cfg.json says nearly all; version 6 keeps places in `metadata`, earlier ones under other names
    sparsify             TopK with W_dec (n, d)
    dictionary_learning  config.json names the class, but on the hub, where its fork gives sizes alone; TopK and
                         BatchTopK have the same tensors, and AutoEncoderNew those of Llama Scope

Latents are in the units of the file's own decoder rows; some of these libraries show them times the rows' norms.
Sources: SAELens 6.54 (saes/, loading/), eai-sparsify 1.3, dictionary_learning 0.1, crosscoder_learning dictionary.py.
"""

import re

import torch
from torch import Tensor, nn

from helpers.dictionaries.autoencoders import ReLU, SparseAutoencoder
from helpers.published import build
from helpers.published.files import Files
from helpers.published.origin import Inputs, Origin, Published
from helpers.published.released import layer_normed

FINETUNED = ("scaling_factor", "finetuning_scaling_factor")  # as first named, and as SAELens 3 to 5 save it
SCALER = "activation_scaler.json"  # of SAELens, beside what it saves under way
PROCESSED = (  # center_writing_weights of HookedTransformer.from_pretrained, which SAELens called until its version 4
    "it was trained on TransformerLens's processed model, whose activations, if it has LayerNorm, lack their mean over "
    "the coordinates"
)
UNTRAINED = "its threshold was never set in training, so every positive latent is kept"
UNNAMED = "its class is not said, and taken for the one that crosscoder_learning publishes with such tensors"
SHARED = {  # tensors that several classes have: these, and the one that the fork of dictionary_learning publishes
    "decoder.bias": ("an AutoEncoderNew, or of Llama Scope, which is not read here", "AutoEncoderNew"),
    "threshold": ("an AutoEncoderTopK or a BatchTopKSAE", "BatchTopKSAE"),
}
SCALING = {"target_rms", "activation_mean", "activation_std", "activation_global_scale"}  # of crosscoder_learning
CLASSES = {  # of dictionary_learning, by what only they have
    "bias": "AutoEncoder",
    "r_mag": "GatedAutoEncoder",
    "group_sizes": "MatryoshkaBatchTopKSAE",
    "activation_mean": "BatchTopKSAE",
}


def sae_lens(files: Files) -> Published:
    settings = files.settings
    n, d = files.shape("W_dec", 2)
    files.agree(settings, {"d_in": d, "d_sae": n})
    W_enc, W_dec, b_dec = files.take("W_enc", d, n).T, files.take("W_dec", n, d), files.take("b_dec", d)
    architecture, b_enc, activation = _sae_lens_activation(files, n)
    for name in FINETUNED:
        if name in files:
            W_dec = W_dec * _finetuned(files, name, n).unsqueeze(1)
    if architecture in ("topk", "batchtopk") and files.setting("rescale_acts_by_decoder_norm", bool):
        norms = W_dec.norm(dim=1)  # latents are counted, and ranked, as if decoder rows had unit norm
        W_enc, W_dec, b_enc = W_enc * norms.unsqueeze(1), W_dec / norms.unsqueeze(1), b_enc * norms
    parts, centred = (W_enc, W_dec, b_enc, b_dec, activation), files.setting("apply_b_dec_to_input", bool, True)
    origin = _sae_lens_origin(files, architecture)
    match settings.get("normalize_activations"):
        case None | False | "none":
            return Published(build.autoencoder(*parts, centred), origin)
        case True | "expected_average_only_in":
            if (measured := files.beside(SCALER).get("scaling_factor")) is not None:  # of a checkpoint
                factor = _positive(files, files.number(SCALER, measured))
                return Published(build.autoencoder(*parts, centred, factor), origin)
            return Published(build.autoencoder(*parts, centred), origin.with_inputs(Inputs("mean norm")))
        case "layer_norm":
            return layer_normed(*parts, origin, centred)
        case "constant_norm_rescale":
            return Published(build.autoencoder(*parts, centred, d**0.5), origin.with_inputs(Inputs("length")))
        case other:
            raise files.cannot(f"its activations are to be prepared by {other}, and its files do not say how")


def sparsify(files: Files) -> Published:
    settings = files.settings
    n, d = files.shape("W_dec", 2)
    if files.setting("transcode", bool) or "W_skip" in files:
        raise files.cannot("it is a transcoder, which writes another place than it reads")
    if settings.get("activation", "topk") != "topk" or files.setting("signed", bool):
        raise files.cannot("its activation is not TopK of what is positive")
    files.agree(settings, {"d_in": d} | ({"num_latents": n} if settings.get("num_latents") else {}))
    weights = files.take("encoder.weight", n, d), files.take("W_dec", n, d)
    biases = files.take("encoder.bias", n), files.take("b_dec", d)
    origin = Origin("sparsify TopK", files.source, files.dtype("W_dec"), hook=_block_or(files.path.parent.name))
    return Published(build.autoencoder(*weights, *biases, build.top_k(files.number("k", settings.get("k")))), origin)


def dictionary_learning(files: Files) -> Published:
    trainer = files.setting("trainer", dict, files.settings)
    kind, unnamed = _class_of(files, trainer)
    origin = _dictionary_learning_origin(files, kind, trainer)
    sae, caution = _of_class(files, kind, trainer)
    files.agree(trainer, {"activation_dim": sae.d_model, "dict_size": sae.n_latents})
    return Published(sae, origin.with_inputs(origin.inputs, caution or unnamed))


def _sae_lens_activation(files: Files, n: int) -> tuple[str, Tensor, nn.Module]:
    """Architecture, b_enc and activation."""
    settings, named = files.settings, files.settings.get("activation_fn") or files.settings.get("activation_fn_str")
    old = files.setting("activation_fn_kwargs", dict, {})
    architecture = "topk" if named == "topk" else settings.get("architecture", "standard")
    if architecture == "gated":
        gate = files.take("b_gate", n)
        return architecture, gate, build.gated(files.take("r_mag", n), gate, files.take("b_mag", n))
    if architecture not in ("standard", "topk", "batchtopk", "jumprelu") or named not in (None, "relu", "topk"):
        known = "standard, topk, batchtopk, jumprelu or gated"
        raise files.cannot(f"its architecture is {architecture} with {named or 'its own activation'}, and ours {known}")
    b_enc = files.take("b_enc", n)
    match architecture:
        case "standard":
            return architecture, b_enc, ReLU()
        case "topk":
            return architecture, b_enc, build.top_k(files.number("k", settings.get("k", old.get("k"))))
        case "batchtopk":
            k = files.number("k", settings.get("k"))
            return architecture, b_enc, build.batch_topk(k, files.number("topk_threshold"))
    return architecture, b_enc, build.jump_relu(files.take("threshold", n))


def _finetuned(files: Files, name: str, n: int) -> Tensor:
    """By how much each latent counts more in the reconstruction, (n,)."""
    factors = files.take(name, n)
    if not files.setting("finetuning_scaling_factor", bool) and not torch.allclose(factors, torch.ones(n)):
        raise files.cannot(f"it has a {name} that its settings do not speak of: fetch both again")
    return factors


def _sae_lens_origin(files: Files, architecture: str) -> Origin:
    about = files.settings | files.setting("metadata", dict, {})
    hook = files.word("hook_name", about) or files.word("hook_point", about)
    if about.get("hook_name_out") not in (None, hook):
        raise files.cannot("it is a transcoder, which writes another place than it reads")
    where = {"model": files.word("model_name", about), "hook": hook and _block_or(hook), "caution": _cautions(about)}
    text = {"context": about.get("context_size"), "bos": about.get("prepend_bos")}
    return Origin(f"SAELens {architecture}", files.source, files.dtype("W_dec"), **where, **text)


def _block_or(place: str) -> str:
    """TransformerLens's name of what leaves a block that transformers names; any other place as it is."""
    block = re.fullmatch(r"(?:\w+\.)*(?:layers|h)\.(\d+)", place)
    return f"blocks.{block[1]}.hook_resid_post" if block else place


def _cautions(about: dict) -> str:
    loaded, version = about.get("model_from_pretrained_kwargs"), str(about.get("sae_lens_training_version") or "")
    centred = isinstance(loaded, dict) and loaded.get("center_writing_weights")
    old = "hook_point" in about or version.startswith(("1.", "2.", "3."))
    processed = (old or centred) and about.get("normalize_activations") != "layer_norm"  # which takes the mean away
    return "; ".join(filter(None, (_of_heads(about), PROCESSED if processed else "")))


def _of_heads(about: dict) -> str:
    """What is to know of an autoencoder that reads inside attention."""
    if (head := about.get("hook_head_index", about.get("hook_point_head_index"))) is not None:
        return f"it reads head {head} alone"
    old = "reshape_activations" not in about and "hook_z" in str(about.get("hook_name") or about.get("hook_point"))
    return (
        "it reads all heads side by side: flatten them" if old or about.get("reshape_activations") == "hook_z" else ""
    )


def _dictionary_learning_origin(files: Files, kind: str, trainer: dict) -> Origin:
    place, hook = files.word("submodule_name", trainer), residual(files, trainer)
    where = {"model": files.word("lm_name", trainer)}
    where |= {"hook": hook if hook and (place or "resid_post").startswith("resid_post") else place}
    context = files.setting("buffer", dict, {}).get("ctx_len")
    tensor = "decoder.weight" if "decoder.weight" in files else "W_dec"
    return Origin(f"dictionary_learning {kind}", files.source, files.dtype(tensor), **where, context=context)


def residual(files: Files, trainer: dict) -> str | None:
    """The place after the block that is named by number."""
    layer = files.word("layer", trainer)
    return None if layer is None else f"blocks.{layer}.hook_resid_post"


def _class_of(files: Files, trainer: dict) -> tuple[str, str]:
    """The class, and what is to know where nobody says it."""
    unique = next((CLASSES[name] for name in CLASSES if name in files), None)
    if said := files.setting("dict_class", str, among=trainer) or unique:
        return said, ""
    if "W_enc" in files:
        return "JumpReluAutoEncoder", ""
    candidates, published = next((SHARED[name] for name in SHARED if name in files), ("", "AutoEncoderTopK"))
    if candidates and "activation_dim" not in trainer:  # which the fork gives on the hub
        raise ValueError(
            f"{files.path} is {candidates}, and its tensors do not tell: put its config.json beside it, or one with "
            f'{{"dict_class": "{published}"}}'
        )
    return published, UNNAMED if candidates else ""


def _of_class(files: Files, kind: str, trainer: dict) -> tuple[SparseAutoencoder, str]:
    """The autoencoder, and what is to know about it."""
    if kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        n, d = files.shape("W_dec", 2)
        weights, b_enc = (files.take("W_enc", d, n).T, files.take("W_dec", n, d)), files.take("b_enc", n)
    else:
        d, n = files.shape("decoder.weight", 2)
        weights, b_enc = (files.take("encoder.weight", n, d), files.take("decoder.weight", d, n).T), None
    match kind:
        case "JumpReluAutoEncoder":
            jump = build.jump_relu(files.take("threshold", n))
            centred = files.setting("apply_b_dec_to_input", bool, False, trainer)
            return build.autoencoder(*weights, b_enc, files.take("b_dec", d), jump, centred), ""
        case "GatedAutoEncoder":
            gate = files.take("gate_bias", n)
            activation = build.gated(files.take("r_mag", n), gate, files.take("mag_bias", n))
            return build.autoencoder(*weights, gate, files.take("decoder_bias", d), activation), ""
        case "AutoEncoder":
            return build.autoencoder(*weights, files.take("encoder.bias", n), files.take("bias", d), ReLU()), ""
        case "AutoEncoderNew":
            biases = files.take("encoder.bias", n), files.take("decoder.bias", d)
            return build.autoencoder(*weights, *biases, ReLU(), centred=False), ""
        case "AutoEncoderTopK":
            activation = build.top_k(files.number("k", trainer.get("k")))
            files.taken.add("threshold")  # which its own encoding leaves
            return build.autoencoder(*weights, files.take("encoder.bias", n), files.take("b_dec", d), activation), ""
        case "BatchTopKSAE" | "MatryoshkaBatchTopKSAE":
            threshold = files.number("threshold")
            activation = build.batch_topk(files.number("k", trainer.get("k")), threshold)
            b_enc = files.take("encoder.bias", n) if b_enc is None else b_enc
            scales = _measured_inputs(files, d)
            sae = build.autoencoder(*weights, b_enc, files.take("b_dec", d), activation, **scales)
            return sae, UNTRAINED if threshold < 0 else ""
    raise files.cannot(f"its class is {kind}, and those known are {', '.join(CLASSES.values())}, JumpReluAutoEncoder")


def _measured_inputs(files: Files, d: int) -> dict:
    """How crosscoder_learning scales the activations of an autoencoder, for `build.autoencoder`; NaN is not at all."""
    if not scales_inputs(files):
        return {}
    factor = _positive(files, files.number("activation_global_scale"))
    return {"mean": files.take("activation_mean", d).double(), "scale": factor, "back": factor + 1e-8}


def _positive(files: Files, factor: float) -> float:
    if factor <= 0:
        raise files.cannot(f"its activations are to be scaled by {factor}")
    return factor


def scales_inputs(files: Files) -> bool:
    """Whether crosscoder_learning measured the mean of activations: NaN stands for no."""
    files.taken |= SCALING
    mean = files.content.get("activation_mean")
    return mean is not None and not (isinstance(mean, Tensor) and mean.isnan().all())
