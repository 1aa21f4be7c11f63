"""The layout is found by itself; an id goes through the hub's cache; what does not fit the subject is refused."""

from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import utils
from published_files import D, N, X, lens, pair, put, random, scope
from twins import put_into_cache

from helpers.published import load
from helpers.published.load import load_dictionary

PLACE = "resid_post/layer_9_width_0k_l0_medium"
SETTINGS = {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.9.output"}


@pytest.fixture
def cached(hub_cache, tmp_path):
    put(tmp_path / "repository" / PLACE, "params.safetensors", scope(str.lower), SETTINGS)
    put_into_cache(hub_cache, "google/gemma-scope-2-270m-pt", tmp_path / "repository")


def test_an_id_is_a_repository_and_a_place_in_it(cached, tmp_path):
    for inner in (PLACE, f"{PLACE}/params.safetensors"):
        published = load_dictionary(f"google/gemma-scope-2-270m-pt/{inner}")
        assert torch.equal(published.encode(X), load_dictionary(tmp_path / "repository" / PLACE).encode(X))
        assert published.origin.source == f"google/gemma-scope-2-270m-pt/{inner}"


def test_what_is_not_cached_is_one_sentence_offline(cached):
    for source in ("google/gemma-scope-2-270m-pt/resid_post/layer_5", "google/other/resid_post"):
        with pytest.raises(ConnectionError, match=r"HF_HUB_OFFLINE is set.*or give a folder or a file") as caught:
            load_dictionary(source)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("inner", "fetched"),
    [
        ("", ["cfg.json", "ae.pt"]),
        ("a", ["a/config.json", "a/params.npz"]),
        ("a/params.npz", ["a/config.json", "a/params.npz"]),
        ("a/b", ["a/b/model.safetensors"]),
    ],
)
def test_only_the_files_of_one_folder_are_fetched(inner, fetched):
    there = ["cfg.json", "ae.pt", "README.md", "a/config.json", "a/params.npz", "a/b/model.safetensors", "ab/x.npz"]
    there += ["examples.safetensors", "a/examples.safetensors"]  # of Gemma Scope 2, larger than the weights
    assert list(utils.filter_repo_objects(there, **load._patterns(inner))) == fetched


@pytest.mark.parametrize("inner", ["sae_group_gpt2_blocks.0.hook_mlp_out_24576:v2", "L0_lr1.2e-03_l11.8e+00_v9.pt"])
def test_an_id_may_have_what_stands_in_names_of_published_files(inner, monkeypatch):
    asked = []
    monkeypatch.setattr(load, "snapshot", lambda repo, whole, instead, **files: asked.append((repo, files)))
    load._place(f"owner/repository/{inner}")
    assert asked[0][0] == "owner/repository" and asked[0][1]["allow_patterns"][0].startswith(inner)


@pytest.mark.parametrize("source", ["nowhere", "./nowhere/at/all", "/nowhere/at/all", "az://openaipublic/x/8.pt"])
def test_a_source_that_is_nothing_says_what_can_be_given(source):
    with pytest.raises(FileNotFoundError, match="there is no dictionary at .*: give a file, a folder, or a hub id"):
        load_dictionary(source)


def test_a_wrong_path_in_a_folder_that_exists_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "downloads").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no dictionary at 'downloads/sae'"):
        load_dictionary("downloads/sae")


def test_a_place_that_the_repository_does_not_have(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "snapshot", lambda repo, whole, instead, **files: whole(tmp_path))
    with pytest.raises(FileNotFoundError, match="the repository has no layer_77 with weights in it"):
        load_dictionary("owner/repository/layer_77")


def test_a_language_model_is_no_dictionary_and_not_all_its_tensors_are_named(tmp_path):
    with pytest.raises(ValueError, match="tensors h.0, h.1, .*, h.7, and more is in no layout"):
        load_dictionary(put(tmp_path, "model.safetensors", {f"h.{i}": random(2) for i in range(10)}))


def test_an_unknown_layout_names_its_tensors_and_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="tensors A, B is in no layout known here .*SAELens.*may be missing beside it"):
        load_dictionary(put(tmp_path, "model.safetensors", {"A": random(2), "B": random(3)}))
    with pytest.raises(ValueError, match="is in no layout known here"):  # whether b_dec is subtracted is not known
        load_dictionary(put(tmp_path, "sae_weights.safetensors", lens()))


def subject(**other):
    return SimpleNamespace(
        **{"name": "small", "d_model": D, "site": "blocks.9.hook_resid_post", "device": "cpu"} | other
    )


def test_width_site_and_latents_are_compared_with_what_is_asked_for(tmp_path):
    folder = put(tmp_path / PLACE, "params.safetensors", scope(str.lower), SETTINGS).parent
    assert load_dictionary(folder, subject(), [0, N - 1]).dictionary.n_latents == N
    for other, message in {
        "d_model": "is 6 wide, small 7: use its own model",
        "site": "reads blocks.9.hook_resid_post, the site of small is blocks.8.hook_resid_post",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_dictionary(folder, subject(**{other: {"d_model": 7, "site": "blocks.8.hook_resid_post"}[other]}))
    for latent in (N, -1):
        with pytest.raises(ValueError, match=f"has latents 0 to {N - 1}, and no {latent}"):
            load_dictionary(folder, latents=[3, latent])


def test_a_crosscoder_asks_for_a_pair(tmp_path):
    path = put(tmp_path, "model.safetensors", pair(), {"trainer": {"layer": 9}})
    both = SimpleNamespace(
        name="base | chat", base=subject(), chat=subject(), d_model=2 * D, site=subject().site, device="cpu"
    )
    assert load_dictionary(path, both).dictionary.d_model == D
    with pytest.raises(ValueError, match="reads two models, small is one: pass the pair"):
        load_dictionary(path, subject())
    both.base.d_model = D + 1
    with pytest.raises(ValueError, match="is 6 wide, small 7"):
        load_dictionary(path, both)


def test_it_says_what_it_has_found(tmp_path):
    published = load_dictionary(put(tmp_path / PLACE, "params.safetensors", scope(str.lower), SETTINGS))
    expected = "Gemma Scope 2 JumpReLU: 10 latents, 6 wide, float32, blocks.9.hook_resid_post, inputs: none"
    assert str(published) == expected and published.described()["n_latents"] == N
    found = load_dictionary(put(tmp_path, "model.safetensors", pair()))
    assert "crosscoder_learning CrossCoder" in str(found) and "place unknown" in str(found)
