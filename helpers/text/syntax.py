"""What `ast` knows of a Python document: the roles of its expressions, their scopes, and the parts of its docstrings.

Everything is a span: (label, start, end) in characters, half open. The walk stops at an f-string: before Python 3.12
the positions inside it are not reliable.
"""

import ast
import builtins
import re
from collections.abc import Iterator

from helpers.text.lexemes import Lexeme, Span, line_starts

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

    def _argument(self, node: ast.arg) -> Iterator[Span]:
        start = self._start(node)
        yield "argument_name", start, self.name_end[start]

    def _keyword(self, node: ast.keyword) -> Iterator[Span]:
        if node.arg:  # None for **options
            start = self._start(node)
            yield "keyword_argument", start, self.name_end[start]

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
    ast.arg: Syntax._argument,
    ast.keyword: Syntax._keyword,
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
