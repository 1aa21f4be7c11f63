"""The three roads to a model directory are one, and what is missing or wrong in it is said in one sentence."""

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AddedToken, AutoModelForCausalLM
from twins import put_into_cache, save_tiny, tiny_tokenizer

from helpers.subjects import model_files
from helpers.subjects.low_rank import add_low_rank, differences, save_differences
from helpers.subjects.model_files import load_pretrained
from helpers.subjects.packaged import GEMMA
from helpers.subjects.subject import load_subject

TOKENS = torch.arange(12).view(2, 6)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("original"), "gpt2")


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def test_embedded_name_path_and_hub_id_load_the_same_model(original, tmp_path, hub_cache, monkeypatch):
    monkeypatch.setattr(model_files, "MODELS", tmp_path / "models")
    shutil.copytree(original, tmp_path / "models" / "docs-gpt2")
    put_into_cache(hub_cache, "openai-community/gpt2", original)
    expected = load_subject(original).logits(TOKENS)
    for name in ("docs-gpt2", str(original), original, "openai-community/gpt2"):
        subject = load_subject(name)
        assert subject.name == str(name)
        assert torch.equal(subject.logits(TOKENS), expected)


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """A base, the folder of a low-rank difference of it, and the model that it stands for."""
    base, folder = save_tiny(tmp_path / "base", "gemma2"), tmp_path / "chat"
    model = AutoModelForCausalLM.from_pretrained(base)
    for parameter in add_low_rank(model, rank=2):
        parameter.data += 0.3
    save_differences(differences(model), folder)
    (folder / "config.json").write_text(json.dumps({"low_rank_of": GEMMA.name}))
    monkeypatch.setenv("SUITE_GEMMA", str(base))
    return base, folder, model


def test_a_low_rank_difference_is_read_as_the_model_that_it_makes(tuned):
    base, folder, model = tuned
    chat = load_subject(folder, layer=1)
    wanted = model(TOKENS, output_hidden_states=True)
    first = chat.residuals(TOKENS)  # of two of four blocks
    torch.testing.assert_close(first, wanted.hidden_states[2], rtol=0.02, atol=0.05)  # shipped in bf16
    assert (first - load_subject(base, layer=1).residuals(TOKENS)).abs().max() > 0.5
    torch.testing.assert_close(chat.logits(TOKENS), wanted.logits, rtol=0.02, atol=0.1)
    torch.testing.assert_close(chat.resume(first), chat.logits(TOKENS))
    assert (chat.folder, chat.tokenizer.get_vocab()) == (folder, load_subject(base).tokenizer.get_vocab())


def test_a_low_rank_difference_is_known_by_both_of_its_folders(tuned, tmp_path):
    base, folder, model = tuned
    known = load_subject(folder).fingerprint
    assert load_subject(base).fingerprint != known == load_subject(folder).fingerprint
    save_differences({name: 2 * part for name, part in differences(model).items()}, folder)
    changed = load_subject(folder).fingerprint
    save_tiny(base, "gemma2", seed=1)
    assert len({known, changed, load_subject(folder).fingerprint}) == 3


def test_a_low_rank_difference_of_another_model_is_refused(tuned, tmp_path, monkeypatch):
    monkeypatch.setenv("SUITE_GEMMA", str(save_tiny(tmp_path / "deeper", "gemma2", n_layers=5)))
    with pytest.raises(ValueError, match="do not fit, first at model.layers.4.* use its own base"):
        load_pretrained(tuned[1]).model  # noqa: B018


def test_the_head_reads_no_slices(original):
    model, seen = load_pretrained(original).model, []
    model.get_output_embeddings().register_forward_hook(lambda head, args, logits: seen.append(args[0]))
    logits = model(TOKENS, logits_to_keep=1).logits
    assert seen[0].shape == (2, 1, 24) and seen[0].is_contiguous()
    torch.testing.assert_close(logits, model(TOKENS).logits[:, -1:])


def test_weights_named_as_in_the_hubs_gpt2_load(original, folder):
    weights = {name.removeprefix("transformer."): w for name, w in load_file(folder / "model.safetensors").items()}
    masks = {f"h.{i}.attn.bias": torch.ones(16, 16).tril().view(1, 1, 16, 16) for i in range(3)}
    save_file(weights | masks, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load_subject(folder).logits(TOKENS), load_subject(original).logits(TOKENS))


def test_sharded_weights_load(original, tmp_path):
    AutoModelForCausalLM.from_pretrained(original).save_pretrained(tmp_path, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(load_subject(tmp_path).logits(TOKENS), load_subject(original).logits(TOKENS))
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(FileNotFoundError, match="lacks model-00002-of-.*safetensors: save"):
        load_subject(tmp_path)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("config.json", "lacks config.json"),
        ("model.safetensors", "lacks model.safetensors"),
        ("tokenizer.json", "lacks tokenizer.json or"),
    ],
)
def test_a_missing_part_is_named(folder, lost, message):
    (folder / lost).unlink()
    with pytest.raises(FileNotFoundError, match=message + ".*: save model and tokenizer"):
        load_subject(folder)


def test_pickled_weights_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="lacks model.safetensors"):
        load_subject(folder)


def test_code_in_the_directory_is_not_run(folder):
    marker = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nfrom transformers import GPT2Config as Evil\n")
    config = json.loads((folder / "config.json").read_text())
    automatic = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": automatic}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_subject(folder)
    assert not marker.exists()


def test_weights_cut_short_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read .*: fetch or save the model again"):
        load_subject(folder)


def test_weights_of_fewer_layers_than_the_configuration_says_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 4}))
    with pytest.raises(ValueError, match=r"do not fit config.json, 12 are missing, first transformer.h.3"):
        load_subject(folder).logits(TOKENS)


@pytest.mark.parametrize("size", [0, 1000])
def test_another_models_tokenizer_is_refused(folder, size):
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["model"]["vocab"] = {str(i): i for i in range(size)}
    stored["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"tokenizer in .* has \d+ entries where the model has 258"):
        load_subject(folder)


def test_a_special_token_beyond_the_vocabulary_is_left_alone(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(AddedToken("<image_soft_token>", special=True), special_tokens=True)
    tokenizer.save_pretrained(folder)
    assert len(load_subject(folder).tokenizer) == 259 > load_subject(folder).n_vocab


@pytest.mark.parametrize("name", ["docs-gpt3", "./nowhere", "/nowhere/at/all", "a/b/c", "~/model"])
def test_an_unknown_name_lists_the_embedded_ones(name, tmp_path, monkeypatch):
    for present in ("docs-gpt2", "docs-gemma2-base"):
        (tmp_path / present).mkdir()
    monkeypatch.setattr(model_files, "MODELS", tmp_path)
    with pytest.raises(ValueError, match=rf'no subject "{name}".*\(docs-gemma2-base, docs-gpt2\)'):
        load_subject(name)


def test_a_hub_model_that_is_not_cached_fails_at_once_offline(hub_cache):
    began = time.perf_counter()
    with pytest.raises(ConnectionError, match=r"gpt2 is not complete.*\(HF_HUB_OFFLINE is set\).*embedded") as caught:
        load_subject("openai-community/gpt2")
    assert time.perf_counter() - began < 2
    assert "\n" not in str(caught.value)


def test_a_hub_model_cached_in_part_is_not_used(hub_cache, folder):
    (folder / "tokenizer.json").unlink()
    put_into_cache(hub_cache, "openai-community/gpt2", folder)
    with pytest.raises(ConnectionError, match="not complete in the local cache"):
        load_subject("openai-community/gpt2")


def test_loading_prints_nothing(original, capfd):
    load_subject(original)
    assert capfd.readouterr() == ("", "")
