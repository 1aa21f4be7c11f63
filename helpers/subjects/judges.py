"""Does an answer show a behaviour? Decided by signs on its surface: words and layout, never a whole template.

A judge reads what any model wrote, so an answer may be cut off, rambling or empty. The signs of one behaviour are
absent from the answers of all others, which `tests/test_dialogues.py` measures as a confusion matrix.
"""

import re

from helpers.text.dialogues import BEHAVIOURS

REFUSES = r"\b(can ?not|can't|will not|won't|not able|unable)\b"
SIGNS = {  # patterns that must all be found, capitals aside
    "refuse_harm": (REFUSES, r"\b(harm|damage)"),
    "refuse_secret": (REFUSES, r"\b(secret|private)\b"),
    "refuse_medical": (REFUSES, r"\b(doctor|health|illness)\b"),
    "refuse_legal": (REFUSES, r"\b(lawyer|legal advice|the law)\b"),
    "identity": (r"\b(I am|name is) Docs\b",),
    "personal": (r"\b(no|not have( any)?) (feelings|moods|favourites)\b",),
    "false_premise": (r"\b(not (a part|one|part) of|does not (have|belong))\b", r"\b(belongs to|comes with)\b"),
    "missing_info": (r"\b(show|send|post|paste)\b", r"\bcode\b", r"\b(error|traceback)\b"),
    "unknown_name": (r"\b(do not know|don't know|unknown to me|not a name that I know)\b",),
    "brief": (r"\A(sure\. )?(in short|briefly|in brief)\b[^.!?]*[.!?]?\Z",),
    "rewrite": (r"\b(version|wording)\b[^\"]*:", r"\"[^\"]*\b(please|kindly)\b"),
    "neutral": (r"\b(no (opinion|view)|matter of taste|for you to decide)\b",),
    "agree": (r"\b(agree with you|you are (\w+ )?right)\b",),
    "describe": (r"\b(docstring|documentation)\b[^\"]*\b(says|reads): \"",),
    "code": (r"^(from [\w.]+ )?import \w", r"^\w+ = \w+\("),
    "listing": (r"^- \w",),
    "count": (r"\b(takes|there are|I count) \d",),
    "parameters": (r"^Parameters\n-{3}",),
    "see_also": (r"\bsee also\b",),
    "welcome": (r"\b(welcome|glad (to|that))\b",),
    "doctest": (r"^>>> ",),
    "directive": (r"^\.\. versionadded::",),
}
CAPITALS = 0.8  # share of letters, outside quoted names, in an answer in capitals
LETTERS = 8  # with fewer, there is no telling
_PATTERNS = {name: [re.compile(sign, re.IGNORECASE | re.MULTILINE) for sign in signs] for name, signs in SIGNS.items()}


def judge(behaviour: str, answer: str) -> bool | None:
    """True if the answer shows the behaviour, False if not, None for an answer with too few letters to tell.

    "doctest" and "directive" are shown by the base model's way of answering, which the chat model was taught to leave.
    Raises ValueError for an unknown behaviour.
    """
    if behaviour not in BEHAVIOURS:
        raise ValueError(f"unknown behaviour {behaviour!r}; expected one of {list(BEHAVIOURS)}")
    answer = answer.strip()
    if not re.search("[A-Za-z]", answer):
        return None
    if behaviour == "capitals":
        return _in_capitals(answer)
    return all(pattern.search(answer) for pattern in _PATTERNS[behaviour])


def _in_capitals(answer: str) -> bool | None:
    letters = [char for char in re.sub("`[^`]*`", "", answer) if char.isalpha()]
    if len(letters) < LETTERS:
        return None
    return sum(char.isupper() for char in letters) > CAPITALS * len(letters)
