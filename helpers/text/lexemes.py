r"""What `tokenize` knows of a Python document: its lexical classes, names, brackets and blocks; and what lines tell.

Everything is a span: (label, start, end) in characters, half open. The document has "\n" line ends.

Python 3.12 cuts an f-string into tokens, 3.11 does not. Here it is always one string, so that the spans do not
depend on the version: nothing inside an f-string has a span of its own.
"""

import functools
import io
import keyword
import re
import tokenize
from collections.abc import Iterable, Iterator
from typing import NamedTuple

Span = tuple[str, int, int]

OPENING, CLOSING = frozenset("([{"), frozenset(")]}")
COMPARISONS = frozenset(("==", "!=", "<", ">", "<=", ">="))
PUNCTUATION = dict.fromkeys(OPENING, "opening_bracket") | dict.fromkeys(CLOSING, "closing_bracket")
PUNCTUATION |= {",": "comma", ":": "colon", ".": "dot"}
NOT_OPERATORS = frozenset((*PUNCTUATION, ";", "..."))
LAYOUT = frozenset(("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT"))
CONSTANTS = frozenset(("None", "True", "False"))
ROLES = {"def": "function_name", "class": "class_name"}
STYLES = {
    "snake_case": re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)+"),
    "camel_case": re.compile(r"[A-Z][A-Za-z0-9]*[a-z][A-Za-z0-9]*"),
    "all_caps": re.compile(r"[A-Z][A-Z0-9_]+"),
    "dunder": re.compile(r"__\w+__"),
    "private": re.compile(r"_(?!_\w*__$)\w+"),
    "exception_name": re.compile(r"\w*(Error|Exception|Warning)|StopIteration|KeyboardInterrupt|SystemExit"),
    "self": re.compile("self"),
}
DEPTHS = {
    ("bracket", 1): "in_brackets",
    ("bracket", 2): "in_brackets_2",
    ("block", 2): "block_depth_2",
    ("block", 3): "block_depth_3",
    ("=", 0): "assignment_operator",  # brackets tell it from a default value and a keyword argument
}
LINES = {  # the group named `span`; possessive (++), or a long line costs its length squared
    "first_of_line": re.compile(r"^[^\S\n]*+(?P<span>\S)", re.MULTILINE),
    "last_word_of_line": re.compile(r"(?P<span>(?<!\w)\w++|(?<![^\w\s])[^\w\s]++)(?=[^\S\n]*+$)", re.MULTILINE),
    "newline": re.compile(r"(?P<span>\n)"),
    "indentation": re.compile(r"(?P<span>(?<!\s)[^\S\n]*+\n\s*+)(?<=[ \t])(?=\S)"),
    "blank_line": re.compile(r"(?P<span>(?<!\s)[^\S\n]*+\n[^\S\n]*+\n\s*+)"),
    "doctest": re.compile(r"^[^\S\n]*+(?P<span>>>>.*)", re.MULTILINE),
}
_F_STRING = re.compile(r"[rR]?[fFtT]")


class Lexeme(NamedTuple):
    kind: str  # the name in the `token` module
    text: str
    start: int
    end: int


def lexemes(text: str) -> list[Lexeme]:
    """Tokens of `text` with character positions. Raises what `tokenize` raises, and SyntaxError for an unknown one."""
    found = [Lexeme(kind, text[start:end], start, end) for kind, start, end in fold(_tokens(text))]
    if any(lexeme.kind == "ERRORTOKEN" for lexeme in found):
        raise SyntaxError("a character unknown to `tokenize`")
    return found


def _tokens(text: str) -> Iterator[Span]:
    starts = [*line_starts(text), len(text)]  # the last token lies on the line below the text
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        start = starts[token.start[0] - 1] + token.start[1]
        yield tokenize.tok_name[token.type], start, start + len(token.string)  # 3.12.1 has false ends in non-ASCII text


def line_starts(text: str) -> list[int]:
    """The first character of each line."""
    return [0, *(newline.end() for newline in re.finditer("\n", text))]


def fold(tokens: Iterable[Span]) -> Iterator[Span]:
    """Make one STRING of the parts into which Python 3.12 cuts an f-string; all else passes unchanged."""
    depth, begin = 0, 0
    for kind, start, end in tokens:
        if kind.endswith("STRING_START"):
            begin = begin if depth else start
            depth += 1
        elif kind.endswith("STRING_END"):
            depth -= 1
            if not depth:
                yield "STRING", begin, end
        elif not depth:
            yield kind, start, end


def lexical_spans(text: str, found: list[Lexeme]) -> Iterator[Span]:
    """Spans of the lexemes `found` in `text`, and of its lines."""
    yield from _classes(found)
    yield from _names(found)
    yield from ((DEPTHS[key], start, end) for key, start, end in _nested(found) if key in DEPTHS)
    for label, pattern in LINES.items():
        yield from ((label, *match.span("span")) for match in pattern.finditer(text))


def _classes(found: list[Lexeme]) -> Iterator[Span]:
    for kind, text, start, end in found:
        if kind in ("COMMENT", "NUMBER", "STRING"):
            yield kind.lower(), start, end
        if kind == "STRING" and _F_STRING.match(text):
            yield "f_string", start, end
        if kind == "OP":
            yield from ((label, start, end) for label in _operator_labels(text))


@functools.cache
def _operator_labels(text: str) -> tuple[str, ...]:
    if text in NOT_OPERATORS:
        return (PUNCTUATION[text],) if text in PUNCTUATION else ()
    return ("operator", "comparison_operator") if text in COMPARISONS else ("operator",)


def _names(found: list[Lexeme]) -> Iterator[Span]:
    seen, previous = set(), ""
    for kind, text, start, end in found:
        if kind == "NAME":
            yield from ((label, start, end) for label in _name_labels(text, text in seen, ROLES.get(previous)))
            seen.add(text)
        previous = text


@functools.lru_cache(maxsize=2**16)
def _name_labels(name: str, repeated: bool, role: str | None) -> tuple[str, ...]:
    if keyword.iskeyword(name):
        return ("keyword", "constant") if name in CONSTANTS else ("keyword",)
    styles = (style for style, pattern in STYLES.items() if pattern.fullmatch(name))
    return ("identifier", *styles, *["repeated_identifier"] * repeated, *[role] * bool(role))


def _nested(found: list[Lexeme]) -> Iterator[tuple[tuple[str, int], int, int]]:
    """Brackets and blocks with their depth, from first to last lexeme; assignments with the brackets around them."""
    brackets, blocks, last_end = [], [], 0
    for kind, text, start, end in found:
        if kind == "INDENT":
            blocks.append(end)
        elif kind == "DEDENT":
            yield ("block", len(blocks)), blocks.pop(), last_end
        elif text in OPENING:
            brackets.append(start)
        elif text in CLOSING:
            yield ("bracket", len(brackets)), brackets.pop(), end
        elif kind == "OP" and text[-1] == "=" and text not in COMPARISONS:
            yield ("=", 0 if text == ":=" else len(brackets)), start, end
        if kind not in LAYOUT:
            last_end = end
