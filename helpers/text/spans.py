"""What `tokenize` and `ast` know of a Python document, as spans: (label, start, end) in characters, half open.

    tokenize   lexical classes, names, brackets and blocks, and what lines tell
    ast        the roles of expressions, their scopes, and the parts of docstrings

The document has "\\n" line ends. Python 3.12 cuts an f-string into tokens, 3.11 does not, and its `ast` has no reliable
positions there. Here an f-string is always one string, so that the spans do not depend on the version.
"""

import ast
import builtins
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
PUNCTUATION = {  # labels of what `tokenize` calls OP; of all others, "operator" alone
    **dict.fromkeys(OPENING, ("opening_bracket",)),
    **dict.fromkeys(CLOSING, ("closing_bracket",)),
    **{",": ("comma",), ":": ("colon",), ".": ("dot",), ";": (), "...": ()},
    **dict.fromkeys(COMPARISONS, ("operator", "comparison_operator")),
}
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
            yield from ((label, start, end) for label in PUNCTUATION.get(text, ("operator",)))


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


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SCOPES = (*FUNCTIONS, ast.ClassDef)
F_STRINGS = (ast.JoinedStr, getattr(ast, "TemplateStr", ast.JoinedStr))  # template strings came with 3.14

WHOLE = {  # the whole node
    ast.Import: "import_statement",
    ast.ImportFrom: "import_statement",
    ast.Return: "return_statement",
    ast.Raise: "raise_statement",
    ast.Assert: "assert_statement",
    ast.ExceptHandler: "exception_handler",
    ast.Lambda: "lambda",
    ast.Dict: "dict_literal",
    ast.List: "list_literal",
    **dict.fromkeys((ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp), "comprehension"),
}
PARTS = {  # some of its fields; of a list, each member
    ast.If: {"test": "condition"},
    ast.While: {"test": "condition"},
    ast.Subscript: {"slice": "subscript"},
    ast.Assign: {"targets": "assignment_target"},
    ast.AugAssign: {"target": "assignment_target"},
    ast.AnnAssign: {"target": "assignment_target", "annotation": "annotation"},
    ast.arg: {"annotation": "annotation"},
    ast.arguments: {"defaults": "default_value", "kw_defaults": "default_value"},
    **dict.fromkeys(FUNCTIONS, {"returns": "annotation"}),
}
HEADERS = {  # from its start to the end of this
    ast.While: ("loop_header", lambda node: node.test),
    **dict.fromkeys((ast.For, ast.AsyncFor), ("loop_header", lambda node: node.iter)),
    **dict.fromkeys(
        (ast.With, ast.AsyncWith),
        ("with_header", lambda node: node.items[-1].optional_vars or node.items[-1].context_expr),
    ),
}
NUMBERS = {int: "integer", float: "float"}
BUILTINS = frozenset(name for name in dir(builtins) if name.islower() and name[0] != "_") - {
    *("copyright", "credits", "exit", "help", "license", "quit")  # not the language's: added by `site`
}
NAMED = {ast.arg: "argument_name", ast.keyword: "keyword_argument"}  # a node that starts with its name
FROM_MODULE = re.compile(r"from\b\s*(.*?)\s*\bimport\b", re.DOTALL)
DOTTED_NAME = re.compile(r"[\w.]+")
QUOTE = re.compile(r"""\w*("{3}|'{3}|"|')\s*""")
SENTENCE_END = re.compile(r"(?<=[.!?])(?=\s|\Z)|\n[^\S\n]*\n|\s*+\Z")
PARAMETERS = re.compile(  # numpy's style, up to the next underlined title; Google's, as far as it is indented
    r"^(?P<indent>[ \t]*)(?:Other )?Parameters[ \t]*\n[ \t]*---+[ \t]*\n(?s:.*?)(?=^(?P=indent)\S.*\n[ \t]*---+|\Z)|"
    r"^(?P<margin>[ \t]*)(?:Arg(?:ument)?s|Parameters|Keyword Arg\w*):[ \t]*\n(?:(?P=margin)[ \t]+\S.*\n?|[ \t]*\n)*",
    re.MULTILINE,
)


def walk(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.AST | None]]:
    """Each node with the function or class it stands in; nothing inside an f-string."""
    stack: list[tuple[ast.AST, ast.AST | None]] = [(tree, None)]
    while stack:
        node, scope = stack.pop()
        yield node, scope
        inner = node if isinstance(node, SCOPES) else scope
        if not isinstance(node, F_STRINGS):
            stack.extend((child, inner) for child in ast.iter_child_nodes(node))


class Syntax:
    """The spans of a parsed document. Its lexemes tell where the names stand, for which `ast` has no position."""

    def __init__(self, text: str, lexemes: list[Lexeme]):
        self.text, self.lines, self.starts = text, text.split("\n"), line_starts(text)
        self.name_end = {lexeme.start: lexeme.end for lexeme in lexemes if lexeme.kind == "NAME"}
        self.name_start = {end: start for start, end in self.name_end.items()}

    def spans(self, tree: ast.Module) -> Iterator[Span]:
        """All spans, in no particular order."""
        outermost = []
        for node, scope in walk(tree):
            yield from self._tabled(node)
            if type(node) in DETAILS:
                yield from DETAILS[type(node)](self, node)
            if isinstance(node, SCOPES):
                yield from self._scope(node, scope)
                outermost += [] if scope else [self._place(node)]
        yield from self._outside(outermost)

    def _tabled(self, node: ast.AST) -> Iterator[Span]:
        kind = type(node)
        if kind in WHOLE:
            yield WHOLE[kind], *self._place(node)
        for field, label in PARTS.get(kind, {}).items():
            yield from ((label, *self._place(part)) for part in _listed(getattr(node, field)))
        if kind in HEADERS:
            label, last_part = HEADERS[kind]
            yield label, self._start(node), self._end(last_part(node))
        if kind in NAMED and node.arg:  # None for **options
            yield NAMED[kind], self._start(node), self.name_end[self._start(node)]

    def _scope(self, node: ast.AST, outer: ast.AST | None) -> Iterator[Span]:
        """Body and decorators of a function or class that stands in `outer`."""
        for label in _body_labels(node, outer):
            yield label, self._first(node.body[0]), self._end(node.body[-1])
        for decorator in node.decorator_list:
            yield "decorator", self._at_sign(decorator), self._end(decorator)

    def _outside(self, scopes: list[tuple[int, int]]) -> Iterator[Span]:
        """What lies between the outermost functions and classes."""
        starts = [0, *sorted(end for _, end in scopes)]
        ends = [*sorted(start for start, _ in scopes), len(self.text)]
        yield from (("module_level", start, end) for start, end in zip(starts, ends, strict=True))

    def _docstring(self, node: ast.AST) -> Iterator[Span]:
        if not (node.body and isinstance(node.body[0], ast.Expr) and _is_text(node.body[0].value)):
            return
        start, end = self._place(node.body[0].value)
        yield "docstring", start, end
        opening = QUOTE.match(self.text, start, end)
        inside, closing = opening.end(), end - len(opening[1])
        yield "first_sentence", inside, SENTENCE_END.search(self.text, inside, closing).start()
        for section in PARAMETERS.finditer(self.text, inside, closing):
            yield "parameter_section", *section.span()

    def _call(self, node: ast.Call) -> Iterator[Span]:
        yield from self._name_before("called_name", self._end(node.func))
        if isinstance(node.func, ast.Attribute) and node.func.attr == "format" and _is_text(node.func.value):
            yield "string_formatting", *self._place(node)

    def _operation(self, node: ast.BinOp) -> Iterator[Span]:
        if isinstance(node.op, ast.Mod) and (_is_text(node.left) or isinstance(node.left, ast.JoinedStr)):
            yield "string_formatting", *self._place(node)

    def _attribute(self, node: ast.Attribute) -> Iterator[Span]:
        yield from self._name_before("attribute", self._end(node))

    def _name(self, node: ast.Name) -> Iterator[Span]:
        if node.id in BUILTINS:
            yield "builtin", *self._place(node)

    def _constant(self, node: ast.Constant) -> Iterator[Span]:
        if type(node.value) in NUMBERS:
            yield NUMBERS[type(node.value)], *self._place(node)

    def _import(self, node: ast.Import) -> Iterator[Span]:
        for alias in node.names:
            yield "module_name", *DOTTED_NAME.match(self.text, self._start(alias)).span()

    def _import_from(self, node: ast.ImportFrom) -> Iterator[Span]:
        yield "module_name", *FROM_MODULE.match(self.text, self._start(node)).span(1)

    def _name_before(self, label: str, end: int) -> Iterator[Span]:
        if end in self.name_start:
            yield label, self.name_start[end], end

    def _first(self, statement: ast.stmt) -> int:
        decorators = getattr(statement, "decorator_list", [])
        return self._at_sign(decorators[0]) if decorators else self._start(statement)

    def _at_sign(self, decorator: ast.expr) -> int:
        return self.text.rindex("@", 0, self._start(decorator))

    def _place(self, node: ast.AST) -> tuple[int, int]:
        return self._start(node), self._end(node)

    def _start(self, node: ast.AST) -> int:
        return self._offset(node.lineno, node.col_offset)

    def _end(self, node: ast.AST) -> int:
        return self._offset(node.end_lineno, node.end_col_offset)

    def _offset(self, lineno: int, column: int) -> int:
        line = self.lines[lineno - 1]  # its columns count bytes of UTF-8
        return self.starts[lineno - 1] + (column if line.isascii() else len(line.encode()[:column].decode()))


DETAILS = {
    **dict.fromkeys((ast.Module, *SCOPES), Syntax._docstring),
    ast.Call: Syntax._call,
    ast.BinOp: Syntax._operation,
    ast.Attribute: Syntax._attribute,
    ast.Name: Syntax._name,
    ast.Constant: Syntax._constant,
    ast.Import: Syntax._import,
    ast.ImportFrom: Syntax._import_from,
}


def _body_labels(node: ast.AST, outer: ast.AST | None) -> list[str]:
    if isinstance(node, ast.ClassDef):
        return ["class_body"]
    inner = [] if outer is None else ["method_body" if isinstance(outer, ast.ClassDef) else "nested_function"]
    return ["function_body", *inner]


def _listed(field: ast.AST | list[ast.AST | None] | None) -> list[ast.AST]:
    return [part for part in (field if isinstance(field, list) else [field]) if part]


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
