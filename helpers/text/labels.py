r"""Ground truth for probes: binary labels for every character and token of a Python document, from its own syntax.

A label is a set of spans (`lexemes.py`, `syntax.py`); a character has it if a span covers the character. An expression
ends where `ast` says, before the parentheses that only group it. Inside an f-string there is only the string.

A token has the labels of its first character that is not white space, or, if it is nothing but white space, of its
first character. A byte-level tokenizer may cut a character into several tokens: each spans the whole character.

Why the first character: GPT-2's tokens start with the space before a word, and the word is what they are about.
"""

import ast
import re
import tokenize
import warnings

import numpy as np

from helpers.text.documents import PACKAGES, Document
from helpers.text.spans import Lexeme, Syntax, lexemes, lexical_spans

DESCRIPTIONS = {
    "keyword": "a reserved word, None, True and False among them",
    "constant": "None, True or False",
    "identifier": "a name that is no reserved word",
    "repeated_identifier": "a name that the document's code has used before",
    "snake_case": "a lower-case name with inner underscores",
    "camel_case": "a name that starts with a capital and has lower-case letters, no underscore",
    "all_caps": "a name of capitals, digits and underscores, two characters or more",
    "dunder": "a name between double underscores",
    "private": "a name with a leading underscore, not between double underscores",
    "builtin": "a lower-case name of the builtins module, used as a variable",
    "exception_name": "a name that ends in Error, Exception or Warning, or is a built-in exception without such an end",
    "self": "the name self",
    "number": "a number literal",
    "integer": "an integer literal",
    "float": "a floating-point literal",
    "string": "a string literal, docstrings aside",
    "f_string": "an f-string, all of it",
    "docstring": "the docstring of a module, class or function, with its quotes",
    "comment": "a comment",
    "operator": "an operator: no bracket, comma, colon, dot or semicolon",
    "comparison_operator": "one of == != < > <= >=",
    "assignment_operator": "= outside brackets, an augmented assignment, or :=",
    "opening_bracket": "one of ( [ {",
    "closing_bracket": "one of ) ] }",
    "comma": "a comma",
    "colon": "a colon",
    "dot": "a dot outside numbers and strings",
    "newline": "a line end outside strings",
    "indentation": "outside strings, the white space before an indented line, with the line ends in it",
    "blank_line": "white space that holds a blank line",
    "first_of_line": "the first character of a line that is not white space",
    "last_word_of_line": "the last word of a line, or run of punctuation",
    "function_name": "the name after def",
    "class_name": "the name after class",
    "argument_name": "the name of an argument where a function or lambda is defined",
    "default_value": "the default of an argument",
    "annotation": "a type annotation",
    "decorator": "a decorator, from its @",
    "keyword_argument": "the name before = in a call or class header",
    "called_name": "the name just before the brackets of a call",
    "attribute": "the name after the dot of an attribute",
    "assignment_target": "what stands left of an assignment",
    "import_statement": "an import statement",
    "module_name": "the module of an import statement",
    "return_statement": "a return statement",
    "raise_statement": "a raise statement",
    "assert_statement": "an assert statement",
    "condition": "the condition of an if, elif or while",
    "loop_header": "a for up to the end of its iterable, a while up to the end of its condition",
    "with_header": "a with statement up to the end of its last item",
    "exception_handler": "an except clause with its body",
    "comprehension": "a comprehension or generator expression",
    "lambda": "a lambda expression",
    "subscript": "what stands between the brackets of a subscript",
    "dict_literal": "a dict literal",
    "list_literal": "a list literal",
    "string_formatting": "a string literal formatted with % or .format, with its arguments",
    "module_level": "outside every function and class",
    "class_body": "the body of a class",
    "function_body": "the body of a function",
    "method_body": "the body of a function defined directly in a class",
    "nested_function": "the body of a function defined in a function",
    "block_depth_2": "a statement indented twice or more",
    "block_depth_3": "a statement indented three times or more",
    "in_brackets": "within brackets, these included",
    "in_brackets_2": "within two pairs of brackets or more, the inner one included",
    "first_sentence": "the first sentence of a docstring",
    "parameter_section": "the section of a docstring on parameters, numpy's or Google's style, with its title",
    "doctest": "from the prompt >>> to the end of its line",
    **{f"package_{package}": f"a document of {package}" for package in PACKAGES},
}
LABELS = tuple(DESCRIPTIONS)  # the order of the rows
ROWS = {label: row for row, label in enumerate(LABELS)}
EXCEPT = {"string": ("docstring",), "newline": ("string", "docstring"), "indentation": ("string", "docstring")}


def parses(text: str) -> bool:
    """Whether this interpreter can read `text` as Python, so that it has labels."""
    try:
        _read(_normalised(text)[0])
    except ValueError:
        return False
    return True


def label_tokens(document: Document, offsets: np.ndarray) -> np.ndarray:
    r"""Labels of each token: bool (n_labels, n_tokens), rows as in LABELS; see the module for the rule.

    `offsets` (n_tokens, 2) are the tokenizer's character spans, half open. An empty span (a special token) has no
    label: train the tokenizer with `trim_offsets=False`, or white space has empty spans. A byte
    order mark and the "\r" of "\r\n" have the labels of the character after them.
    Raises ValueError if the document is not Python that this interpreter can read, for an unknown package, and for
    spans that are no spans of the text.
    """
    spans = _checked(offsets, len(document.text))
    painted, column = _painted(document.text, document.package)
    column = np.append(column, painted.shape[1] - 1)  # one past the text: no labels
    return painted[:, column[_deciding(document.text, spans)]]


def _painted(text: str, package: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels of the normalised text, with a last column of no labels; and for each character of `text` its column."""
    if package not in PACKAGES:
        raise ValueError(
            f"unknown package {package!r}: expected one of {', '.join(PACKAGES)}; add it to helpers/text/documents.py"
        )
    clean, column = _normalised(text)
    painted = np.zeros((len(LABELS), len(clean) + 1), dtype=bool)
    tree, found = _read(clean)
    for label, start, end in (*lexical_spans(clean, found), *Syntax(clean, found).spans(tree)):
        painted[ROWS[label], start:end] = True
    for label, others in EXCEPT.items():
        painted[ROWS[label]] &= ~painted[[ROWS[other] for other in others]].any(axis=0)
    painted[ROWS[f"package_{package}"], :-1] = True
    return painted, column


def _read(text: str) -> tuple[ast.Module, list[Lexeme]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an invalid escape is the document's business
            return ast.parse(text), lexemes(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise ValueError(
            f"cannot label a document that Python does not parse ({error}): leave out those that `parses` refuses"
        ) from error


def _normalised(text: str) -> tuple[str, np.ndarray]:
    r"""The text as `ast` and `tokenize` both count it, "\n" at line ends and no mark; each character's place in it."""
    dropped = np.zeros(len(text), dtype=bool)
    dropped[[match.start() for match in re.finditer("^\ufeff|\r(?=\n)", text)]] = True
    clean = re.sub("^\ufeff|\r(?=\n)", "", text).replace("\r", "\n")
    return clean, np.cumsum(~dropped) - ~dropped


def _deciding(text: str, spans: np.ndarray) -> np.ndarray:
    """The character that decides for each span: its first that is not white space, else its first, else the end."""
    blank = np.strings.isspace(np.array([*text, ""], dtype="U1"))
    solid = np.where(blank, len(text), np.arange(len(text) + 1))
    next_solid = np.minimum.accumulate(solid[::-1])[::-1]
    start, end = spans.T
    return np.where(start == end, len(text), np.where(next_solid[start] < end, next_solid[start], start))


def _checked(offsets: np.ndarray, n_chars: int) -> np.ndarray:
    spans = np.asarray(offsets)
    if spans.ndim != 2 or spans.shape[1] != 2 or spans.dtype.kind not in "iu":
        raise ValueError(f"offsets are {spans.dtype} {spans.shape}: expected integers of shape (n_tokens, 2)")
    if (spans < 0).any() or (spans > n_chars).any() or (spans[:, 0] > spans[:, 1]).any():
        raise ValueError(f"an offset lies outside the {n_chars} characters: tokenize this very text, without changes")
    return spans
