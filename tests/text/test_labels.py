import contextlib
import itertools
import random
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.text.documents import PACKAGES, Document, train_tokenizer
from helpers.text.labels import DESCRIPTIONS, LABELS, label_tokens, parses
from helpers.text.spans import fold

SOURCE = '''"""Areas of things. In metres.

>>> area(2)
4.0
"""
from os import path

import math as m

LIMIT = 10


class Square(Base, tag=1):
    """A square."""

    @property
    def area_of(self, side: int = 2) -> float:
        """Multiply.

        Args:
            side: in metres

        Returns:
            the area
        """
        # no unit
        def inner(x):
            return -x

        if side != 1.5 and side:
            raise ValueError("%d" % side)
        for i in range(3):
            with open(f"{i + 1:>{m}}") as _f:
                try:
                    assert {"a": [i]}[0]
                except OSError:
                    total = [n for n in (1, (2, 3))]
        return sorted(None, key=lambda k: k.__len__)
'''
# Each stretch that carries the label, in order; "first ... last" stands for all that lies between.
EXPECTED = {
    "keyword": "from import import as class def def return if and raise for in with as try assert except for in return"
    " None lambda",
    "constant": "None",
    "identifier": "os path math m LIMIT Square Base tag property area_of self side int float inner x x side side"
    " ValueError side i range open _f i OSError total n n sorted key k k __len__",
    "repeated_identifier": "x side side side i n k",
    "snake_case": "area_of",
    "camel_case": "Square Base ValueError OSError",
    "all_caps": "LIMIT",
    "dunder": "__len__",
    "private": "_f",
    "builtin": "property int float range open sorted",
    "exception_name": "ValueError OSError",
    "self": "self",
    "number": "10 1 2 1.5 3 0 1 2 3",
    "integer": "10 1 2 3 0 1 2 3",
    "float": "1.5",
    "string": ['"%d"', 'f"{i + 1:>{m}}"', '"a"'],
    "f_string": ['f"{i + 1:>{m}}"'],
    "docstring": ['"""Areas ... """', '"""A square."""', '"""Multiply. ... """'],
    "comment": ["# no unit"],
    "operator": "= = @ = -> - != % = =",
    "comparison_operator": "!=",
    "assignment_operator": "= =",
    "opening_bracket": "( ( ( ( ( ( { [ [ [ ( ( (",
    "closing_bracket": ") ) ) ) ) ) ]} ] ))] )",
    "comma": ", , , , ,",
    "colon": ": : : : : : : : : : :",
    "dot": ".",
    "first_sentence": ["Areas of things.", "A square.", "Multiply."],
    "parameter_section": ["        Args:\n            side: in metres\n\n"],
    "doctest": [">>> area(2)"],
    "function_name": "area_of inner",
    "class_name": "Square",
    "argument_name": "self side x k",
    "default_value": "2",
    "annotation": "int float",
    "decorator": "@property",
    "keyword_argument": "tag key",
    "called_name": "ValueError range open sorted",
    "attribute": "__len__",
    "assignment_target": "LIMIT total",
    "import_statement": ["from os import path", "import math as m"],
    "module_name": "os math",
    "return_statement": ["return -x", "return sorted ... __len__)"],
    "raise_statement": ['raise ValueError("%d" % side)'],
    "assert_statement": ['assert {"a": [i]}[0]'],
    "condition": ["side != 1.5 and side"],
    "loop_header": ["for i in range(3)"],
    "with_header": ['with open(f"{i + 1:>{m}}") as _f'],
    "exception_handler": ["except OSError: ... (2, 3))]"],
    "comprehension": ["[n for n in (1, (2, 3))]"],
    "lambda": ["lambda k: k.__len__"],
    "subscript": "0",
    "dict_literal": ['{"a": [i]}'],
    "list_literal": ["[i]"],
    "string_formatting": ['"%d" % side'],
    "module_level": ['"""Areas ... 10\n\n\n', "\n"],
    "class_body": ['"""A square ... k.__len__)'],
    "function_body": ['"""Multiply ... k.__len__)'],
    "method_body": ['"""Multiply ... k.__len__)'],
    "nested_function": ["return -x"],
    "block_depth_2": ['"""Multiply ... k.__len__)'],
    "block_depth_3": ["return -x", 'raise ValueError("%d" % side)', "with open ... (2, 3))]"],
    "in_brackets": [
        *("(Base, tag=1)", "(self, side: int = 2)", "(x)", '("%d" % side)', "(3)", '(f"{i + 1:>{m}}")'),
        *('{"a": [i]}[0]', "[n for n in (1, (2, 3))]", "(None, key=lambda k: k.__len__)"),
    ],
    "in_brackets_2": ["[i]", "(1, (2, 3))"],
}


def label_characters(text, package):
    """Labels of each character, as a tokenizer would have them that makes a token of each."""
    each = np.arange(len(text))
    return label_tokens(Document(package, "x.py", text), np.stack([each, each + 1], 1))


def test_every_label_of_a_small_document_is_where_a_reader_puts_it():
    rows = label_characters(SOURCE, "python")
    for label, expected in EXPECTED.items():
        found = stretches(SOURCE, rows[LABELS.index(label)])
        expected = expected.split() if isinstance(expected, str) else expected
        assert len(found) == len(expected), (label, found)
        for text, pattern in zip(found, expected, strict=True):
            first, _, last = pattern.partition(" ... ")
            assert text == pattern or last and text.startswith(first) and text.endswith(last), (label, text)


def stretches(text: str, row: np.ndarray) -> list[str]:
    marked = itertools.groupby(zip(text, row, strict=True), key=lambda pair: pair[1])
    return ["".join(char for char, _ in group) for on, group in marked if on]


LINES = {  # label: the document, and the document with each labelled character replaced by ^
    "newline": ("'''\n'''\na\n\n  # b\nc = '''\n'''\n", "'''\n'''^a^^  # b^c = '''\n'''^"),
    "indentation": ("if a:\n\n    b  \n\n  # c\nd = '''\n  '''\n", "if a:^^^^^^b^^^^^^# c\nd = '''\n  '''\n"),
    "blank_line": ("a\nb \n\t\n\n c = '''\n\n'''\n".replace(" c", "c"), "a\nb^^^^^c = '''^^'''\n"),
    "first_of_line": ("aa\nif b:\n    cc; d\n", "^a\n^f b:\n    ^c; d\n"),
    "last_word_of_line": ("a_1, b_2 \nf(x()),\n# end.\n'c'", "a_1, ^^^ \nf(x^^^^\n# end^\n'c^"),
    "doctest": ("'''\n  >>> f(1) \n1\n'''", "'''\n  ^^^^^^^^^\n1\n'''"),
}


@pytest.mark.parametrize("label", LINES)
def test_labels_of_lines_and_white_space(label):
    text, expected = LINES[label]
    row = label_characters(text, "python")[LABELS.index(label)]
    assert "".join("^" if on else char for char, on in zip(text, row, strict=True)) == expected


def test_every_label_is_covered_by_an_example_and_described():
    packages = {f"package_{package}" for package in PACKAGES}
    assert set(LABELS) == set(EXPECTED) | set(LINES) | packages
    assert len(LABELS) == len(set(LABELS)) >= 40
    assert list(DESCRIPTIONS) == list(LABELS) and all("\n" not in line for line in DESCRIPTIONS.values())


@pytest.mark.parametrize("package", PACKAGES)
def test_a_document_carries_the_label_of_its_package_alone(package):
    rows = label_characters("x = 1\n", package)
    own = LABELS.index(f"package_{package}")
    assert rows[own].all()
    assert not rows[[i for i, label in enumerate(LABELS) if label.startswith("package_") and i != own]].any()


PARTS = {  # label: a document, and what carries the label
    "parameter_section": {
        '"""F.\n\nParameters\n----------\na : int\n    An a.\n\nReturns\n-------\nb\n"""': [
            "Parameters\n----------\na : int\n    An a.\n\n"
        ],
        '"""F.\n\nArgs:\n    a: one\n\n    b: two\nAll."""': ["Args:\n    a: one\n\n    b: two\n"],
        '"""Parameters matter."""': [],
    },
    "first_sentence": {
        "'''One, 1.5 or\ntwo. Three.'''": ["One, 1.5 or\ntwo."],
        'r"""\n  No full stop\n\n  More. """': ["No full stop"],
        '"One line "': ["One line"],
        '""': [],
    },
    "module_name": {
        "from . import a": ["."],
        "from .import a": ["."],
        "from .import_a.b import(c)": [".import_a.b"],
        "import a.b as c, d": ["a.b", "d"],
    },
    "f_string": {"a = rf'{b}' f'c' u'd'": ["rf'{b}'", "f'c'"]},
    "string_formatting": {
        "a % b, '%s' % (b,), f'{c}%s' % b, '{}'.format(1), d.format(2), 'e' + f": [
            *("'%s' % (b,)", "f'{c}%s' % b", "'{}'.format(1)")
        ]
    },
    "assignment_operator": {"a = b == (c := 1)\nd += e(f=1)": ["=", ":=", "+="]},
    "condition": {"if (a): b\nelif (c\n or (d)): e\nwhile (): f": ["a", "c\n or (d)", "()"]},
    "default_value": {"def f(a, b=1, *, c, d={}): pass": ["1", "{}"]},
    "method_body": {"class A:\n  if b:\n    @c\n    async def d(self): return 1\ndef e(self): 2": ["return 1"]},
    "nested_function": {
        "def a():\n  class B:\n    def c(self): 1\n  def d():\n    @e\n    def f(): 2": [
            "@e\n    def f(): 2",
        ]
    },
    "module_level": {"a\n@b\ndef c(): 1\nd": ["a\n@b\n", "\nd"]},
    "block_depth_2": {"if a:\n if b:\n  c\n  # d\n # e\n\nf": ["c"]},
    "keyword_argument": {"f(a, *b, c=1, **d)": ["c"]},
    "operator": {"a = ...; b @= c.d": ["=", "@="]},
    "integer": {"a = True, 1, 2j, 0xe, 3.0": ["1", "0xe"]},
    "builtin": {"print(self.max, __import__, ValueError, exit, id=True)": ["print"]},
    "with_header": {"with a: b\nwith (c as d, e): f": ["with a", "with (c as d, e"]},
    "private": {"_a, __b, __c__, _, d_": ["_a", "__b"]},
}


@pytest.mark.parametrize(("label", "text"), [(label, text) for label in PARTS for text in PARTS[label]])
def test_the_edges_of_a_label(label, text):
    assert stretches(text, label_characters(text, "python")[LABELS.index(label)]) == PARTS[label][text]


class Writer:
    """Writes a random program and, with each character, the labels it has: the truth by construction."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.text, self.labels = "", []
        self.around, self.seen, self.depth, self.scopes = [], set(), 0, []
        self.line_end = self.random.choice(("\n", "\r\n"))
        self.step = self.random.choice((" ", "    ", "\t"))

    def write(self, text: str, *labels: str) -> None:
        self.text += text
        self.labels += [{*self.around, *labels}] * len(text)

    @contextlib.contextmanager
    def inside(self, *labels: str):
        self.around += labels
        yield
        del self.around[len(self.around) - len(labels) :]

    @contextlib.contextmanager
    def brackets(self, pair: str):
        self.depth += 1
        with self.inside(*(["in_brackets"] + ["in_brackets_2"] * (self.depth > 1))):
            self.write(pair[0], "opening_bracket")
            yield
            self.write(pair[1], "closing_bracket")
        self.depth -= 1

    def name(self, *labels: str) -> None:
        name = self.random.choice(("x", "größe", "long_name", "self", "日本"))
        extra = {"long_name": ["snake_case"], "self": ["self"]}.get(name, [])
        self.write(name, "identifier", *extra, *labels, *["repeated_identifier"] * (name in self.seen))
        self.seen.add(name)

    def expression(self, size: int = 3) -> None:
        leaves = [self.integer, self.float, self.name, self.string, self.f_string, self.constant]
        inner = [self.call, self.list, self.dict, self.lambda_, self.comprehension, self.item, self.comparison]
        self.random.choice(leaves + inner * (size > 0))(*[size - 1] * (size > 0))

    def integer(self, _=0) -> None:
        self.write(self.random.choice(("0", "12", "0xfe")), "number", "integer")

    def float(self, _=0) -> None:
        self.write(self.random.choice(("1.5", "2e3")), "number", "float")

    def string(self, _=0) -> None:
        self.write(self.random.choice(("'a'", '"日本 = 1"', f"'''ü{self.line_end}  b'''", "r'\\d'")), "string")

    def f_string(self, _=0) -> None:
        text = self.random.choice(("f'{x}'", "f'日{x + [1][0]!r:>{y}}本'", f"f'''{{x}}{self.line_end}{{{{ü}}}}'''"))
        self.write(text, "string", "f_string")

    def constant(self, _=0) -> None:
        self.write("None", "keyword", "constant")

    def call(self, size: int) -> None:
        self.name("called_name")
        with self.brackets("()"):
            self.expression(size)
            self.write(",", "comma")
            self.write("größe", "identifier", "keyword_argument", *["repeated_identifier"] * ("größe" in self.seen))
            self.seen.add("größe")
            self.write("=", "operator")
            self.expression(size)

    def list(self, size: int) -> None:
        with self.inside("list_literal"), self.brackets("[]"):
            self.expression(size)

    def dict(self, size: int) -> None:
        with self.inside("dict_literal"), self.brackets("{}"):
            self.expression(size)
            self.write(":", "colon")
            self.expression(size)

    def lambda_(self, size: int) -> None:
        with self.inside("list_literal"), self.brackets("[]"), self.inside("lambda"):
            self.write("lambda", "keyword")
            self.write(" ")
            self.name("argument_name")
            self.write(":", "colon")
            self.expression(size)

    def comprehension(self, size: int) -> None:
        with self.inside("comprehension"), self.brackets("[]"):
            self.expression(size)
            for word in ("for", "in"):
                self.write(" ")
                self.write(word, "keyword")
                self.write(" ")
                self.name()

    def item(self, size: int) -> None:
        self.name()
        with self.brackets("[]"), self.inside("subscript"):
            self.expression(size)

    def comparison(self, size: int) -> None:
        with self.inside("list_literal"), self.brackets("[]"):
            self.expression(size)
            self.write("<", "operator", "comparison_operator")
            self.write(" ")
            self.expression(size)

    def statement(self, level: int) -> None:
        blocks = [self.function, self.class_, self.condition, self.loop]
        self.random.choice([self.assignment, self.raise_, self.assert_] + blocks * (level < 3))(level)

    def assignment(self, _) -> None:
        self.name("assignment_target")
        self.write(" ")
        self.write("=", "operator", "assignment_operator")
        self.write(" ")
        self.expression()

    def raise_(self, _) -> None:
        self._simple("raise", "raise_statement")

    def assert_(self, _) -> None:
        self._simple("assert", "assert_statement")

    def _simple(self, word: str, label: str) -> None:
        with self.inside(label):
            self.write(word, "keyword")
            self.write(" ")
            self.expression()

    def function(self, level: int) -> None:
        inner = {"def": ["nested_function"], "class": ["method_body"]}.get((self.scopes or [""])[-1], [])
        scope = contextlib.nullcontext() if self.scopes else self.inside("-module_level")
        with scope:
            self.write("def", "keyword")
            self.write(" ")
            self.name("function_name")
            with self.brackets("()"):
                self.name("argument_name")
                self.write("=", "operator")
                with self.inside("default_value"):
                    self.expression(1)
            self._body(level, "def", "function_body", *inner)

    def class_(self, level: int) -> None:
        scope = contextlib.nullcontext() if self.scopes else self.inside("-module_level")
        with scope:
            self.write("class", "keyword")
            self.write(" ")
            self.name("class_name")
            self._body(level, "class", "class_body")

    def condition(self, level: int) -> None:
        self.write("if", "keyword")
        self.write(" ")
        with self.inside("condition"):
            self.expression()
        self._body(level, None)

    def loop(self, level: int) -> None:
        with self.inside("loop_header"):
            self.write("for", "keyword")
            self.write(" ")
            self.name()
            self.write(" ")
            self.write("in", "keyword")
            self.write(" ")
            self.expression()
        self._body(level, None)

    def _body(self, level: int, scope: str | None, *labels: str) -> None:
        self.write(":", "colon")
        self.scopes += [scope] * bool(scope)
        self.end_line(level + 1)
        depth = {1: "block_depth_2", 2: "block_depth_3"}.get(level)
        with self.inside(*labels, *[depth] * bool(depth)):
            self.statements(level + 1)
        del self.scopes[len(self.scopes) - bool(scope) :]

    def statements(self, level: int) -> None:
        for number in range(self.random.randint(1, 3)):
            if number:
                self.end_line(level)
            self.statement(level)

    def end_line(self, level: int) -> None:
        if self.random.random() < 0.2:
            self.write("  ")
            self.write("# größer = 'x", "comment")
        self.write(self.line_end, "newline")
        self.write(self.step * level)


PLACED_BY_WRITER = (  # every label that the writer knows all about
    *("keyword", "constant", "identifier", "repeated_identifier", "snake_case", "self", "number", "integer", "float"),
    *("string", "f_string", "comment", "operator", "comparison_operator", "assignment_operator", "opening_bracket"),
    *("closing_bracket", "comma", "colon", "newline", "function_name", "class_name", "argument_name", "default_value"),
    *("keyword_argument", "called_name", "assignment_target", "raise_statement", "assert_statement", "condition"),
    *("loop_header", "comprehension", "lambda", "subscript", "dict_literal", "list_literal", "module_level"),
    *("class_body", "function_body", "method_body", "nested_function", "block_depth_2", "block_depth_3"),
    *("in_brackets", "in_brackets_2"),
)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=100)
def test_random_programs_have_the_labels_they_were_written_with(seed):
    writer = Writer(seed)
    writer.statements(0)
    rows = label_characters(writer.text, "numpy")
    for label in PLACED_BY_WRITER:
        if label == "module_level":
            expected = ["-module_level" not in labels for labels in writer.labels]
        else:
            expected = [label in labels for labels in writer.labels]
        assert rows[LABELS.index(label)].tolist() == expected, (label, writer.text)


def test_python_3_12_cuts_f_strings_and_their_parts_are_put_together_again():
    parts = [("NAME", 0, 1), ("FSTRING_START", 4, 6), ("FSTRING_MIDDLE", 6, 8), ("OP", 8, 9), ("FSTRING_START", 9, 11)]
    parts += [("NAME", 12, 13), ("FSTRING_END", 14, 15), ("OP", 15, 16), ("FSTRING_END", 16, 17), ("NEWLINE", 17, 18)]
    assert list(fold(parts)) == [("NAME", 0, 1), ("STRING", 4, 17), ("NEWLINE", 17, 18)]


def test_line_ends_and_a_byte_order_mark_change_no_label():
    rows, windows = label_characters(SOURCE, "torch"), SOURCE.replace("\n", "\r\n")
    marked = label_characters("\ufeff" + windows, "torch")
    kept = np.array([char != "\r" for char in windows])
    assert (marked[:, 1:][:, kept] == rows).all()
    assert (marked[:, 0] == rows[:, 0]).all()
    assert (marked[:, 1:-1][:, ~kept[:-1]] == marked[:, 2:][:, ~kept[:-1]]).all()
    assert (label_characters(SOURCE.replace("\n", "\r"), "torch") == rows).all()


def test_tabs_and_form_feeds_change_no_label_but_of_white_space():
    tabs = SOURCE.replace("    ", "\t").replace("\nclass", "\f\nclass")
    solid = [np.array([not char.isspace() for char in text]) for text in (SOURCE, tabs)]
    rows, others = label_characters(SOURCE, "torch"), label_characters(tabs, "torch")
    assert (rows[:, solid[0]] == others[:, solid[1]]).all()


def test_no_line_costs_its_length_squared():
    row = LABELS.index("last_word_of_line")
    rows = label_characters("x = '" + 300_000 * "a" + "'  # " + 300_000 * "-" + " " * 300_000 + ".", "python")
    assert rows[row].sum() == 1 and rows[row, -1]


# ------------------------------------------------------------------------------------------------ tokens


@given(text=st.text("a_ =(1)\n\t日ü", min_size=1), data=st.data())
def test_a_token_has_the_labels_of_its_first_solid_character(text, data):
    text = "'''" + text + "'''  \n  # x\n"
    cuts = st.tuples(st.integers(0, len(text)), st.integers(0, len(text))).map(sorted)
    offsets = data.draw(st.lists(cuts, min_size=1))
    rows = label_characters(text, "sympy")
    expected = []
    for start, end in offsets:
        solid = [i for i in range(start, end) if not text[i].isspace()]
        deciding = (solid or [start])[0]
        expected.append(rows[:, deciding] if start < end else np.zeros(len(LABELS), bool))
    assert (label_tokens(Document("sympy", "a.py", text), np.array(offsets)) == np.stack(expected, axis=1)).all()


@pytest.mark.parametrize("text", ["größe = '日本' + naïve  # 語\n", SOURCE])
def test_tokens_of_a_byte_level_tokenizer_carry_the_labels_of_their_text(text):
    document = Document("python", "a.py", text)
    tokenizer = train_tokenizer([Document("python", "b.py", SOURCE)], vocab_size=300)
    offsets = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    rows = label_tokens(document, np.array(offsets))
    characters = label_characters(text, "python")
    assert rows.shape == (len(LABELS), len(offsets)) and len(offsets) > 20
    for (start, end), row in zip(offsets, rows.T, strict=True):
        deciding = start + len(text[start:end]) - len(text[start:end].lstrip() or text[start:end])
        assert (row == characters[:, deciding]).all()


def test_a_character_cut_into_three_tokens_labels_each_of_them():
    document = Document("python", "a.py", "'日' + b")
    tokenizer = train_tokenizer([], vocab_size=262)
    offsets = np.array(
        tokenizer(document.text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    )
    rows = label_tokens(document, offsets)
    string, operator = rows[LABELS.index("string")], rows[LABELS.index("operator")]
    assert "".join("s" if s else "o" if o else "." for s, o in zip(string, operator, strict=True)) == "sssss.o.."


def test_a_special_token_has_no_label():
    rows = label_tokens(Document("python", "a.py", "x = 1"), np.array([(0, 0), (0, 1), (5, 5)]))
    assert rows.any(axis=0).tolist() == [False, True, False]


def test_no_tokens_and_no_text_have_no_labels():
    assert label_tokens(Document("python", "a.py", "x"), np.zeros((0, 2), int)).shape == (len(LABELS), 0)
    assert label_characters("", "python").shape == (len(LABELS), 0)
    assert label_characters("\ufeff", "python").shape == (len(LABELS), 1)


# ------------------------------------------------------------------------------------------------ bad input

UNREADABLE = {
    "Python 2": "print 'a'\n",
    "open bracket": "f(\n",
    "template": "class {{ name }}:\n    pass\n",
    "bad indentation": "if a:\n    b\n  c\n",
    "NUL": "a\0b",
    "lone surrogate": "a = '\ud800'",
    "too deep": "(" * 1000 + ")" * 1000,
}


@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE)
def test_what_python_does_not_parse_is_refused_in_one_sentence(text):
    assert not parses(text)
    with pytest.raises(ValueError, match="cannot label a document that Python does not parse"):
        label_characters(text, "python")


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="from 3.12 on, `tokenize` knows every identifier")
def test_an_identifier_that_tokenize_does_not_know_is_refused():
    assert not parses("a℘ = 1")


def test_what_python_parses_is_accepted_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parses("\ufeffa = '\\d'\r\nb = 1if a else 2")


def test_an_unknown_package_is_refused():
    with pytest.raises(ValueError, match="unknown package 'pytorch': expected one of python, torch"):
        label_characters("x", "pytorch")


@pytest.mark.parametrize("offsets", [[(0, 2)], [(-1, 1)], [(1, 0)], [(0, 1, 1)], [0, 1], [(0.0, 1.0)]])
def test_offsets_that_are_no_spans_of_the_text_are_refused(offsets):
    with pytest.raises(ValueError, match="offsets? "):
        label_tokens(Document("python", "a.py", "x"), np.array(offsets))
