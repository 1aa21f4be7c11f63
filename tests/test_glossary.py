"""GLOSSARY.md: a notebook links each word of it where the word first comes up; an entry, where it is taught.

A use counts in prose: not in headings, code, mathematics, folded answers or the text of another link.
"""

import re

import nbformat
import pytest

from helpers.suite.run import NOTEBOOKS, find, number_of

TEXT = (NOTEBOOKS / "GLOSSARY.md").read_text(encoding="utf-8")
ENTRY = re.compile(r'<a id="([a-z0-9-]+)"></a>\*\*(.+?)\*\*: (.+) \[(\d\d)\]\((\4_\w+\.ipynb)\)')
ENTRIES = [ENTRY.fullmatch(line) for line in TEXT.splitlines()[4:] if line]
FORMS = {form: entry[1] for entry in ENTRIES for form in entry[2].split(", ")}
LINKING = [number_of(path) for path in find()]

NO_PROSE = re.compile(r"<details>.*?</details>|```.*?```|^#.*?$", re.DOTALL | re.MULTILINE)
LINK = r"\[[^\]]*\]\(GLOSSARY\.md#(?P<link>[\w-]+)\)"
OTHER = r"`[^`]*`|\$[^$]*\$|\[[^\]]*\]\([^)]*\)"


def as_word(form: str) -> str:
    """A form or its plural as a whole word, in any case if it has no capital."""
    found = re.escape(form).replace(r"\ ", r"[\s-]")
    return rf"(?<!\w){found if form != form.lower() else f'(?i:{found})'}(?:e?s)?(?!\w)"


def first_uses(prose: str) -> dict[str, str]:
    """Entry -> "linked", or the words where it is used before any link to it."""
    forms = sorted(FORMS, key=len, reverse=True)  # "dead latent" is no use of "latent"
    coded, plain = ([as_word(f) for f in forms if f.startswith("`") == is_code] for is_code in (True, False))
    uses = re.compile(rf"{LINK}|(?P<use>{'|'.join(coded)})|{OTHER}|(?P<word>{'|'.join(plain)})")
    found = {}
    for match in uses.finditer(NO_PROSE.sub("", prose)):
        if match["link"]:
            found.setdefault(match["link"], "linked")
        elif used := match["use"] or match["word"]:
            entry = next(FORMS[form] for form in forms if re.fullmatch(as_word(form), used))
            found.setdefault(entry, match.string[max(match.start() - 40, 0) : match.end()])
    return found


def prose_of(number: str) -> str:
    cells = nbformat.read(find(number)[0], as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def test_entries_are_in_order_and_lead_to_the_notebook_that_teaches_them():
    assert None not in ENTRIES, 'an entry is <a id="word"></a>**word, other form**: two sentences. [02](02_….ipynb)'
    anchors = [entry[1] for entry in ENTRIES]
    assert anchors == sorted(set(anchors)) and len(FORMS) == sum(entry[2].count(", ") + 1 for entry in ENTRIES)
    assert [entry[5] for entry in ENTRIES if not (NOTEBOOKS / entry[5]).exists()] == []


@pytest.mark.parametrize("number", LINKING)
def test_words_are_linked_where_they_first_come_up(number):
    uses = first_uses(prose_of(number))
    assert {entry: words for entry, words in uses.items() if words != "linked"} == {}


@pytest.mark.parametrize("number", LINKING)
def test_links_lead_to_entries_and_entries_are_linked_where_they_are_taught(number):
    linked = set(re.findall(LINK, prose_of(number)))
    taught = {entry[1] for entry in ENTRIES if entry[4] == number}
    assert linked - set(FORMS.values()) == set() and taught - linked == set()


@pytest.mark.parametrize(
    ("prose", "uses"),
    [
        ("Latents die. A [latent](GLOSSARY.md#latent)", {"latent": "Latents"}),
        ("a [dead latent](GLOSSARY.md#dead-latent), a [latent](GLOSSARY.md#latent)", {"dead-latent", "latent"}),
        ("# L0\n`L0` and [L0](a.md)\n```\nL0\n```\n<details>\nL0\n</details>", {}),
        ("`docs-gpt2` has l0", {"docs-gpt2": "`docs-gpt2`"}),
        ("BatchTopK, topkish", {"batchtopk": "BatchTopK"}),
    ],
)
def test_a_use_by_hand(prose, uses):
    assert first_uses(prose) == (dict.fromkeys(uses, "linked") if isinstance(uses, set) else uses)
