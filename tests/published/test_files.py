"""Files that are damaged, foreign or dangerous: one sentence each, and no code is run."""

import json
import os

import numpy as np
import pytest
import torch
from published_files import D, N, lens, openai, put, random, scope
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
    refused(path, "cannot be read, perhaps only half was written|is damaged")


def test_half_the_settings_are_refused(tmp_path):
    path = put(tmp_path, "sae_weights.safetensors", lens())
    for text, message in {
        '{"d_in": 6, "d_s': "perhaps only half was written",
        "[1]": "holds a list where settings",
    }.items():
        (tmp_path / "cfg.json").write_text(text)
        refused(path, message)


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
