"""OpenAI's and Google DeepMind's files, against what their code computes, written out."""

import pytest
import torch
from published_files import D, N, X, openai, put, random, scope

from helpers.activations.stream import normalise, undo
from helpers.published.load import load_dictionary

TOPK = {"activation": "TopK", "activation_state_dict": {"k": 3, "postact_fn": "ReLU"}}


def layer_norm(x):
    mean = x.mean(-1, keepdim=True)
    std = (x - mean).std(-1, keepdim=True)
    return (x - mean) / (std + 1e-5), mean, std


def latents_of_openai(t, x, k=None):
    z = ((x - t["pre_bias"]) @ t["encoder.weight"].T + t["latent_bias"]).relu()
    return z if k is None else torch.zeros_like(z).scatter(1, z.topk(k).indices, z.topk(k).values)


def test_openais_relu_reads_raw_activations(tmp_path):
    t = openai()
    published = load_dictionary(put(tmp_path / "resid_delta_mlp_v4" / "autoencoders", "3.pt", t))
    z = latents_of_openai(t, X)
    torch.testing.assert_close(published.encode(X), z)
    torch.testing.assert_close(published.reconstruct(X), z @ t["decoder.weight"].T + t["pre_bias"])
    origin = published.origin
    assert (origin.kind, origin.model) == ("OpenAI ReLU", "gpt2-small")
    assert (origin.hook, origin.layer) == ("blocks.3.hook_mlp_out", 3)


@pytest.mark.parametrize("written_by_its_class", [False, True])
def test_openais_topk_reads_layer_normed_activations(tmp_path, written_by_its_class):
    more = {"activation.k": 3, "activation.postact_fn": "ReLU"} if written_by_its_class else {}
    t = openai(**TOPK, **more)
    published = load_dictionary(put(tmp_path / "resid_post_mlp_v5_32k" / "autoencoders", "8.pt", t))
    x, mean, std = layer_norm(X)
    z = latents_of_openai(t, x, 3)
    torch.testing.assert_close(published.encode(X), z, rtol=1e-5, atol=1e-5)
    x_hat = (z @ t["decoder.weight"].T + t["pre_bias"]) * std + mean
    torch.testing.assert_close(published.reconstruct(X), x_hat, rtol=1e-5, atol=1e-5)
    assert published.origin.site == "blocks.8.hook_resid_post" and published.dictionary.activation.k == 3


def test_openais_topk_is_an_autoencoder_of_the_units_activations_of_this_suite(tmp_path):
    published = load_dictionary(put(tmp_path, "a.pt", openai(**TOPK)))
    y, scale = normalise(X)
    torch.testing.assert_close(undo(published.dictionary(y), scale), published.reconstruct(X), rtol=1e-4, atol=1e-4)
    assert published.origin.inputs.mode == "unit" and published.origin.hook is None


@pytest.mark.parametrize("state", [{"k": 3, "postact_fn": "Identity"}, None])
def test_an_activation_that_is_not_ours_is_refused(tmp_path, state):
    more = TOPK | {"activation_state_dict": state} if state else {"activation": "Identity"}
    with pytest.raises(ValueError, match="its activation is .*Identity.*, and ours is ReLU"):
        load_dictionary(put(tmp_path, "a.pt", openai(**more)))


def test_openais_topk_without_k_says_so(tmp_path):
    with pytest.raises(ValueError, match="nor the settings beside it say what activation.k is"):
        load_dictionary(put(tmp_path, "a.pt", openai(activation="TopK")))


@pytest.mark.parametrize(
    ("folder", "name", "case"),
    [
        ("models--google--gemma-scope-2b-it-res/snapshots/0/layer_13/width_0k/average_l0_84", "params.npz", str.upper),
        ("resid_post/layer_13_width_0k_l0_medium", "params.safetensors", str.lower),
    ],
)
def test_gemma_scope_does_not_subtract_the_decoder_bias(tmp_path, folder, name, case):
    t = scope(case)
    settings = {"architecture": "jump_relu", "model_name": "google/gemma-2-2b-it"}
    settings |= {"hf_hook_point_in": "model.layers.13.output"}
    published = load_dictionary(put(tmp_path / folder, name, t, settings).parent)
    w = case("w")
    a = X @ t[f"{w}_enc"] + t["b_enc"]
    z = a.relu() * (a > t["threshold"])
    assert (t["threshold"] < 0).any() and (z > 0).any()
    torch.testing.assert_close(published.encode(X), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(published.reconstruct(X), z @ t[f"{w}_dec"] + t["b_dec"], rtol=1e-5, atol=1e-5)
    origin = published.origin
    assert (origin.hook, origin.model, origin.bos) == ("blocks.13.hook_resid_post", "gemma-2-2b-it", True)


def test_gemma_scope_2_without_settings_is_placed_by_its_folder(tmp_path):
    for inner, hook in {
        "resid_post/layer_9_width_0k_l0_medium": "blocks.9.hook_resid_post",
        "attn_out_all/layer_17_width_0k_l0_big": "blocks.17.attn.hook_z",
        "mlp_out/layer_5_width_0k_l0_small": "blocks.5.hook_mlp_out",
    }.items():
        path = put(tmp_path / inner, "params.safetensors", scope(str.lower))
        assert load_dictionary(path).origin.hook == hook
    transcoder = "transcoder_all/layer_5_width_0k_l0_small"
    with pytest.raises(ValueError, match="it is a transcoder"):
        load_dictionary(put(tmp_path / transcoder, "params.safetensors", scope(str.lower)))
    with pytest.raises(ValueError, match="it is a transcoder"):
        load_dictionary(put(tmp_path / "a", "params.safetensors", scope(str.lower), {"type": "transcoder"}))


def test_gemma_scope_is_an_archive_whatever_the_case_of_its_names(tmp_path):
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_3"
    t = scope(str.lower)
    published = load_dictionary(put(folder, "params.npz", t))
    assert published.origin.kind == "Gemma Scope JumpReLU" and published.origin.hook == "blocks.3.hook_resid_post"
    a = X @ t["w_enc"] + t["b_enc"]
    torch.testing.assert_close(published.encode(X), a.relu() * (a > t["threshold"]), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="one of Gemma Scope's transcoders"):
        load_dictionary(put(tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_3", "params.npz", t))


def test_what_equals_a_threshold_is_off_to_the_last_bit(tmp_path):
    values = torch.linspace(0.1, 9000, N)
    t = scope(threshold=values, W_enc=torch.zeros(D, N), b_enc=values, b_dec=torch.zeros(D))
    published = load_dictionary(put(tmp_path, "params.npz", t))
    assert not published.encode(X).any()
    t["b_enc"] = torch.nextafter(values, torch.tensor(1e9))
    assert load_dictionary(put(tmp_path, "params.npz", t)).encode(X).all()


def test_a_width_or_a_layer_that_the_name_denies_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has width '0k', and what is said of it .* is '16k'"):
        load_dictionary(put(tmp_path / "layer_3" / "width_16k", "params.npz", scope()))
    settings = {"hf_hook_point_in": "model.layers.9.output"}
    with pytest.raises(ValueError, match="has layer '9', and what is said of it .* is '12'"):
        load_dictionary(put(tmp_path / "layer_12_width_0k", "params.safetensors", scope(str.lower), settings))


def test_what_is_no_autoencoder_of_one_place_is_refused(tmp_path):
    for folder in ("gemma-scope-2b-pt-transcoders/layer_3", "gemma-scope-2b-pt-res/embedding", "embedding/width_0k"):
        with pytest.raises(ValueError, match="it is one of Gemma Scope's (transcoder|embedding)s"):
            load_dictionary(put(tmp_path / folder, "params.npz", scope()))
    skip = scope(str.lower, affine_skip_connection=random(D, D))
    with pytest.raises(ValueError, match="it is a transcoder"):
        load_dictionary(put(tmp_path / "a", "params.safetensors", skip))
    layers = scope(str.lower, w_dec=random(N, 3, D))
    with pytest.raises(ValueError, match="several layers of one model"):
        load_dictionary(put(tmp_path / "b", "params.safetensors", layers))
