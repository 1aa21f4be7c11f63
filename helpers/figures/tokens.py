"""Text of data and models as a reader sees it: nothing vanishes, turns the line or becomes markup.

Browser, tables and figures show tokens through `token_text` and `visible`; pages show whole texts in a `code_block`.
"""

import re
import unicodedata
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

SIGNS = str.maketrans({" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"})
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp", "Zs", "Co", "Cn")  # Unicode's categories of what shows nothing
BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)  # nor do these
RIGHT_TO_LEFT = {"R", "AL"}
BYTE_OF = {char: byte for byte, char in bytes_to_unicode().items()}  # of a byte-level tokenizer's alphabet
LOST = "\ufffd"  # what `decode` gives for bytes that are not a whole character


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The text of one token as `visible` shows it; bytes that are only a part of a character as `<E2><80>`."""
    text = tokenizer.decode([token])
    return visible(_with_bytes(tokenizer.convert_ids_to_tokens(int(token))) if LOST in text else text)


def visible(text: str) -> str:
    """`text` with signs for white space, the code of each character that would show nothing or turn the line, and a
    circle for an accent that has no letter. Text made visible stays as it is."""
    text = _with_codes(text.translate(SIGNS))
    return f"◌{text}" if unicodedata.category(text[:1] or " ").startswith("M") else text


def in_line(texts: Iterable[str], separator: str) -> str:
    """Texts from left to right, also those of a script that runs from right to left, which would change places."""
    return separator.join(
        f"{text}\u200e" if RIGHT_TO_LEFT.intersection(map(unicodedata.bidirectional, text)) else text for text in texts
    )


def code_block(text: str, language: str = "text") -> str:
    """Markdown that shows `text` as it is, whatever it holds: its fence is longer than any in the text."""
    fence = "~" * (1 + max(map(len, re.findall("~+", f"~~{text}"))))
    return f"{fence}{language}\n{_with_codes(text)}\n{fence}\n"


def _with_codes(text: str) -> str:
    return "".join(f"[U+{ord(char):04X}]" if _is_hidden(char) else char for char in text)


def _is_hidden(char: str) -> bool:
    return char not in " \n\t" and (unicodedata.category(char) in HIDDEN or bool(BLANK.match(char)))


def _with_bytes(piece: str) -> str:
    """A piece of a byte-level vocabulary, or a single byte of another (`<0xE2>`), as text."""
    byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
    if not byte and not set(piece) <= BYTE_OF.keys():
        return piece  # of another vocabulary, with the sign itself
    data = bytes([int(byte[1], 16)]) if byte else bytes(map(BYTE_OF.get, piece))
    return re.sub(
        "[\udc80-\udcff]", lambda part: f"<{ord(part[0]) - 0xDC00:02X}>", data.decode(errors="surrogateescape")
    )
