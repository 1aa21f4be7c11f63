"""Where a process's time goes: `with spent_on("harvest"):`, or the same as a decorator.

What an inner part takes is not counted for the outer one, so that the parts add up.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator

SECONDS: Counter[str] = Counter()  # of this process so far, by kind
_kinds: list[str] = []  # under way, the innermost last
_since = [time.monotonic()]  # until when time is counted


@contextlib.contextmanager
def spent_on(kind: str) -> Iterator[None]:
    """Count the time that passes inside as `kind`."""
    _count()
    _kinds.append(kind)
    try:
        yield
    finally:
        _count()
        _kinds.pop()


def _count() -> None:
    now = time.monotonic()
    if _kinds:
        SECONDS[_kinds[-1]] += now - _since[0]
    _since[0] = now
