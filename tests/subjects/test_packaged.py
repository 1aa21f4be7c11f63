"""A GGUF file in parts becomes the very model it was written from, once, whatever else happens on the way."""

import dataclasses
import hashlib
import itertools
import sys
import threading
from collections import namedtuple

import gguf
import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from helpers.base.storage import ROOT
from helpers.subjects import packaged
from helpers.subjects.model_files import model_directory
from helpers.subjects.packaged import GEMMA, Packaged, packaged_folder
from helpers.subjects.subject import load_subject, subject_for
from helpers.text.dialogues import Dialogue, Turn
from helpers.text.turns import encode

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")
WORDS = ("\n", "  ", *"abcdehilmorstuw\u2581", "he", "ll", "hell", "\u2581t", "hello")
VOCAB = (*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS)
CONTROL, NORMAL, BYTE = 3, 1, 6  # kinds of token in GGUF
SIZE = {"hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 64, "head_dim": 16, "num_attention_heads": 2}
NAMES = {
    **{"model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk"},
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    **{"self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"},
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    **{"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm"},
    **{"pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm"},
}
PACKAGES = ("tiny-gguf", "tiny-gguf-part1", "tiny-gguf-part2", "tiny-gguf-part3")


def write_gguf(path, seed: int = 0) -> Gemma3ForCausalLM:
    """A random Gemma 3 in 8 and 5 bits, as llama.cpp writes it; returns the model that the file stands for, in bf16."""
    torch.manual_seed(seed)
    more = {"num_key_value_heads": 1, "sliding_window": 8, "max_position_embeddings": 64}
    config = Gemma3TextConfig(vocab_size=len(VOCAB), **SIZE, **more, sliding_window_pattern=6)
    model = Gemma3ForCausalLM(config)
    file = gguf.GGUFWriter(path, "gemma3")
    file.add_context_length(64)
    file.add_embedding_length(32)
    file.add_block_count(4)
    file.add_feed_forward_length(64)
    file.add_head_count(2)
    file.add_head_count_kv(1)
    file.add_key_length(16)
    file.add_value_length(16)
    file.add_layer_norm_rms_eps(1e-6)
    file.add_rope_freq_base(1e6)
    file.add_sliding_window(8)
    file.add_tokenizer_model("llama")
    file.add_token_list(VOCAB)
    file.add_token_scores([-float(i) for i in range(len(VOCAB))])
    kinds = [CONTROL] * len(SPECIAL) + [BYTE] * 256 + [NORMAL] * len(WORDS)
    file.add_token_types(kinds)
    for name, i in {"bos": 2, "eos": 1, "unk": 3, "pad": 0}.items():
        getattr(file, f"add_{name}_token_id")(i)
    file.add_add_bos_token(True)
    for name, weight in model.named_parameters():
        weight.data.normal_(0.0, 0.3)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        values = weight.data.numpy()
        if values.ndim == 1:
            file.add_tensor(name, values + 1)  # llama.cpp keeps a norm's scale as it multiplies
            continue
        kind = gguf.GGMLQuantizationType.Q5_0 if "ffn" in name else gguf.GGMLQuantizationType.Q8_0
        packed = gguf.quants.quantize(values, kind)
        weight.data = torch.from_numpy(gguf.quants.dequantize(packed, kind).astype(np.float32))
        file.add_tensor(name, packed, raw_dtype=kind)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()
    return model.eval()


@dataclasses.dataclass
class Installed:
    """Packages as pip leaves them: data, a record, and code that must not run."""

    site: object
    model: Packaged
    part2: object  # the path of a part


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "tiny.gguf"
    return write_gguf(path), path.read_bytes()


@pytest.fixture
def installed(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("SUITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    data = whole[1]
    cuts = [0, len(data) // 3, len(data) // 2, len(data)]
    parts = [data[start:end] for start, end in itertools.pairwise(cuts)]
    put(tmp_path / "site", PACKAGES[0], {"TERMS.html": b"terms", "NOTICE.md": b"notice", "README.upstream.md": b"x"})
    for i, (package, part) in enumerate(zip(PACKAGES[1:], parts, strict=True)):
        put(tmp_path / "site", package, {f"tiny.gguf.part0{i}": part})
    model = Packaged("tiny-gemma", PACKAGES, hashlib.sha256(data).hexdigest(), memory_gb=0.1)
    return Installed(tmp_path / "site", model, tmp_path / "site" / "tiny_gguf_part2" / "data" / "tiny.gguf.part01")


def put(site, package: str, files: dict[str, bytes]) -> None:
    folder, info = site / package.replace("-", "_"), site / f"{package.replace('-', '_')}-1.0.dist-info"
    (folder / "data").mkdir(parents=True)
    info.mkdir()
    for name, content in files.items():
        (folder / "data" / name).write_bytes(content)
    (folder / "__init__.py").write_text("raise SystemExit('this code must not run')")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    names = [f"{folder.name}/__init__.py", *(f"{folder.name}/data/{name}" for name in files)]
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in names))


def left_in(folder):
    return sorted(path.name for path in folder.parent.iterdir())


def test_the_file_becomes_the_model_it_was_written_from(installed, whole, capsys):
    folder = packaged_folder(installed.model)
    subject = load_subject(folder)
    tokens = torch.randint(7, len(VOCAB), (3, 20), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(subject.logits(tokens), whole[0](tokens).logits, rtol=1e-4, atol=1e-4)
    assert (subject.layer, subject.d_model, subject.context) == (2, 32, 64)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "a minute, 0.1 GB of memory, once. Terms of use apply: " in said
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".html", ".md")} == {
        **{"TERMS.html": b"terms", "NOTICE.md": b"notice"}
    }
    assert left_in(folder) == [folder.name] and not list(folder.glob("*.gguf"))
    assert not [name for name in sys.modules if name.startswith("tiny_gguf")]


def test_its_tokenizer_puts_bos_first_and_reads_dialogues(installed):
    subject = load_subject(packaged_folder(installed.model))
    assert (subject.head, subject.special_ids) == (2, [0, 1, 2])
    pieces = subject.tokenizer.convert_ids_to_tokens(subject.tokenizer("hello  te").input_ids)
    assert pieces == ["<bos>", "hello", "\u2581\u2581", "t", "e"]
    rows = subject.rows(torch.arange(20, 50), 11)
    assert rows.shape == (3, 11) and (rows[:, 0] == 2).all() and subject.studied(rows).sum() == 30
    dialogue = encode(Dialogue((Turn("hello", "\u2603 we tell", None),)), subject.tokenizer)
    spelled = np.array(subject.tokenizer.convert_ids_to_tokens(dialogue.tokens))
    assert spelled[:2].tolist() == ["<bos>", "<start_of_turn>"]
    assert spelled[dialogue.roles == 1].tolist() == ["hello"]
    snowman = ["<0xE2>", "<0x98>", "<0x83>"]  # three tokens of one character
    assert spelled[dialogue.roles == 2].tolist() == [*snowman, *"\u2581we", "\u2581t", "e", "ll"]


def test_it_is_made_once_and_then_needs_no_package(installed, monkeypatch):
    folder = packaged_folder(installed.model)
    monkeypatch.setattr(packaged, "_make", lambda *_: pytest.fail("made again"))
    assert packaged_folder(installed.model) == folder


def test_of_two_processes_one_converts_and_the_other_waits(installed, monkeypatch, capsys):
    begun, calls, convert = threading.Barrier(2, timeout=30), [], packaged._convert

    def once(file, folder):
        calls.append(file)
        begun.wait()  # until the other is on its way
        convert(file, folder)

    def other():
        begun.wait()
        found.append(packaged_folder(installed.model))

    found = []
    monkeypatch.setattr(packaged, "_convert", once)
    second = threading.Thread(target=other)
    second.start()
    found.append(packaged_folder(installed.model))
    second.join(60)
    assert len(found) == 2 and len(set(found)) == 1 and len(calls) == 1
    assert "Another process is converting tiny-gemma: waiting for it\n" in capsys.readouterr().out


def test_what_a_killed_conversion_left_is_swept(installed):
    left = packaged_folder(installed.model).with_suffix(".half-done")
    left.with_suffix("").rename(left)  # whole, but for the last step
    (left / "config.json").write_text("{")
    folder = packaged_folder(installed.model)
    assert left_in(folder) == [folder.name] and (folder / "config.json").read_text() != "{"


def test_a_package_that_is_missing_is_named(installed):
    lacking = installed.model._replace(packages=(*PACKAGES, "tiny-gguf-part4"))
    with pytest.raises(ModuleNotFoundError, match="of which tiny-gguf-part4 is not here, .*: run `make gemma`, or let"):
        packaged_folder(lacking)
    installed.part2.unlink()
    with pytest.raises(ModuleNotFoundError, match="of which tiny-gguf-part2 is not here, or not whole"):
        packaged_folder(installed.model)


def test_a_file_of_another_hash_is_refused(installed):
    folder = packaged_folder(installed.model)
    refused = installed.model._replace(sha256="0" * 64)
    with pytest.raises(ValueError, match="SHA-256 [0-9a-f]{64}, not 0{64}: they were changed .* `make gemma`"):
        packaged_folder(refused)
    assert left_in(folder) == [folder.name]
    swapped = installed.model._replace(packages=(*PACKAGES[:2], *PACKAGES[:1:-1]), name="swapped")
    with pytest.raises(ValueError, match="SHA-256"):
        packaged_folder(swapped)


def test_too_little_disk_or_memory_is_said_before_anything_is_written(installed, monkeypatch):
    usage = namedtuple("Usage", "free")
    with monkeypatch.context() as patched:
        patched.setattr(packaged.shutil, "disk_usage", lambda _: usage(1000))
        with pytest.raises(OSError, match=r"needs 0.0 GB of disk .* has 0.0: free some, or let SUITE_CACHE name"):
            packaged_folder(installed.model)
    with pytest.raises(MemoryError, match=r"needs 1000000 GB of memory to be converted and [\d.]+ are free: close"):
        packaged_folder(installed.model._replace(memory_gb=10**6))
    assert not list(packaged.cache_dir().glob("models/*.half-done"))


def test_a_conversion_that_fails_leaves_nothing(installed, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packaged, "_convert", full)
    with pytest.raises(OSError, match="No space left"):
        packaged_folder(installed.model)
    assert not list((packaged.cache_dir() / "models").iterdir())


def test_the_dial_names_the_packaged_model_or_what_the_reader_has(installed, monkeypatch):
    monkeypatch.delenv("SUITE_GEMMA", raising=False)
    assert subject_for("gemma") == subject_for("gemma", "gemma2-base") == GEMMA.name
    with pytest.raises(ModuleNotFoundError, match=GEMMA.packages[0]):
        monkeypatch.setattr(packaged.importlib.metadata, "files", lambda _: None)
        model_directory(GEMMA.name)
    monkeypatch.setenv("SUITE_GEMMA", "google/gemma-3-270m")
    assert (subject_for("gemma"), subject_for("embedded")) == ("google/gemma-3-270m", "docs-gpt2")
    monkeypatch.setenv("SUITE_GEMMA", "~/gemma")
    assert subject_for("gemma").endswith("/gemma") and "~" not in subject_for("gemma")
    assert subject_for("gemma", "gemma2-chat") == "gemma-3-270m-chat"  # whose base is the reader's


def test_the_packages_are_pinned_by_hash():
    lines = (ROOT / "requirements-gemma.txt").read_text().splitlines()[1:]
    assert [line.split("==")[0] for line in lines] == list(GEMMA.packages)
    assert all(len(line.partition(" --hash=sha256:")[2]) == 64 for line in lines)
