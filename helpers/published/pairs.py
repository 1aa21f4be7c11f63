"""What is published for a pair of models: crosscoders of crosscoder_learning, and of Kissane's replication.

    crosscoder_learning  encoder.weight (2, d, n), decoder.weight (2, n, d); BatchTopK ranks by norms of decoder rows:
                         their sum (CROSSCODER), that of both together (SAE), or in each model apart (DECOUPLED)
    Kissane              W_enc (2, d, n), W_dec (n, 2, d), ReLU; each model's activations of mean length sqrt(d)

Model 0 is base, 1 is chat. No bias is subtracted before the encoder. Activations that were scaled in training stay so
(`Inputs`): folding another scale into each model would change the norms that rank and classify latents.

Sources: crosscoder_learning dictionary.py; ckkissane/crosscoder-model-diff-replication crosscoder.py.
"""

from helpers.dictionaries.autoencoders import ReLU
from helpers.dictionaries.crosscoders import N_MODELS
from helpers.published import build
from helpers.published.files import Files
from helpers.published.libraries import UNTRAINED, residual, scales_inputs
from helpers.published.origin import Inputs, Origin, Published

CODES = {1: "CROSSCODER", 2: "SAE", 3: "MIXED", 4: "NONE", 5: "DECOUPLED"}
SIZES = {"CROSSCODER": "sum", "SAE": "joint", "DECOUPLED": "decoupled"}


def crosscoder_learning(files: Files) -> Published:
    models, n, d = files.shape("decoder.weight", 3)
    trainer = files.setting("trainer", dict, files.settings)
    _of_two(files, models)
    files.agree(trainer, {"activation_dim": d, "dict_size": n})
    weights = files.take("encoder.weight", 2, d, n).transpose(1, 2), files.take("decoder.weight", 2, n, d)
    biases = files.take("encoder.bias", n), files.take("decoder.bias", 2, d)
    hook, model = residual(files, trainer), files.word("lm_name", trainer)
    batch_topk = "threshold" in files
    name = "BatchTopKCrossCoder" if batch_topk else "CrossCoder"
    origin = Origin(f"crosscoder_learning {name}", files.source, files.dtype("decoder.weight"), model, hook)
    origin = origin.with_inputs(_measured_inputs(files, d))
    if not batch_topk:
        return Published(build.crosscoder(*weights, *biases, ReLU()), origin)  # nothing competes, whatever the code is
    code = _code(files, trainer)
    if code not in SIZES:
        raise files.cannot(f"its latents are ranked by {code}, and ours by {', '.join(SIZES)}")
    apart = code == "DECOUPLED"
    thresholds = files.take("threshold", N_MODELS).tolist() if apart else [files.number("threshold")]
    activations = [build.batch_topk(files.number("k", trainer.get("k")), threshold) for threshold in thresholds]
    crosscoder = build.crosscoder(*weights, *biases, activations[0], SIZES[code])
    if apart:
        crosscoder.activation_chat = activations[1].eval()
    caution = UNTRAINED if min(thresholds) < 0 else ""
    return Published(crosscoder, origin.with_inputs(origin.inputs, caution))


def kissane(files: Files) -> Published:
    n, models, d = files.shape("W_dec", 3)
    _of_two(files, models)
    files.agree(files.settings, {"dict_size": n, "d_in": d})
    weights = files.take("W_enc", 2, d, n).transpose(1, 2), files.take("W_dec", n, 2, d).transpose(0, 1)
    crosscoder = build.crosscoder(*weights, files.take("b_enc", n), files.take("b_dec", 2, d), ReLU())
    where = {
        "model": files.word("model_name"),
        "hook": files.word("hook_point"),
        "context": files.settings.get("seq_len"),
    }
    origin = Origin("Kissane CrossCoder", files.source, files.dtype("W_dec"), **where)
    return Published(crosscoder, origin.with_inputs(Inputs("mean norm")))


def _of_two(files: Files, models: int) -> None:
    if models != N_MODELS:
        raise files.cannot(f"it is over {models} models or layers, and our crosscoders are over two models")


def _code(files: Files, trainer: dict) -> str:
    """What ranks latents. Files before there was a choice do not say: CROSSCODER."""
    said = trainer.get("code_normalization")
    said = said and str(said).rpartition(".")[2].upper()
    if "code_normalization_id" not in files:
        return said or "CROSSCODER"
    code = CODES.get(files.number("code_normalization_id"), "one unknown here")
    files.agree({"code_normalization": said}, {"code_normalization": code})
    return code


def _measured_inputs(files: Files, d: int) -> Inputs:
    """Mean and scale of each model's activations as measured in training; NaN stands for none."""
    if not scales_inputs(files):
        return Inputs()
    factor = files.take("activation_global_scale", N_MODELS).unsqueeze(1)
    if not (factor > 0).all():
        raise files.cannot(f"its activations are to be scaled by {factor.flatten().tolist()}")
    return Inputs("fixed", mean=files.take("activation_mean", N_MODELS, d), factor=factor, norm=1 / (factor + 1e-8))
