"""Text that is on every machine that can run the suite: the source of the standard library and of the pinned packages.

    document   one Python file
    split      by document: about 1 in 40 is held out, by a hash of its name, so that the split never moves
    order      documents come in the order of that hash: the first N tokens are a random sample of all packages
    stream     <bos> document <bos> document ... as one row of token ids

Nothing is copied into the repository. Another Python or package version gives other text: `fingerprint` says which.
"""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import platform
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from helpers.base import hub
from helpers.base.storage import alone, cache_dir, written_aside

PACKAGES = ("python", "torch", "transformers", "sympy", "pandas", "numpy", "networkx", "scipy", "sklearn")
DISTRIBUTIONS = {"sklearn": "scikit-learn"}  # where the distribution is named otherwise than the package
LEFT_OUT = {  # tests repeat themselves; the rest differs between builds of Python
    *("test", "tests", "testing", "site-packages", "__pycache__", "_vendor", "vendor", "_vendored"),
    *("idlelib", "turtledemo", "tkinter", "lib2to3", "ensurepip", "distutils"),
}
OF_THE_BUILD = ("_sysconfigdata", "version", "_version", "__config__", "_distributor")  # how names of such files begin
LENGTHS = range(400, 150_000)  # characters: shorter files say nothing, longer ones are mostly tables
HUB_TEXT = "HuggingFaceFW/fineweb"  # streamed for subject="hub"
INSTEAD = 'use subject="embedded"'  # where the hub cannot be read
HELD_OUT = 40  # one document in so many
SPLITS = ("train", "heldout")

BOS, EOS, PAD, UNK = "<bos>", "<eos>", "<pad>", "<unk>"
TURNS = ("<start_of_turn>", "<end_of_turn>")  # Gemma's, so that one tokenizer serves every embedded subject
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Document:
    """One Python file. `path` is relative to its package, with forward slashes."""

    package: str
    path: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.package}/{self.path}"

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()


def documents(split: str | None = None, packages: Sequence[str] = PACKAGES) -> list[Document]:
    """Every document of the packages ("train", "heldout" or both), in an order that mixes packages and never moves.

    Exact copies and files that say they were generated are left out. Raises ModuleNotFoundError for a missing package.
    """
    if split not in (None, *SPLITS):
        raise ValueError(f"split is {split!r}; expected 'train', 'heldout' or None for both")
    found = sorted((d for p in packages for d in _read_package(p)), key=lambda d: d.digest)
    unique = {d.text: d for d in reversed(found)}  # of exact copies the first stays
    return [d for d in found if unique[d.text] is d and split in (None, split_of(d))]


def split_of(document: Document) -> str:
    """ "heldout" for one document in forty, "train" for the others; decided by the document's name alone."""
    return "heldout" if int(document.digest[-8:], 16) % HELD_OUT == 0 else "train"


def fingerprint(docs: Iterable[Document]) -> dict[str, dict]:
    """{package: {version, documents, sha256}}: equal fingerprints mean equal text."""
    by_package = {}
    for document in docs:
        by_package.setdefault(document.package, []).append(document)
    return {p: _package_fingerprint(p, by_package[p]) for p in sorted(by_package)}


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved in a model directory, or on the hub. Raises FileNotFoundError if a directory has none."""
    if Path(directory).is_dir() and not (Path(directory) / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{directory} has no tokenizer.json; save the model's tokenizer there")
    return AutoTokenizer.from_pretrained(directory)


def train_tokenizer(docs: Iterable[Document], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Byte-level BPE: from single bytes on, the most frequent pair of neighbours becomes an entry, until there are
    `vocab_size`. On the training documents, in their order, it is the tokenizer of the shipped models."""
    bpe, alphabet = tokenizers.Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder, bpe.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNK}
    names = [PAD, EOS, BOS, UNK, *TURNS]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=names, initial_alphabet=alphabet)
    bpe.train_from_iterator((d.text for d in docs), trainer)
    more = {"additional_special_tokens": list(TURNS), "chat_template": CHAT_TEMPLATE}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special, **more)


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """Documents as one row of ids: `tokens` (n,) uint16 or int32, document i at tokens[starts[i]:starts[i + 1]].

    Each document begins with <bos>; one that its text spells out is <unk>, and so are <eos> and <pad>: a row that began
    with that would pass for one padded on the left. `names` and `starts` lead back to the text, `corpus` is the
    fingerprint of all of it.
    """

    tokens: np.ndarray
    starts: np.ndarray
    names: list[str]
    corpus: dict[str, dict]

    def __len__(self) -> int:
        return len(self.tokens)


def token_stream(
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    n_tokens: int | None = None,
    docs: Sequence[Document] | None = None,
) -> TokenStream:
    """The first `n_tokens` of a split (all of it by default), cached outside git by corpus, tokenizer and length.

    Documents come in the order of `documents`, in whatever order `docs` has them. Raises ValueError when the text is
    empty or has fewer tokens than asked for, and for a tokenizer without a <bos> token.
    """
    _check(split, tokenizer, n_tokens)
    everything = documents() if docs is None else docs
    corpus = fingerprint(everything)
    chosen = sorted((d for d in everything if split_of(d) == split), key=lambda d: d.digest)
    if not chosen:
        raise ValueError(f"the corpus has no {split!r} documents; pass more documents, or check the installed packages")
    backend, bos = _without_padding(tokenizer), tokenizer.bos_token_id
    spelt = _never_spelt(tokenizer)
    parts = (corpus, split, n_tokens, bos, backend.to_str(), spelt)
    path = cache_dir() / "tokens" / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}.safetensors"
    if not (arrays := _load(path)):
        with alone(path):
            arrays = _load(path) or _tokenise(chosen, backend, bos, spelt, n_tokens, path)
    starts = arrays["starts"]
    return TokenStream(arrays["tokens"], starts, [d.name for d in chosen[: len(starts) - 1]], corpus)


def text_for(subject: str, split: str, tokenizer: PreTrainedTokenizerBase, n_tokens: int) -> TokenStream:
    """Text for a notebook's subject dial: "hub" reads `HUB_TEXT` from the hub, the others read the packages."""
    if subject != "hub":
        return token_stream(split, tokenizer, n_tokens)
    docs = hub_documents(split, n_characters=8 * n_tokens)  # English has 4 to 5 characters a GPT-2 token
    return token_stream(split, tokenizer, n_tokens, docs)


def hub_documents(split: str, n_characters: int) -> list[Document]:
    """Documents of `HUB_TEXT`, streamed until there are enough; held-out ones by the same rule as the packages'.

    Raises what `hub.rows` raises.
    """
    found, total = [], 0
    for i, content in enumerate(hub.rows(HUB_TEXT, "text", "sample-10BT", instead=INSTEAD)):
        document = Document(HUB_TEXT, str(i), content)
        if split_of(document) == split:
            found.append(document)
            total += len(document.text)
        if total >= n_characters:
            break
    return found


def _read_package(package: str) -> Iterator[Document]:
    root = _root(package)
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if LEFT_OUT.isdisjoint(relative.parts[:-1]) and not path.name.startswith(OF_THE_BUILD):
            text = path.read_text(encoding="utf-8", errors="replace")
            if len(text) in LENGTHS and "automatically generated" not in text[:2000].lower():
                yield Document(package, relative.as_posix(), text)


def _root(package: str) -> Path:
    if package == "python":
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is part of the corpus and no installed package; install requirements.txt")
    return Path(next(iter(spec.submodule_search_locations)))


def _package_fingerprint(package: str, docs: list[Document]) -> dict:
    content = hashlib.sha256()
    for document in sorted(docs, key=lambda d: d.path):
        content.update(document.path.encode() + b"\0" + document.text.encode() + b"\0")
    return {"version": _version(package), "documents": len(docs), "sha256": content.hexdigest()}


def _version(package: str) -> str:
    if package == "python":
        return platform.python_version()
    try:
        return importlib.metadata.version(DISTRIBUTIONS.get(package, package)).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:  # text that comes from no installed package
        return ""


def _check(split: str, tokenizer: PreTrainedTokenizerBase, n_tokens: int | None) -> None:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected 'train' or 'heldout'")
    if n_tokens is not None and n_tokens < 1:
        raise ValueError(f"n_tokens is {n_tokens}; expected at least 1, or None for the whole split")
    if tokenizer.bos_token_id is None:
        raise ValueError("the tokenizer has no bos_token, which starts every document; set one of its special tokens")


def _without_padding(tokenizer: PreTrainedTokenizerBase) -> tokenizers.Tokenizer:
    """A copy of the backend: calling a tokenizer with padding or truncation leaves them switched on."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return backend


def _never_spelt(tokenizer: PreTrainedTokenizerBase) -> dict[int, int]:
    """Ids that no text may hold, and what stands for them there; none for a tokenizer whose <unk> is one of them."""
    marks = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    return {} if tokenizer.unk_token_id in marks | {None} else dict.fromkeys(sorted(marks), tokenizer.unk_token_id)


def _tokenise(
    docs: list[Document],
    backend: tokenizers.Tokenizer,
    bos: int,
    spelt: dict[int, int],
    n_tokens: int | None,
    path: Path,
) -> dict:
    """Encode documents until there are enough tokens; cut the last one to length; cache."""
    dtype = np.uint16 if backend.get_vocab_size() <= 2**16 else np.int32
    rows, total = [], 0
    for batch in (docs[i : i + 64] for i in range(0, len(docs), 64)):
        encoded = backend.encode_batch_fast([d.text for d in batch], add_special_tokens=False)
        rows += [np.array([bos, *(spelt.get(i, i) for i in e.ids)], dtype) for e in encoded]
        total = sum(map(len, rows))
        if n_tokens is not None and total >= n_tokens:
            break
    if n_tokens is not None and total < n_tokens:
        raise ValueError(f"the corpus has {total:,} tokens, {n_tokens:,} were asked for; ask for fewer")
    tokens = np.concatenate(rows)[:n_tokens]
    starts = np.minimum(np.cumsum([0, *map(len, rows)]), len(tokens))
    starts = starts[: np.searchsorted(starts, len(tokens)) + 1]  # drop documents behind the cut
    arrays = {"tokens": tokens, "starts": starts}
    with written_aside(path) as aside:
        safetensors.numpy.save_file(arrays, aside)
    return arrays


def _load(path: Path) -> dict | None:
    try:
        return safetensors.numpy.load_file(path)
    except (FileNotFoundError, safetensors.SafetensorError):  # none yet, or one cut short by an older crash
        return None
