"""Crosscoders of others, against what their code computes, written out."""

import pytest
import torch
from published_files import PAIRS, D, N, pair, put, random

from helpers.dictionaries.crosscoders import DecoupledCrosscoder
from helpers.published.load import load_dictionary

SCALING = {
    "target_rms": torch.tensor(100.0),
    "activation_mean": random(2, D, seed=5),
    "activation_std": random(2, D, seed=6).exp(),
    "activation_global_scale": torch.tensor([0.5, 1e-4]),  # so small that what is added to it shows,
}
CODES = {"CROSSCODER": 1, "SAE": 2, "MIXED": 3, "NONE": 4, "DECOUPLED": 5}


def free(t, x):
    return (torch.einsum("bmd,mdn->bn", x, t["encoder.weight"]) + t["encoder.bias"]).relu()


def rebuilt(t, z):
    return torch.einsum("bn,mnd->bmd" if z.ndim == 2 else "bmn,mnd->bmd", z, t["decoder.weight"]) + t["decoder.bias"]


def code(name):
    return {"code_normalization_id": torch.tensor(CODES[name])}


@pytest.mark.parametrize("name", [*CODES, None])
def test_l1_crosscoder(tmp_path, name):
    t = pair(**code(name) if name else {})
    published = load_dictionary(
        put(tmp_path, "model.safetensors", t, {"activation_dim": D, "dict_size": N, "num_layers": 2})
    )
    z = free(t, PAIRS)
    torch.testing.assert_close(published.encode(PAIRS), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(published.reconstruct(PAIRS), rebuilt(t, z), rtol=1e-5, atol=1e-5)
    assert published.dictionary.decoders.equal(t["decoder.weight"])


def scores(t, x, name):
    norms = t["decoder.weight"].norm(dim=2)
    match name:
        case "CROSSCODER":
            return free(t, x) * norms.sum(0)
        case "SAE":
            return free(t, x) * norms.square().sum(0).sqrt()
    return free(t, x).unsqueeze(1) * norms


@pytest.mark.parametrize("compiled", ["", "_orig_mod."])
@pytest.mark.parametrize("name", ["CROSSCODER", "SAE", "DECOUPLED"])
def test_batchtopk_crosscoder_ranks_by_its_own_norms(tmp_path, name, compiled):
    thresholds = torch.tensor([1.0, 1.5]) if name == "DECOUPLED" else torch.tensor(2.0)
    t = pair(k=torch.tensor(3, dtype=torch.int), threshold=thresholds, **code(name))
    stored = {compiled + key: value for key, value in t.items()}
    trainer = {"dict_class": "BatchTopKCrossCoder", "layer": 13, "lm_name": "pair", "code_normalization": name}
    settings = {"trainer": trainer}
    published = load_dictionary(put(tmp_path, "model_final.pt", stored, settings).parent)
    on = scores(t, PAIRS, name) > (thresholds.view(1, 2, 1) if name == "DECOUPLED" else thresholds)
    z = on * (free(t, PAIRS).unsqueeze(1) if name == "DECOUPLED" else free(t, PAIRS))
    assert 0.05 < (z > 0).float().mean() < 0.5
    torch.testing.assert_close(published.encode(PAIRS), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(published.reconstruct(PAIRS), rebuilt(t, z), rtol=1e-5, atol=1e-5)
    assert published.origin.hook == "blocks.13.hook_resid_post" and published.dictionary.activation.k == 3
    assert isinstance(published.dictionary, DecoupledCrosscoder) == (name == "DECOUPLED")


def test_activations_scaled_in_training_stay_scaled_so_that_norms_keep_their_meaning(tmp_path):
    t = pair(k=torch.tensor(3), threshold=torch.tensor(2.0), **code("CROSSCODER"), **SCALING)
    published = load_dictionary(put(tmp_path, "model.safetensors", t))
    mean, factor = SCALING["activation_mean"], SCALING["activation_global_scale"].view(2, 1)
    x = (PAIRS - mean) * factor
    z = free(t, x) * (scores(t, x, "CROSSCODER") > 2)
    torch.testing.assert_close(published.encode(PAIRS), z, rtol=1e-5, atol=1e-5)
    x_hat = rebuilt(t, z) / (factor + 1e-8) + mean
    torch.testing.assert_close(published.reconstruct(PAIRS), x_hat, rtol=1e-5, atol=0.1)  # up to 10^4
    assert published.dictionary.decoders.equal(t["decoder.weight"]) and published.origin.inputs.mode == "fixed"


@pytest.mark.parametrize("threshold", [torch.tensor(torch.nan), torch.tensor([1.0, 2.0])])
def test_a_threshold_that_is_none_is_refused(tmp_path, threshold):
    t = pair(k=torch.tensor(3), threshold=threshold, **code("CROSSCODER"))
    with pytest.raises(ValueError, match="nor the settings beside it say what threshold is"):
        load_dictionary(put(tmp_path, "model.safetensors", t))


@pytest.mark.parametrize("name", ["MIXED", "NONE"])
def test_a_ranking_that_is_not_ours_is_refused(tmp_path, name):
    t = pair(k=torch.tensor(3), threshold=torch.tensor(2.0), **code(name))
    with pytest.raises(ValueError, match=f"its latents are ranked by {name}, and ours by CROSSCODER, SAE, DECOUPLED"):
        load_dictionary(put(tmp_path, "model.safetensors", t))


def test_settings_and_tensors_that_name_another_ranking_are_not_of_one_crosscoder(tmp_path):
    t = pair(k=torch.tensor(3), threshold=torch.tensor(2.0), **code("SAE"))
    with pytest.raises(ValueError, match="has code_normalization 'SAE', .* is 'CROSSCODER'"):
        load_dictionary(put(tmp_path, "model.safetensors", t, {"code_normalization": "CROSSCODER"}))
    del t["code_normalization_id"]
    published = load_dictionary(put(tmp_path, "model.safetensors", t, {"code_normalization": "SAE"}))
    assert published.dictionary.size == "joint"


def test_three_layers_are_no_pair(tmp_path):
    t = {"encoder.weight": random(3, D, N), "decoder.weight": random(3, N, D)}
    with pytest.raises(ValueError, match="it is over 3 models or layers, and our crosscoders are over two models"):
        load_dictionary(put(tmp_path, "model.safetensors", t))


def test_a_threshold_is_not_left_out_of_kissanes_crosscoder(tmp_path):
    t = {"W_enc": random(2, D, N), "W_dec": random(N, 2, D), "b_enc": random(N), "b_dec": random(2, D)}
    for name, threshold in {"threshold": torch.tensor(0.5), "log_threshold": random(N)}.items():
        with pytest.raises(ValueError, match=f"Kissane CrossCoder has no tensor {name}, so it is of another kind"):
            load_dictionary(put(tmp_path, "cc_weights.pt", t | {name: threshold}))


def test_kissanes_crosscoder_and_its_two_scales(tmp_path):
    t = {"W_enc": random(2, D, N), "W_dec": random(N, 2, D), "b_enc": random(N), "b_dec": random(2, D)}
    half = {name: tensor.bfloat16() for name, tensor in t.items()}
    settings = {"dict_size": N, "d_in": D, "hook_point": "blocks.14.hook_resid_pre", "seq_len": 1024}
    folder = put(tmp_path / "blocks.14.hook_resid_pre", "cc_weights.pt", half, settings, "cfg.json").parent
    published = load_dictionary(folder)
    assert (published.origin.dtype, published.origin.site) == ("bfloat16", "blocks.13.hook_resid_post")
    t = {name: tensor.float() for name, tensor in half.items()}
    x = PAIRS * torch.tensor([[3.0], [5.0]])
    with pytest.raises(ValueError, match=r"call measured\(x\)"):
        published.reconstruct(x)
    factor = (D**0.5 / x.norm(dim=-1).mean(0)).view(2, 1)
    z = (torch.einsum("bmd,mdn->bn", x * factor, t["W_enc"]) + t["b_enc"]).relu()
    measured = published.measured(x)
    torch.testing.assert_close(measured.encode(x), z, rtol=1e-5, atol=1e-5)
    x_hat = (torch.einsum("bn,nmd->bmd", z, t["W_dec"]) + t["b_dec"]) / factor
    torch.testing.assert_close(measured.reconstruct(x), x_hat, rtol=1e-5, atol=1e-5)
    assert measured.dictionary is published.dictionary  # norms of the decoder stay as published
