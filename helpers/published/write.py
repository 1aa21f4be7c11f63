"""Write a dictionary so that SAELens or crosscoder_learning loads it: the same latents, the same reconstructions.

    SAELens              architecture        standard    topk    gated    jumprelu    jumprelu
                         from our            ReLU        TopK    Gated    JumpReLU    BatchTopK with its threshold
    crosscoder_learning  class               CrossCoder              BatchTopKCrossCoder
                         from our            Crosscoder of ReLU      Crosscoder or DecoupledCrosscoder of BatchTopK

Unit activations are written as layer-normed ones, so that SAELens reads raw activations; its 1e-5 beside a standard
deviation is what remains of the difference. The settings are written last: without them a folder is not read.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from helpers.base.storage import save_state, write_atomic
from helpers.dictionaries.autoencoders import BatchTopK, Gated, JumpReLU, ReLU, TopK
from helpers.dictionaries.crosscoders import N_MODELS, Crosscoder, DecoupledCrosscoder
from helpers.dictionaries.designated import DeltaCrosscoder
from helpers.published.build import just_below, times
from helpers.published.origin import Inputs, Published
from helpers.published.pairs import CODES, SIZES

SAE_LENS = "6.54.12"  # whose layout this is
NORMALISATIONS = {
    "none": "none",
    "unit": "layer_norm",
    "length": "constant_norm_rescale",
    "mean norm": "expected_average_only_in",
}


@torch.no_grad()
def write_sae_lens(published: Published, folder: str | Path) -> Path:
    """An autoencoder as a directory of SAELens: cfg.json and sae_weights.safetensors.

    Raises ValueError for what SAELens has no place for, OSError for a disk that cannot be written to.
    """
    sae, origin = published
    if isinstance(sae, Crosscoder):
        raise ValueError("SAELens has no crosscoders: use write_crosscoder")
    n, d, mode = sae.n_latents, sae.d_model, origin.inputs.mode
    if mode not in NORMALISATIONS:
        raise ValueError(f"SAELens has no inputs '{mode}': scale the activations, and pass Inputs() for raw ones")
    longer = {"unit": (d - 1) ** 0.5, "length": d**0.5}.get(mode, 1.0)  # than ours are its inputs
    architecture, of_activation, settings = _sae_lens_activation(sae.activation, sae.b_enc)
    tensors = {"W_enc": sae.W_enc.T / longer, "W_dec": sae.W_dec * longer, "b_dec": sae.b_dec * longer} | of_activation
    about = {"model_name": origin.model, "hook_name": origin.hook, "context_size": origin.context}
    about |= {"prepend_bos": origin.bos, "sae_lens_version": SAE_LENS}
    config = {"d_in": d, "d_sae": n, "dtype": "float32", "device": "cpu", "architecture": architecture}
    config |= {"apply_b_dec_to_input": True, "normalize_activations": NORMALISATIONS[mode]}
    config |= {"reshape_activations": "none", "metadata": about} | settings
    return _write(Path(folder), "sae_weights.safetensors", tensors, "cfg.json", config)


@torch.no_grad()
def write_crosscoder(published: Published, folder: str | Path) -> Path:
    """A crosscoder as a directory of crosscoder_learning: config.json and model.safetensors.

    Raises ValueError for what it has no class for, OSError for a disk that cannot be written to.
    """
    crosscoder, origin = published
    known = isinstance(crosscoder, Crosscoder) and isinstance(crosscoder.activation, ReLU | BatchTopK)
    if not known or isinstance(crosscoder, DeltaCrosscoder):
        raise ValueError("crosscoder_learning has crosscoders of ReLU and of BatchTopK: for others use write_sae_lens")
    size = "decoupled" if isinstance(crosscoder, DecoupledCrosscoder) else crosscoder.size
    number = next(number for number, name in CODES.items() if SIZES.get(name) == size)
    n, d = crosscoder.n_latents, crosscoder.d_model
    tensors = {
        "encoder.weight": crosscoder.encoders.transpose(1, 2),
        "encoder.bias": (crosscoder.b_enc.double() - times(crosscoder.W_enc, crosscoder.b_dec)).float(),
        "decoder.weight": crosscoder.decoders,
        "decoder.bias": crosscoder.biases,
        "code_normalization_id": torch.tensor(number),
    }
    config = {"activation_dim": d, "dict_size": n, "num_layers": N_MODELS, "code_normalization": CODES[number]}
    config |= {"dict_class": "CrossCoder"}
    if isinstance(crosscoder.activation, BatchTopK):
        config |= {"dict_class": "BatchTopKCrossCoder", "k": crosscoder.activation.k}
        tensors |= {"k": torch.tensor(crosscoder.activation.k, dtype=torch.int), "threshold": _thresholds(crosscoder)}
    return _write(Path(folder), "model.safetensors", tensors | _scaling(origin.inputs, d), "config.json", config)


def _sae_lens_activation(activation: nn.Module, b_enc: Tensor) -> tuple[str, dict[str, Tensor], dict]:
    """Architecture, its tensors, its settings."""
    match activation:
        case ReLU():
            return "standard", {"b_enc": b_enc}, {}
        case TopK():
            return "topk", {"b_enc": b_enc}, {"k": activation.k, "rescale_acts_by_decoder_norm": False}
        case JumpReLU():
            return "jumprelu", {"b_enc": b_enc, "threshold": activation.log_threshold.exp().float()}, {}
        case BatchTopK():
            return "jumprelu", {"b_enc": b_enc, "threshold": _threshold(activation).expand(len(b_enc))}, {}
        case Gated():
            r_mag = activation.log_scale
            return "gated", {"b_gate": b_enc, "r_mag": r_mag, "b_mag": activation.bias + r_mag.exp() * b_enc}, {}
    raise ValueError(
        f"SAELens has no place for {type(activation).__name__}: use ReLU, TopK, BatchTopK, JumpReLU, Gated"
    )


def _threshold(activation: BatchTopK) -> Tensor:
    """Ours keeps what reaches the threshold, others what is above."""
    if activation.threshold.isnan():
        raise ValueError("BatchTopK has no threshold yet: train it, or call calibrate(batches) on typical data")
    return just_below(activation.threshold)


def _thresholds(crosscoder: Crosscoder) -> Tensor:
    if isinstance(crosscoder, DecoupledCrosscoder):
        return torch.stack([_threshold(crosscoder.activation), _threshold(crosscoder.activation_chat)])
    return _threshold(crosscoder.activation)


def _scaling(inputs: Inputs, d: int) -> dict[str, Tensor]:
    """How each model's activations are scaled; NaN stands for not at all."""
    if inputs.mode not in ("none", "fixed"):
        raise ValueError(f"crosscoder_learning has no inputs '{inputs.mode}': measure or scale the activations")
    mean, factor = inputs.mean, inputs.factor
    if inputs.mode == "none":
        mean, factor = torch.full((N_MODELS, d), torch.nan), torch.full((N_MODELS, 1), torch.nan)
    return {
        "target_rms": torch.tensor(1.0),
        "activation_mean": mean,
        "activation_std": (1 / (factor * d**0.5)).expand(N_MODELS, d),  # which that scale comes from
        "activation_global_scale": factor.squeeze(1).nan_to_num(1.0),
    }


def _write(folder: Path, weights: str, tensors: dict[str, Tensor], settings: str, config: dict) -> Path:
    (folder / settings).unlink(missing_ok=True)  # of an earlier one: they are not this one's
    save_state(folder / weights, tensors)
    write_atomic(folder / settings, json.dumps(config, indent=1) + "\n")
    return folder
