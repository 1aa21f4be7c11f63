"""Files that are damaged, foreign or dangerous: one sentence each, and no code is run."""

import json
import os
import re

import numpy as np
import pytest
import torch
from published_files import D, N, lens, openai, pair, put, random, scope
from safetensors.torch import save_file

from helpers.published.files import Files, weights_file
from helpers.published.load import load_dictionary

CONFIG = {"d_in": D, "d_sae": N, "architecture": "standard"}


def refused(path, message, error=ValueError):
    with pytest.raises(error, match=message) as caught:
        load_dictionary(path)
    assert "\n" not in str(caught.value)


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_code_in_a_pickle_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in {"a.pt": openai() | {"extra": Harmful()}, "b.pt": Harmful()}.items():
        torch.save(content, tmp_path / name)
        refused(tmp_path / name, f"{name} is damaged, or holds more than tensors .* code in a file is never run")
    np.savez(tmp_path / "params.npz", W_enc=np.array([Harmful()], dtype=object))
    refused(tmp_path / "params.npz", "cannot be read")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("name", "tensors"), [("sae_weights.safetensors", lens()), ("params.npz", scope()), ("ae.pt", openai())]
)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95])
def test_half_a_file_is_refused(tmp_path, name, tensors, share):
    path = put(tmp_path, name, tensors, CONFIG, "cfg.json")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refused(path, "perhaps only half was written|is damaged|is empty")


@pytest.mark.parametrize("name", ["ae.pt", "params.npz", "sae_weights.safetensors"])
def test_bytes_of_something_else_are_refused(tmp_path, name):
    path, others = tmp_path / name, [b"<!DOCTYPE html><title>404</title>", b"PK\x03\x04"]
    for content in [*others, *(np.random.default_rng(seed).bytes(200) for seed in range(100))]:
        path.write_bytes(content)
        refused(path, "cannot be read|is damaged|is no archive of arrays")
    path.write_bytes(b"")
    refused(path, f"{name} is empty: fetch it again")


def test_half_the_settings_are_refused(tmp_path):
    path = put(tmp_path, "sae_weights.safetensors", lens())
    for text, message in {
        '{"d_in": 6, "d_s': "perhaps only half was written",
        "[1]": "holds a list where settings",
    }.items():
        (tmp_path / "cfg.json").write_text(text)
        refused(path, message)


FLAGS = ["apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "finetuning_scaling_factor"]
MORE = {"k": torch.tensor(2)}
ADAM = {"encoder.weight": random(N, D), "decoder.weight": random(D, N), "encoder.bias": random(N), "b_dec": random(D)}
COMPUTED_WITH = [  # layout, settings that are computed with, what they have to be
    *(
        (lens(**MORE, scaling_factor=torch.ones(N)), CONFIG | {"architecture": "topk"}, flag, "true or false")
        for flag in FLAGS
    ),
    *((lens(**MORE), CONFIG, group, "a dictionary") for group in ("metadata", "activation_fn_kwargs")),
    *((ADAM | MORE, {"dict_class": "AutoEncoderTopK"}, group, "a dictionary") for group in ("trainer", "buffer")),
    (ADAM | MORE, {}, "dict_class", "a text"),
    (pair(), {}, "trainer", "a dictionary"),
    *(
        ({"encoder.weight": random(N, D), "W_dec": random(N, D)}, {}, flag, "true or false")
        for flag in ("transcode", "signed")
    ),
]


@pytest.mark.parametrize(("tensors", "settings", "name", "expected"), COMPUTED_WITH)
@pytest.mark.parametrize("value", [3, [1]])
def test_a_setting_of_another_kind_is_refused_and_not_guessed_at(tmp_path, tensors, settings, name, expected, value):
    path = put(tmp_path, "model.safetensors", tensors, settings | {name: value})
    refused(path, rf"{name} of .* is said to be {re.escape(repr(value))}, where {expected} is expected")


def test_what_openai_says_of_the_activation_is_checked_as_well(tmp_path):
    for name, expected in {"activation": "a text", "activation_state_dict": "a dictionary"}.items():
        refused(put(tmp_path, "8.pt", openai(**{name: [3]})), rf"{name} of .* is said to be \[3\], where {expected}")


@pytest.mark.parametrize(
    ("tensors", "settings", "names"),
    [
        (lens(), CONFIG, ["model_name", "hook_name", "context_size", "prepend_bos"]),
        (ADAM | MORE, {}, ["lm_name", "layer", "submodule_name"]),
        (pair(), {}, ["lm_name", "layer"]),
        (scope(str.lower), {}, ["model_name", "hf_hook_point_in"]),
    ],
)
def test_a_place_of_another_kind_is_shown_as_it_is(tmp_path, tensors, settings, names):
    for value in (3, [1], "8", True):
        path = put(tmp_path, "model.safetensors", tensors, settings | dict.fromkeys(names, value))
        assert str(value) in str(load_dictionary(path))


def test_a_pointer_of_git_lfs_is_not_the_file(tmp_path):
    (tmp_path / "ae.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    refused(tmp_path, "is a pointer of Git LFS .* `git lfs pull`")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"W_enc": random(N, D)}, r"W_enc in .* has shape \(10, 6\), the other tensors ask for \(6, 10\)"),
        ({"b_dec": random(D + 1)}, r"b_dec in .* has shape \(7,\), the other tensors ask for \(6,\)"),
        ({"b_enc": torch.full((N,), torch.nan)}, "b_enc in .* NaN or infinite"),
        ({"W_dec": torch.full((N, D), torch.inf)}, "W_dec in .* NaN or infinite"),
        ({"W_dec": torch.ones(N, D, dtype=torch.int8)}, "W_dec in .* is torch.int8: weights must be floats"),
        ({"W_dec": random(N)}, r"W_dec in .* has shape \(10,\), expected 2 axes"),
        ({"W_dec": torch.ones(0, D)}, r"W_dec in .* has shape \(0, 6\), expected 2 axes, none empty"),
    ],
)
def test_tensors_are_checked(tmp_path, more, message):
    refused(put(tmp_path, "sae_weights.safetensors", lens(**more), CONFIG, "cfg.json"), message)


def test_a_missing_tensor_is_named_among_those_that_are_there(tmp_path):
    tensors = lens()
    del tensors["b_dec"]
    path = put(tmp_path, "sae_weights.safetensors", tensors, CONFIG, "cfg.json")
    refused(path, "has no tensor b_dec, only W_dec, W_enc, b_enc")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_is_read_in_float32_and_its_dtype_is_known(tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in lens().items()}
    published = load_dictionary(put(tmp_path, "sae_weights.safetensors", tensors, CONFIG, "cfg.json"))
    assert published.origin.dtype == str(dtype).removeprefix("torch.")
    assert published.dictionary.W_dec.dtype == torch.float32
    assert torch.equal(published.dictionary.W_dec, tensors["W_dec"].float())


def test_what_is_no_state_dict_is_refused(tmp_path):
    torch.save([torch.ones(3)], tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "holds a list and no named tensors: pass a saved state_dict")


def test_tensors_without_dense_values_are_refused(tmp_path):
    for odd in (random(N, D).to_sparse(), torch.empty(N, D, device="meta"), [[1.0]]):
        path = put(tmp_path, "ae.pt", openai(**{"encoder.weight": odd}))
        refused(path, "encoder.weight in .* is no dense tensor with values: save it as one")


def test_a_checkpoint_around_the_state_dict_is_refused(tmp_path):
    for content in ({"state_dict": openai(), "step": 3}, {}):
        path = put(tmp_path, "ae.pt", content)
        refused(path, f"holds no tensors by name, only {', '.join(content) or 'none'}: pass a saved state_dict alone")


@pytest.mark.parametrize("before", ["_orig_mod.", "module."])
def test_what_torch_puts_before_names_is_dropped(tmp_path, before):
    path = put(tmp_path, "ae.pt", {before + name: tensor for name, tensor in openai().items()})
    assert torch.equal(load_dictionary(path).dictionary.W_enc, openai()["encoder.weight"])


def test_arrays_of_another_machine_are_read(tmp_path):
    np.savez(tmp_path / "params.npz", **{name: tensor.numpy().astype(">f4") for name, tensor in scope().items()})
    assert torch.equal(load_dictionary(tmp_path).dictionary.W_dec, scope()["W_dec"])


@pytest.mark.parametrize(("k", "threshold"), [(2.5, None), (0, None), (-3, None), (0, 1.0), (-3, 1.0)])
def test_a_k_that_keeps_nothing_or_no_whole_number_is_refused(tmp_path, k, threshold):
    more = {"k": torch.tensor(k)} | ({} if threshold is None else {"threshold": torch.tensor(threshold)})
    kind = "AutoEncoderTopK" if threshold is None else "BatchTopKSAE"
    refused(put(tmp_path, "ae.pt", ADAM | more, {"dict_class": kind}), f"k = {k} (of a TopK is no|keeps nothing)")


@pytest.mark.parametrize(
    ("tensors", "shape"), [(ADAM | {"k": torch.tensor(2), "threshold": torch.tensor(1.0)}, ()), (pair(), (2,))]
)
def test_how_activations_were_scaled_is_checked(tmp_path, tensors, shape):
    def scaled(mean, scale):
        more = {
            "activation_mean": torch.full((*shape, D), 1.0) * mean,
            "activation_global_scale": torch.full(shape, scale),
        }
        return put(tmp_path, "model.safetensors", tensors | more, {"dict_class": "BatchTopKSAE"})

    for scale in (0.0, -1.0):
        refused(scaled(torch.ones(D), scale), "its activations are to be scaled by")
    refused(scaled(torch.tensor([torch.nan] + [1.0] * (D - 1)), 1.0), "activation_mean in .* NaN or infinite")
    load_dictionary(scaled(torch.full((D,), torch.nan), torch.nan))  # none were


@pytest.mark.parametrize("form", ["{}/", "{}/sae_weights.safetensors", "{}/./", "{}/../{}"])
def test_a_place_may_be_written_in_many_ways(tmp_path, monkeypatch, form):
    put(tmp_path / "mine", "sae_weights.safetensors", lens(), CONFIG, "cfg.json")
    monkeypatch.chdir(tmp_path)
    for folder in ("mine", str(tmp_path / "mine")):
        load_dictionary(form.format(folder, "mine"))
    monkeypatch.chdir("mine")
    load_dictionary(".")


@pytest.mark.parametrize(
    "source", ["", " ", "./a", "a\0b", "a\nb", "~nobody-has-this-name/a", "https://a.b/c", "a" * 5000]
)
def test_what_is_no_place_is_one_sentence(source):
    refused(source, "there is no dictionary at '.*': give a file, a folder", FileNotFoundError)


def test_folders_and_links_to_nowhere_are_no_weights(tmp_path):
    (tmp_path / "ae.pt").mkdir()
    (tmp_path / "b.pt").symlink_to("nowhere")
    refused(tmp_path, "holds no weights, .* fetch it again", FileNotFoundError)


def test_two_dictionaries_in_a_folder_have_to_be_named_and_each_has_its_settings(tmp_path):
    put(tmp_path, "sae_weights.safetensors", lens(), CONFIG, "cfg.json")
    put(tmp_path, "ae.pt", ADAM | MORE, {"dict_class": "AutoEncoderTopK"})
    refused(tmp_path, "holds 2 files of weights: name one of them, such as sae_weights.safetensors, ae.pt")
    assert load_dictionary(tmp_path / "sae_weights.safetensors").origin.kind == "SAELens standard"
    assert load_dictionary(tmp_path / "ae.pt").origin.kind == "dictionary_learning AutoEncoderTopK"


def test_weights_are_found_beside_statistics_and_checkpoints(tmp_path):
    settings = {"d_in": D, "d_sae": N, "architecture": "standard"}
    put(tmp_path, "sae_weights.safetensors", lens(), settings, "cfg.json")
    save_file({"sparsity": torch.ones(N)}, tmp_path / "sparsity.safetensors")
    assert weights_file(tmp_path).name == "sae_weights.safetensors"
    (tmp_path / "sae_weights.safetensors").rename(tmp_path / "other.safetensors")
    refused(tmp_path, "holds 2 files of weights: name one of them, such as other.safetensors, sparsity.safetensors")


def test_a_folder_of_folders_says_which_there_are(tmp_path):
    put(tmp_path / "layers" / "3", "ae.pt", openai())
    refused(tmp_path, "holds no weights, .* name one of its folders, such as layers/3", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no weights, .* fetch it again", FileNotFoundError)
    (tmp_path / "notes.txt").write_text("")
    refused(tmp_path / "notes.txt", "is no file of weights: these end in .safetensors, .npz, .pt")


def test_the_settings_of_a_numbered_file_are_its_own(tmp_path):
    path = put(tmp_path, "3.pt", openai(), {"mine": True}, "3_cfg.json")
    (tmp_path / "cfg.json").write_text(json.dumps({"mine": False}))
    assert Files(path, "here").settings == {"mine": True}
