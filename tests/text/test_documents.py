import dataclasses
import hashlib
import importlib.metadata
import itertools
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from helpers.base.storage import MODELS, cache_dir
from helpers.text import documents as text
from helpers.text.documents import (
    BOS,
    EOS,
    PACKAGES,
    TURNS,
    Document,
    documents,
    fingerprint,
    load_tokenizer,
    split_of,
    token_stream,
    train_tokenizer,
)

KNOWN = {  # of the shipped models: to move one of these would let them be judged on what they read
    "heldout": ["python/pprint.py", "numpy/_core/arrayprint.py", "torch/nn/modules/linear.py"],
    "train": ["python/argparse.py", "sympy/core/symbol.py", "pandas/core/algorithms.py"],
}
LINES = "".join(f"value_{i} = {i} * {i}\n" for i in range(40))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([Document("made", "x.py", LINES)], vocab_size=300)


def test_the_most_frequent_pair_becomes_an_entry():
    found = train_tokenizer([Document("made", "x.py", "ababc cb")], vocab_size=256 + 6 + 1)
    assert found.tokenize("ababc") == ["ab", "ab", "c"] and len(found) == 263
    assert found.tokenize("<start_of_turn>é") == ["<start_of_turn>", *found.tokenize("é")]
    assert found.decode(found("ab é")["input_ids"]) == "ab é"


@pytest.fixture(scope="module")
def shipped():
    return load_tokenizer(MODELS / "docs-gpt2")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """An empty cache for each test."""
    monkeypatch.setenv("SUITE_CACHE", str(tmp_path_factory.mktemp("cache")))
    return cache_dir() / "tokens"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install(package, {path: text}) puts a package where Python finds it."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(package: str, files: dict[str, str]) -> None:
        for path, content in ({"__init__.py": ""} | files).items():
            file = tmp_path / package / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content, encoding="utf-8")

    return install


def in_train(texts: list[str]) -> list[Document]:
    """Made-up documents of the train split, one per text."""
    made = (Document("made", f"{i}.py", "") for i in itertools.count())
    train = (d for d in made if split_of(d) == "train")
    return [dataclasses.replace(d, text=content) for d, content in zip(train, texts, strict=False)]


def slow_stream(docs: list[Document], tokenizer) -> list[int]:
    """Twin: one document at a time, in the order of the hash of its name."""
    stream = []
    for d in sorted(docs, key=lambda d: hashlib.sha256(f"{d.package}/{d.path}".encode()).hexdigest()):
        ids = tokenizer(d.text, add_special_tokens=False)["input_ids"]
        stream += [tokenizer.bos_token_id, *(tokenizer.unk_token_id if i < 3 else i for i in ids)]
    return stream


def decode(tokenizer, tokens) -> str:
    return tokenizer.backend_tokenizer.decode(list(map(int, tokens)), skip_special_tokens=False)


# The split and the order


@pytest.mark.parametrize(("split", "name"), [(split, name) for split in KNOWN for name in KNOWN[split]])
def test_a_document_never_moves_to_the_other_split_whatever_its_text(split, name):
    package, _, path = name.partition("/")
    assert {split_of(Document(package, path, content)) for content in ("", LINES)} == {split}


def test_about_one_document_in_forty_is_held_out():
    split = [split_of(Document("made", f"{i}.py", "")) for i in range(20_000)]
    assert set(split) == {"train", "heldout"}
    assert split.count("heldout") / len(split) == pytest.approx(1 / 40, rel=0.1)


def test_the_splits_share_no_document_and_leave_none_out(install):
    install("firstpack", {f"{i}.py": LINES + f"{i}\n" for i in range(150)})
    both, train, heldout = (documents(split, ["firstpack"]) for split in (None, "train", "heldout"))
    assert len(both) == 150
    assert train == [d for d in both if d not in heldout]
    assert {split_of(d) for d in train} == {"train"}
    assert {split_of(d) for d in heldout} == {"heldout"}


def test_documents_come_by_the_hash_of_their_name_so_that_packages_mix(install):
    for package in ("firstpack", "secondpack"):
        install(package, {f"{i}.py": LINES + f"{package}{i}\n" for i in range(50)})
    found = documents(packages=["secondpack", "firstpack"])
    names = [f"{package}/{i}.py" for package in ("firstpack", "secondpack") for i in range(50)]
    assert [d.name for d in found] == sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert 20 < sum(a.package == "firstpack" for a in found[:50]) < 30


def test_only_files_worth_reading_are_documents(install):
    kept = {"a.py": LINES, "sub/deep/b.py": LINES + "é✔", "latest/c.py": LINES + "c", "exact.py": "x" * 400}
    left_out = {
        "tests/test_a.py": LINES + "1",
        "sub/_vendor/b.py": LINES + "2",
        "_version.py": LINES + "3",
        "made.py": "# This file was AUTOMATICALLY generated by a script\n" + LINES,
        "short.py": "x" * 399,
        "long.py": "x" * 150_000,
        "notes.txt": LINES + "4",
    }
    install("firstpack", kept | left_out)
    found = documents(packages=["firstpack"])
    assert {d.path: d.text for d in found} == kept
    assert {d.package for d in found} == {"firstpack"}


def test_of_exact_copies_the_first_one_stays(install):
    install("firstpack", {f"{i}.py": LINES for i in range(5)} | {"other.py": LINES + "#"})
    found = documents(packages=["firstpack"])
    hashes = {i: hashlib.sha256(f"firstpack/{i}.py".encode()).hexdigest() for i in range(5)}
    assert {d.path for d in found} == {f"{min(hashes, key=hashes.get)}.py", "other.py"}


@pytest.mark.parametrize("name", ["no_such_package", "platform", "sys"])
def test_a_missing_package_is_one_clear_sentence(name):
    message = f"^{name} is part of the corpus and no installed package; install requirements.txt$"
    with pytest.raises(ModuleNotFoundError, match=message):
        documents(packages=[name])


def test_an_unknown_split_is_refused(tokenizer):
    with pytest.raises(ValueError, match="split is 'test'; expected 'train', 'heldout' or None"):
        documents("test", [])
    with pytest.raises(ValueError, match="split is 'test'; expected 'train' or 'heldout'"):
        token_stream("test", tokenizer, docs=in_train([LINES]))


def test_the_real_corpus_is_mixed_split_and_without_copies():
    found = documents()
    assert {d.package for d in found} == set(PACKAGES)
    assert len({d.package for d in found[:100]}) >= 6
    assert len({d.text for d in found}) == len({d.name for d in found}) == len(found)
    names = {split: {d.name for d in found if split_of(d) == split} for split in KNOWN}
    assert all(names[split].issuperset(KNOWN[split]) for split in KNOWN)
    assert len(names["heldout"]) / len(found) == pytest.approx(1 / 40, rel=0.3)


# The fingerprint


def test_the_fingerprint_names_version_and_number_of_each_package(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", {"numpy": "2.0", "scikit-learn": "1.9+cpu"}.get)
    docs = [Document("sklearn", "a.py", "a"), Document("numpy", "a.py", "a"), Document("numpy", "b.py", "b")]
    found = fingerprint(docs)
    content = hashlib.sha256(b"a.py\0a\0b.py\0b\0").hexdigest()
    assert found["numpy"] == {"version": "2.0", "documents": 2, "sha256": content}
    assert (found["sklearn"]["version"], found["sklearn"]["documents"]) == ("1.9", 1)


def test_the_fingerprint_does_not_depend_on_the_order():
    docs = [Document(package, f"{i}.py", f"{i}é") for package in ("a", "b") for i in range(6)]
    shuffled = random.Random(0).sample(docs, len(docs))
    assert repr(fingerprint(shuffled)) == repr(fingerprint(docs))


@pytest.mark.parametrize(
    "change",
    [{"text": "print(2)"}, {"path": "a/c.py"}, {"package": "scipy"}, {"path": "a/b.pyp", "text": "rint(1)"}],
)
def test_the_fingerprint_changes_with_any_character(change):
    document = Document("numpy", "a/b.py", "print(1)")
    others = [Document("numpy", "z.py", "z")]
    assert fingerprint([document, *others]) != fingerprint([dataclasses.replace(document, **change), *others])


def test_the_fingerprint_changes_with_the_version(monkeypatch):
    docs = [Document("numpy", "a.py", "a")]
    before = fingerprint(docs)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1")
    assert fingerprint(docs) != before


# The stream


def test_documents_follow_each_other_each_behind_its_bos():
    letters = {byte: i for i, byte in enumerate("abc")}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS)
    docs = sorted(in_train(["ab", "", "cca"]), key=lambda d: d.digest)
    stream = token_stream("train", tokenizer, docs=docs)
    ids = {"ab": [3, 0, 1], "": [3], "cca": [3, 2, 2, 0]}
    assert stream.tokens.tolist() == sum((ids[d.text] for d in docs), [])
    assert stream.starts.tolist() == [0, *np.cumsum([len(ids[d.text]) for d in docs])]
    assert (stream.names, len(stream), stream.tokens.dtype) == ([d.name for d in docs], 8, np.uint16)
    assert stream.corpus == fingerprint(docs)


@given(st.lists(st.text(max_size=20), min_size=1, max_size=6))
@example(["é✔\U0001f600\r\n\x00", "<bos> spelt <eos><start_of_turn>out"])
def test_starts_and_names_lead_back_to_the_text(tokenizer, texts):
    docs = in_train(texts)
    stream = token_stream("train", tokenizer, docs=docs)
    assert stream.tokens.tolist() == slow_stream(docs, tokenizer)
    assert np.flatnonzero(stream.tokens < 3).tolist() == list(stream.starts[:-1])  # <pad>, <eos>, <bos>
    assert sorted(stream.names) == sorted(d.name for d in docs)
    text_of = {d.name: d.text for d in docs}
    for name, (start, end) in zip(stream.names, itertools.pairwise(stream.starts), strict=True):
        spelt_out = re.sub("<(bos|eos|pad)>", "<unk>", text_of[name])
        assert decode(tokenizer, stream.tokens[start:end]) == BOS + spelt_out


def test_only_documents_of_the_split_are_in_it(tokenizer):
    docs = [Document("made", f"{i}.py", f"{i}") for i in range(100)]
    train, heldout = (token_stream(split, tokenizer, docs=docs) for split in ("train", "heldout"))
    assert {*train.names, *heldout.names} == {d.name for d in docs}
    assert [split_of(d) for d in docs].count("heldout") == len(heldout.names) > 0
    assert heldout.corpus == train.corpus == fingerprint(docs)


def test_the_cut_is_exact_and_drops_the_documents_behind_it(tokenizer):
    docs = in_train([LINES[:n] for n in (9, 1, 0, 5)])
    whole = token_stream("train", tokenizer, docs=docs)
    for n in range(1, len(whole) + 1):
        cut = token_stream("train", tokenizer, n, docs)
        begun = [start for start in whole.starts[:-1] if start < n]
        assert cut.tokens.tolist() == whole.tokens[:n].tolist()
        assert cut.starts.tolist() == [*begun, n]
        assert cut.names == whole.names[: len(begun)]


def test_a_cut_far_into_a_long_corpus_is_that_of_the_whole(tokenizer):
    docs = in_train([f"{i}" for i in range(200)])
    whole = token_stream("train", tokenizer, docs=docs)
    assert whole.tokens.tolist() == slow_stream(docs, tokenizer)
    for n in (whole.starts[64], whole.starts[64] + 1, 300):  # 64 documents are encoded at a time
        assert token_stream("train", tokenizer, int(n), docs).tokens.tolist() == whole.tokens[:n].tolist()


def test_a_large_vocabulary_gets_larger_integers():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({chr(0x10000 + i): i for i in range(2**16)}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS)
    stream = token_stream("train", tokenizer, docs=in_train([chr(0x10000)]))
    assert (stream.tokens.tolist(), stream.tokens.dtype) == ([2**16, 0], np.int32)


def test_padding_left_over_from_an_earlier_call_does_not_leak_in(tokenizer):
    docs = in_train(["a", LINES])
    expected = slow_stream(docs, tokenizer)
    tokenizer(["a", LINES], padding=True, truncation=True, max_length=7)
    assert token_stream("train", tokenizer, docs=docs).tokens.tolist() == expected


# The cache


def test_a_second_call_reads_the_cache_in_whatever_order_the_documents_come(tokenizer, monkeypatch):
    docs = in_train([LINES[:n] for n in (9, 1, 5)])
    first = token_stream("train", tokenizer, docs=docs)
    monkeypatch.setattr(text, "_tokenise", None)
    second = token_stream("train", tokenizer, docs=docs[::-1])
    assert (second.names, second.corpus) == (first.names, first.corpus)
    assert np.array_equal(second.tokens, first.tokens)
    assert np.array_equal(second.starts, first.starts)


def test_of_two_at_once_one_tokenises(tokenizer, monkeypatch):
    tokenise, calls = text._tokenise, []

    def slow(*arguments):
        calls.append(arguments)
        time.sleep(0.2)
        return tokenise(*arguments)

    monkeypatch.setattr(text, "_tokenise", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: token_stream("train", tokenizer, 100), range(2))
    assert len(calls) == 1 and np.array_equal(first.tokens, second.tokens)


def test_another_text_tokenizer_length_or_split_misses_the_cache(tokenizer, cache):
    docs = in_train([LINES, LINES[:9]])
    other = train_tokenizer([Document("made", "x.py", LINES)], vocab_size=290)
    other_bos = train_tokenizer([Document("made", "x.py", LINES)], vocab_size=300)
    other_bos.bos_token = EOS
    held_out = next(d for i in itertools.count() if split_of(d := Document("made", f"{i}.py", "a")) == "heldout")
    docs.append(held_out)
    calls = [
        ("train", tokenizer, None, docs),
        ("train", tokenizer, 5, docs),
        ("train", tokenizer, 6, docs),
        ("heldout", tokenizer, None, docs),
        ("train", other, None, docs),
        ("train", other_bos, None, docs),
        ("train", tokenizer, None, [*docs[:-1], dataclasses.replace(held_out, text="b")]),
    ]
    for expected, call in enumerate(calls, 1):
        stream = token_stream(*call)
        assert len(list(cache.iterdir())) == expected
        assert stream.tokens[0] == call[1].bos_token_id


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_cache_cut_short_is_made_again(tokenizer, cache, kept):
    docs = in_train([LINES])
    first = token_stream("train", tokenizer, docs=docs)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    assert np.array_equal(token_stream("train", tokenizer, docs=docs).tokens, first.tokens)
    assert path.read_bytes() == whole


def test_an_interruption_while_writing_leaves_nothing(tokenizer, cache, monkeypatch):
    def interrupted(arrays, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(safetensors.numpy, "save_file", interrupted)
        token_stream("train", tokenizer, docs=in_train([LINES]))
    assert list(cache.iterdir()) == []
    assert len(token_stream("train", tokenizer, docs=in_train([LINES]))) > 1


# What is refused


def test_an_empty_split_is_refused(tokenizer):
    with pytest.raises(ValueError, match="the corpus has no 'heldout' documents; pass more documents, or check"):
        token_stream("heldout", tokenizer, docs=in_train([LINES]))


def test_a_corpus_that_is_too_short_is_refused_and_not_cached(tokenizer, cache):
    docs = in_train(["", ""])
    assert len(token_stream("train", tokenizer, 2, docs)) == 2
    with pytest.raises(ValueError, match="the corpus has 2 tokens, 1,003 were asked for; ask for fewer"):
        token_stream("train", tokenizer, 1003, docs)
    assert len(list(cache.iterdir())) == 1
    with pytest.raises(ValueError, match="n_tokens is 0; expected at least 1, or None"):
        token_stream("train", tokenizer, 0, docs)


def test_a_tokenizer_without_bos_is_refused(tokenizer):
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="the tokenizer has no bos_token, which starts every document"):
        token_stream("train", without, docs=in_train([LINES]))


# Tokenizers


def test_training_learns_merges_and_keeps_every_byte(tokenizer):
    assert len(tokenizer) == 300
    assert tokenizer.tokenize("value") == ["value"]
    everything = "".join(map(chr, range(0x250))) + "✔\U0001f600"
    assert decode(tokenizer, tokenizer(everything)["input_ids"]) == everything


def test_a_saved_tokenizer_loads_again_and_a_folder_without_one_is_refused(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no tokenizer.json; save the model's tokenizer there"):
        load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.bos_token, loaded.eos_token) == (BOS, EOS)


def test_the_shipped_tokenizer_has_gemmas_turns_and_reads_any_text_back(shipped):
    assert len(shipped) == pytest.approx(4096, rel=0.01)
    for token in (BOS, EOS, *TURNS):
        assert shipped.tokenize(f"a{token}b") == ["a", token, "b"]
        assert token in shipped.all_special_tokens
    everything = LINES + "".join(map(chr, range(0x250))) + "✔\U0001f600\n<start_of_turn>"
    assert decode(shipped, shipped(everything)["input_ids"]) == everything
    assert len(LINES) / len(shipped(LINES)["input_ids"]) > 1.5  # characters a token


def test_the_shipped_chat_template_is_gemmas(shipped):
    chat = [
        {"role": "user", "content": " What is `sorted`?\n"},
        {"role": "assistant", "content": "A function."},
        {"role": "user", "content": "Thanks"},
    ]
    told = (
        "<bos><start_of_turn>user\nWhat is `sorted`?<end_of_turn>\n"
        "<start_of_turn>model\nA function.<end_of_turn>\n"
        "<start_of_turn>user\nThanks<end_of_turn>\n"
    )
    assert shipped.apply_chat_template(chat, tokenize=False) == told
    prompt = shipped.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == told + "<start_of_turn>model\n"
    ids = shipped.apply_chat_template(chat, return_dict=False)
    assert ids.count(shipped.bos_token_id) == 1
    assert decode(shipped, ids) == told
