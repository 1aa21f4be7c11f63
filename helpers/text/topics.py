"""What the dialogues are about: documented functions of the packages, read from their source.

    topic    a public function or method: its name, module and parameters, and the first sentence of its docstring
    split    by the hash of the function's name: one name in five is held out, in every package at once

A made-up name for the dialogues about unknown functions is split by the same rule. It is spelt with letters that are
rare in Python source, which is what makes it recognisable.
"""

import ast
import dataclasses
import functools
import hashlib
import itertools
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from helpers.text.documents import PACKAGES, SPLITS, Document, documents

DOCUMENTS = 120  # of each package: enough names, and read within seconds
HELD_OUT = 5  # one name in so many
N_PARAMETERS = range(1, 5)
NAME = re.compile(r"[a-z][a-z0-9_]{3,23}")
MODULE_LENGTH = 36  # characters at most: an answer repeats it
SUMMARY = re.compile(r"[A-Z][A-Za-z0-9 ,()/_'-]{14,79}\.(?=\s|$)")  # one plain sentence
RARE, VOWELS = "zqxvjkw", "aeiou"


@dataclasses.dataclass(frozen=True)
class Topic:
    """A documented function. `module` is the name to import it from; `summary` ends in a full stop."""

    package: str
    module: str
    name: str
    parameters: tuple[str, ...]
    summary: str

    @property
    def call(self) -> str:
        return f"{self.name}({', '.join(self.parameters)})"


def split_of_name(name: str) -> str:
    """ "heldout" for one name in five, "train" for the others; decided by the name alone."""
    return "heldout" if int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % HELD_OUT == 0 else "train"


def find_topics(docs: Iterable[Document]) -> list[Topic]:
    """The topics of the first `DOCUMENTS` documents of each package, one per name, in the order of the documents."""
    seen, unique = Counter(), {}
    for document in docs:
        seen[document.package] += 1
        if document.package in PACKAGES and seen[document.package] <= DOCUMENTS:
            for topic in _topics_of(document):
                unique.setdefault(topic.name, topic)
    return list(unique.values())


@functools.lru_cache(maxsize=1)
def corpus_topics() -> tuple[Topic, ...]:
    """The topics of the installed packages. Takes some seconds at the first call."""
    return tuple(find_topics(documents()))


def topics_of_split(topics: Sequence[Topic], split: str) -> list[Topic]:
    """Topics whose names are of the split. Raises ValueError for fewer than three, or from fewer than two packages."""
    chosen = [topic for topic in topics if split_of_name(topic.name) == split]
    if len(chosen) < 3 or len({topic.package for topic in chosen}) < 2:
        found = f"split {split!r} has {len(chosen)} topics"
        raise ValueError(f"{found}; a dialogue needs three, from two packages: pass documents with more functions")
    return chosen


def made_up_name(rng: random.Random, split: str) -> str:
    """A function name that no package has, such as `zuqe_vajix`, of the split."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected 'train' or 'heldout'")
    names = (f"{_nonsense(rng)}_{_nonsense(rng)}" for _ in itertools.count())
    return next(name for name in names if split_of_name(name) == split)


def _nonsense(rng: random.Random) -> str:
    syllables = [rng.choice(RARE) + rng.choice(VOWELS) for _ in range(rng.randint(1, 2))]
    return "".join(syllables) + rng.choice(RARE)


def _topics_of(document: Document) -> Iterator[Topic]:
    module = _module(document)
    if len(module) <= MODULE_LENGTH:
        for node in _functions(document.text):
            parameters = tuple(a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls"))
            summary = SUMMARY.match(" ".join((ast.get_docstring(node) or "").split()))
            if summary and NAME.fullmatch(node.name) and len(parameters) in N_PARAMETERS:
                yield Topic(document.package, module, node.name, parameters, summary.group())


def _module(document: Document) -> str:
    parts = document.path.removesuffix(".py").removesuffix("/__init__").split("/")
    return ".".join(parts if document.package == "python" else [document.package, *parts])


def _functions(text: str) -> list[ast.FunctionDef]:
    """Functions of the module and methods of its classes."""
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError):  # Python 2, or a template
        return []
    body += [node for outer in body if isinstance(outer, ast.ClassDef) for node in outer.body]
    return [node for node in body if isinstance(node, ast.FunctionDef)]
