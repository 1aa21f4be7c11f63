"""What SAELens, sparsify and dictionary_learning write, against what their code computes, written out.

Their own files are read in tests/interop; here are the switches and the traps, one by one.
"""

import itertools

import pytest
import torch
from published_files import D, N, X, lens, put, random

from helpers.published.load import load_dictionary

CONFIG = {"d_in": D, "d_sae": N, "architecture": "standard", "apply_b_dec_to_input": True}
PLACE = {"model_name": "gpt2-small", "hook_name": "blocks.7.hook_resid_pre", "context_size": 64, "prepend_bos": False}


def put_lens(folder, tensors, settings):
    return put(folder, "sae_weights.safetensors", tensors, CONFIG | settings, "cfg.json").parent


def top_k(a, k):
    return torch.zeros_like(a).scatter(-1, a.topk(k).indices, a.relu().topk(k).values)


def latents_of_sae_lens(t, x, s):
    """As the library computes them in evaluation, switch by switch."""
    a = (x - t["b_dec"] * s.get("apply_b_dec_to_input", True)) @ t["W_enc"]
    norms = t["W_dec"].norm(dim=1) if s.get("rescale_acts_by_decoder_norm") else 1
    match s["architecture"]:
        case "standard":
            return (a + t["b_enc"]).relu()
        case "topk":
            return top_k((a + t["b_enc"]) * norms, s["k"])
        case "batchtopk":
            a = (a + t["b_enc"]) * norms
            return a.relu() * (a > t["topk_threshold"])
        case "jumprelu":
            return (a + t["b_enc"]).relu() * (a + t["b_enc"] > t["threshold"])
    return (a + t["b_gate"] > 0) * (a * t["r_mag"].exp() + t["b_mag"]).relu()


ARCHITECTURES = {
    "standard": ({}, {}),
    "topk": ({"k": 3}, {}),
    "batchtopk": ({"k": 2.5}, {"topk_threshold": torch.tensor(1.5, dtype=torch.float64)}),
    "jumprelu": ({}, {"threshold": random(N, seed=3)}),
    "gated": ({}, {"b_gate": random(N, seed=4), "b_mag": random(N, seed=5), "r_mag": random(N, seed=6)}),
}


@pytest.mark.parametrize(("name", "centred", "rescale"), itertools.product(ARCHITECTURES, [True, False], [True, False]))
def test_each_architecture_of_sae_lens(tmp_path, name, centred, rescale):
    settings, more = ARCHITECTURES[name]
    s = settings | {"architecture": name, "apply_b_dec_to_input": centred, "metadata": PLACE}
    s |= {"rescale_acts_by_decoder_norm": rescale} if "topk" in name else {}
    t = lens(**more)
    if name == "gated":
        del t["b_enc"]
    published = load_dictionary(put_lens(tmp_path, t, s))
    z = latents_of_sae_lens(t, X, s)
    torch.testing.assert_close(published.encode(X), z, rtol=1e-5, atol=1e-5)
    norms = t["W_dec"].norm(dim=1) if rescale and "topk" in name else 1
    torch.testing.assert_close(published.reconstruct(X), z / norms @ t["W_dec"] + t["b_dec"], rtol=1e-5, atol=1e-5)
    origin = published.origin
    assert (origin.kind, origin.hook, origin.site) == (
        f"SAELens {name}",
        PLACE["hook_name"],
        "blocks.6.hook_resid_post",
    )
    assert (origin.model, origin.context, origin.bos, origin.layer) == ("gpt2-small", 64, False, 6)


def test_earlier_versions_of_sae_lens_use_other_names(tmp_path):
    old = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}, "hook_point": "blocks.3.hook_mlp_out"}
    settings = old | {"architecture": "standard", "normalize_activations": None}
    published = load_dictionary(put_lens(tmp_path, lens(), settings))
    z = latents_of_sae_lens(lens(), X, {"architecture": "topk", "k": 3})
    torch.testing.assert_close(published.encode(X), z, rtol=1e-5, atol=1e-5)
    assert published.origin.hook == "blocks.3.hook_mlp_out"


def test_what_was_trained_on_a_processed_model_says_so(tmp_path):
    def caution(**settings):
        return load_dictionary(put_lens(tmp_path, lens(), settings)).origin.caution

    for settings in (
        {"hook_point": "blocks.8.hook_resid_pre"},  # jbloom/GPT2-Small-SAEs-Reformatted
        {"hook_name": "blocks.8.hook_resid_pre", "sae_lens_training_version": "3.13.0"},
        {"metadata": {"model_from_pretrained_kwargs": {"center_writing_weights": True}}},
    ):
        assert "lack their mean over the coordinates" in caution(**settings)
        assert caution(**settings, normalize_activations="layer_norm") == ""
    assert caution(metadata={"model_from_pretrained_kwargs": {"center_writing_weights": False}}) == ""
    assert caution(hook_name="blocks.8.hook_resid_pre", sae_lens_training_version="5.10.5") == ""


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("model.layers.12", "blocks.12.hook_resid_post"),
        ("transformer.h.12", "blocks.12.hook_resid_post"),
        ("model.layers.12.mlp", "model.layers.12.mlp"),
    ],
)
def test_a_block_may_be_named_as_transformers_names_it(tmp_path, name, site):
    published = load_dictionary(put_lens(tmp_path, lens(), {"metadata": {"hook_name": name}}))
    assert published.origin.site == site and published.origin.layer == 12


@pytest.mark.parametrize("mode", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("centred", [True, False])
def test_activations_that_sae_lens_normalises_while_it_runs(tmp_path, mode, centred):
    s = {"architecture": "standard", "apply_b_dec_to_input": centred, "normalize_activations": mode}
    published = load_dictionary(put_lens(tmp_path, lens(), s))
    if mode == "layer_norm":
        mean, std = X.mean(-1, keepdim=True), X.std(-1, keepdim=True)
        x, back = (X - mean) / (std + 1e-5), lambda y: y * std + mean
    else:
        factor = D**0.5 / X.norm(dim=-1, keepdim=True)
        x, back = X * factor, lambda y: y / factor
    z = latents_of_sae_lens(lens(), x, s)
    torch.testing.assert_close(published.encode(X), z, rtol=1e-5, atol=1e-5)
    x_hat = back(z @ lens()["W_dec"] + lens()["b_dec"])
    torch.testing.assert_close(published.reconstruct(X), x_hat, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", ["expected_average_only_in", True])
def test_a_scale_that_the_files_do_not_hold_is_measured(tmp_path, value):
    s = {"architecture": "jumprelu", "normalize_activations": value}
    t = lens(threshold=random(N, seed=3))
    published = load_dictionary(put_lens(tmp_path, t, s))
    with pytest.raises(ValueError, match=r"mean length sqrt\(d_model\).*call measured\(x\)"):
        published.encode(X)
    factor = D**0.5 / X.norm(dim=1).mean()
    z = latents_of_sae_lens(t, X * factor, s)
    measured = published.measured(X)
    torch.testing.assert_close(measured.encode(X), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(measured.dictionary(X), (z @ t["W_dec"] + t["b_dec"]) / factor, rtol=1e-5, atol=1e-5)
    assert measured.measured(X) is measured and measured.origin.inputs.mode == "none"
    assert "measured" in str(published) and "measured" not in str(measured)


def test_the_scale_that_lies_beside_a_checkpoint_is_folded(tmp_path):
    s = {"architecture": "jumprelu", "normalize_activations": "expected_average_only_in"}
    t = lens(threshold=random(N, seed=3))
    folder = put_lens(tmp_path, t, s)
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.3, "has_whitening": false}')
    published = load_dictionary(folder)
    z = latents_of_sae_lens(t, 0.3 * X, s)
    torch.testing.assert_close(published.encode(X), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(published.reconstruct(X), (z @ t["W_dec"] + t["b_dec"]) / 0.3, rtol=1e-5, atol=1e-5)
    for scale, message in {"0": "are to be scaled by 0", '"a"': "say what activation_scaler.json is"}.items():
        (folder / "activation_scaler.json").write_text(f'{{"scaling_factor": {scale}}}')
        with pytest.raises(ValueError, match=message):
            load_dictionary(folder)
    (folder / "activation_scaler.json").write_text('{"scaling_factor": null}')
    assert load_dictionary(folder).origin.inputs.mode == "mean norm"


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ({"b_dec_out": random(D)}, {}, "SAELens standard has no tensor b_dec_out, so it is of another kind"),
        ({"W_skip": random(D, D)}, {}, "SAELens standard has no tensor W_skip"),
        ({"threshold": random(N)}, {}, "SAELens standard has no tensor threshold"),
        ({}, {"metadata": PLACE | {"hook_name_out": "blocks.7.hook_mlp_out"}}, "it is a transcoder, which writes"),
        ({}, PLACE | {"hook_name_out": "blocks.7.hook_mlp_out"}, "it is a transcoder, which writes"),
    ],
)
def test_what_computes_something_else_is_no_autoencoder_of_sae_lens(tmp_path, tensors, settings, message):
    with pytest.raises(ValueError, match=message):
        load_dictionary(put_lens(tmp_path, lens(**tensors), settings))
    load_dictionary(put_lens(tmp_path, lens(), {"metadata": PLACE | {"hook_name_out": PLACE["hook_name"]}}))


@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
def test_a_fine_tuned_scaling_factor_acts_on_the_reconstruction_alone(tmp_path, name):
    factor = random(N, seed=9).exp()
    t, s = lens(**{name: factor}), {"finetuning_scaling_factor": True}
    published = load_dictionary(put_lens(tmp_path, t, s))
    z = latents_of_sae_lens(t, X, CONFIG)
    torch.testing.assert_close(published.encode(X), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(published.reconstruct(X), z * factor @ t["W_dec"] + t["b_dec"], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=f"a {name} that its settings do not speak of"):
        load_dictionary(put_lens(tmp_path, t, {}))
    load_dictionary(put_lens(tmp_path, lens(**{name: torch.ones(N)}), {}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "transcoder"}, "its architecture is transcoder with its own activation, and ours"),
        ({"activation_fn": "tanh-relu"}, "its architecture is standard with tanh-relu"),
        ({"normalize_activations": "covariance_whitening"}, "prepared by covariance_whitening"),
        ({"d_sae": N + 1}, f"has d_sae {N}, and what is said of it .* is {N + 1}"),
        ({"architecture": "topk"}, "nor the settings beside it say what k is"),
        ({"architecture": "topk", "k": N + 1}, "is more than the 10 latents"),
        ({"architecture": "jumprelu"}, "has no tensor threshold, only"),
    ],
)
def test_what_sae_lens_has_and_we_cannot_read_is_one_sentence(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_dictionary(put_lens(tmp_path, lens(), settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "more", "caution"),
    [
        ({"hook_name": "blocks.2.attn.hook_z"}, {"reshape_activations": "hook_z"}, "all heads side by side"),
        ({"hook_name": "blocks.2.attn.hook_z"}, {}, "all heads side by side"),
        ({"hook_name": "blocks.2.attn.hook_q", "hook_head_index": 0}, {"reshape_activations": "none"}, "head 0 alone"),
        ({}, {"hook_point": "blocks.2.attn.hook_q", "hook_point_head_index": 0}, "head 0 alone"),
        ({"hook_name": "blocks.2.hook_resid_post"}, {"reshape_activations": "none"}, ""),
    ],
)
def test_what_reads_inside_attention_says_so(tmp_path, metadata, more, caution):
    published = load_dictionary(put_lens(tmp_path, lens(), {"metadata": metadata, **more}))
    assert caution in published.origin.caution and bool(caution) == bool(published.origin.caution)
    assert caution in str(published)


def test_sparsify(tmp_path):
    t = {"encoder.weight": random(N, D), "W_dec": random(N, D), "encoder.bias": random(N), "b_dec": random(D)}
    settings = {"d_in": D, "k": 3, "num_latents": 0, "expansion_factor": 32, "activation": "topk"}
    published = load_dictionary(put(tmp_path / "layers.5", "sae.safetensors", t, settings, "cfg.json").parent)
    z = top_k((X - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"], 3)
    torch.testing.assert_close(published.encode(X), z, rtol=1e-5, atol=1e-5)
    assert published.origin.site == "blocks.5.hook_resid_post"
    for inner, hook in {"h.5": "blocks.5.hook_resid_post", "model.layers.5": "blocks.5.hook_resid_post"}.items():
        found = load_dictionary(put(tmp_path / inner, "sae.safetensors", t, settings, "cfg.json").parent)
        assert found.origin.site == hook
    found = load_dictionary(put(tmp_path / "layers.5.mlp", "sae.safetensors", t, settings, "cfg.json").parent)
    assert found.origin.site == "layers.5.mlp" and found.origin.layer == 5
    for wrong in ({"transcode": True}, {"activation": "groupmax"}):
        put(tmp_path / "layers.5", "sae.safetensors", t, settings | wrong, "cfg.json")
        with pytest.raises(ValueError, match="transcoder|is not TopK"):
            load_dictionary(tmp_path / "layers.5")


def linear(**more):
    return {"encoder.weight": random(N, D), "encoder.bias": random(N), "decoder.weight": random(D, N)} | more


def trainer(name, **more):
    about = {"dict_class": name, "activation_dim": D, "dict_size": N, "layer": 12, "lm_name": "gemma"}
    return {"trainer": about | more, "buffer": {"ctx_len": 128}}


K, THRESHOLD = torch.tensor(3, dtype=torch.int), torch.tensor(1.5)


def test_topk_and_batchtopk_have_the_same_tensors_and_the_class_decides(tmp_path):
    t = linear(b_dec=random(D), k=K, threshold=THRESHOLD)
    a = (X - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]
    expected = {"AutoEncoderTopK": top_k(a, 3), "BatchTopKSAE": a.relu() * (a > 1.5)}
    for name, z in expected.items():
        published = load_dictionary(put(tmp_path / name, "ae.pt", t, trainer(name)).parent)
        torch.testing.assert_close(published.encode(X), z, rtol=1e-5, atol=1e-5)
        assert published.origin.kind == f"dictionary_learning {name}" and published.origin.context == 128
        assert published.origin.hook == "blocks.12.hook_resid_post"
    with pytest.raises(ValueError, match="is an AutoEncoderTopK or a BatchTopKSAE, .* put its config.json beside it"):
        load_dictionary(put(tmp_path, "ae.pt", t))


def test_what_the_fork_publishes_on_the_hub_names_no_class(tmp_path):
    """model.safetensors, and of the constructor's arguments what is JSON."""
    t, sizes = linear(b_dec=random(D), k=K, threshold=THRESHOLD), {"activation_dim": D, "dict_size": N}
    published = load_dictionary(put(tmp_path / "a", "model.safetensors", t, sizes | {"k": 3}).parent)
    a = (X - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]
    torch.testing.assert_close(published.encode(X), a.relu() * (a > 1.5), rtol=1e-5, atol=1e-5)
    assert "dictionary_learning BatchTopKSAE" in str(published) and "its class is not said" in str(published)
    put(tmp_path / "b", "model.safetensors", lens(threshold=random(N, seed=3)), sizes)
    assert load_dictionary(tmp_path / "b").origin.kind == "dictionary_learning JumpReluAutoEncoder"


LLAMA_SCOPE = {
    "sae_type": "sae",
    "act_fn": "jumprelu",
    "d_model": D,
    "expansion_factor": 2,
    "norm_activation": "inference",
}


def test_what_scales_and_thresholds_under_the_names_of_autoencoder_new_is_not_taken_for_it(tmp_path):
    """Llama Scope: its settings lie in a folder above, or beside the file and give no class."""
    t = linear(**{"decoder.bias": random(D, seed=1)})
    for settings in (None, LLAMA_SCOPE):
        with pytest.raises(ValueError, match="is an AutoEncoderNew, or of Llama Scope, .* put its config.json beside"):
            load_dictionary(put(tmp_path / "checkpoints", "final.safetensors", t, settings))
    distilled = t | {"log_jumprelu_threshold": random(N)}
    with pytest.raises(ValueError, match="is an AutoEncoderNew, or of Llama Scope"):
        load_dictionary(put(tmp_path / "L5R", "sae_weights.safetensors", distilled, LLAMA_SCOPE))
    with pytest.raises(ValueError, match="AutoEncoderNew has no tensor log_jumprelu_threshold, so it is of another"):
        load_dictionary(put(tmp_path / "said", "ae.pt", distilled, {"dict_class": "AutoEncoderNew"}))
    z = (X @ t["encoder.weight"].T + t["encoder.bias"]).relu()
    for settings, unsaid in ((trainer("AutoEncoderNew"), False), ({"activation_dim": D, "dict_size": N}, True)):
        published = load_dictionary(put(tmp_path / str(unsaid), "ae.pt", t, settings))
        torch.testing.assert_close(published.encode(X), z, rtol=1e-5, atol=1e-5)
        x_hat = z @ t["decoder.weight"].T + t["decoder.bias"]
        torch.testing.assert_close(published.reconstruct(X), x_hat, rtol=1e-5, atol=1e-5)
        assert ("its class is not said" in str(published)) is unsaid


def test_qwen_scope_has_d_sae_in_its_settings_and_is_not_of_sae_lens(tmp_path):
    """W_enc (n, d) and W_dec (d, n), the other way round."""
    t = {"W_enc": random(N, D), "W_dec": random(D, N), "b_enc": random(N), "b_dec": random(D)}
    settings = {"model_type": "topk_sae", "d_model": D, "d_sae": N, "k": 3, "hook_point": "resid_post"}
    with pytest.raises(ValueError, match="W_enc, W_dec, b_enc, b_dec is in no layout known here"):
        load_dictionary(put(tmp_path, "layer5.sae.pt", t, settings))


def test_a_scale_that_a_class_does_not_know_of_is_not_left_out(tmp_path):
    t = linear(bias=random(D), activation_mean=random(D), activation_global_scale=torch.tensor(2.0))
    with pytest.raises(ValueError, match="dictionary_learning AutoEncoder has no tensor activation_mean"):
        load_dictionary(put(tmp_path, "ae.pt", t, trainer("AutoEncoder")))


def test_topk_from_before_there_was_a_threshold(tmp_path):
    t = linear(b_dec=random(D))
    published = load_dictionary(put(tmp_path, "ae.pt", t, trainer("AutoEncoderTopK", k=3)))
    a = (X - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]
    torch.testing.assert_close(published.encode(X), top_k(a, 3), rtol=1e-5, atol=1e-5)


def test_a_threshold_that_was_never_set_keeps_every_positive_latent_and_says_so(tmp_path):
    t = linear(b_dec=random(D), k=K, threshold=torch.tensor(-1.0))
    published = load_dictionary(put(tmp_path, "ae.pt", t, trainer("BatchTopKSAE")))
    a = (X - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]
    torch.testing.assert_close(published.encode(X), a.relu(), rtol=1e-5, atol=1e-5)
    assert "never set" in str(published)


@pytest.mark.parametrize("rms", [100.0, 1e-3])  # one so small that what is added to the scale on the way back shows
def test_activations_that_the_fork_scaled_are_folded_into_raw_ones(tmp_path, rms):
    mean, std = random(D, seed=5), random(D, seed=6).exp()
    factor = rms / std.square().sum().sqrt()
    scaling = {"target_rms": torch.tensor(rms), "activation_mean": mean, "activation_std": std}
    t = linear(b_dec=random(D), k=K, threshold=THRESHOLD, activation_global_scale=factor, **scaling)
    published = load_dictionary(put(tmp_path, "model.safetensors", t))
    a = ((X - mean) * factor - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]
    z = a.relu() * (a > 1.5)
    torch.testing.assert_close(published.encode(X), z, rtol=1e-5, atol=1e-4)
    x_hat = (z @ t["decoder.weight"].T + t["b_dec"]) / (factor + 1e-8) + mean
    torch.testing.assert_close(published.dictionary(X), x_hat, rtol=1e-5, atol=1e-5 * x_hat.abs().max().item())
    t |= {"activation_mean": mean * torch.nan}
    a = (X - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]
    unscaled = load_dictionary(put(tmp_path, "model.safetensors", t))
    torch.testing.assert_close(unscaled.encode(X), a.relu() * (a > 1.5), rtol=1e-5, atol=1e-5)


def test_jump_relu_of_dictionary_learning_does_not_subtract_the_bias(tmp_path):
    t = lens(threshold=random(N, seed=3))
    a = X @ t["W_enc"] + t["b_enc"]
    for settings in (trainer("JumpReluAutoEncoder"), None):
        published = load_dictionary(put(tmp_path / str(bool(settings)), "ae.pt", t, settings))
        torch.testing.assert_close(published.encode(X), a.relu() * (a > t["threshold"]), rtol=1e-5, atol=1e-5)
    settings = trainer("JumpReluAutoEncoder", apply_b_dec_to_input=True)  # as it does what it took over from SAELens
    a = (X - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    published = load_dictionary(put(tmp_path / "centred", "ae.pt", t, settings))
    torch.testing.assert_close(published.encode(X), a.relu() * (a > t["threshold"]), rtol=1e-5, atol=1e-5)


def test_an_unknown_class_is_named(tmp_path):
    with pytest.raises(ValueError, match="its class is IdentityDict, and those known are AutoEncoder, "):
        load_dictionary(put(tmp_path, "ae.pt", linear(), trainer("IdentityDict")))
