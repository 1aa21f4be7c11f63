"""Time is counted once, for the innermost part."""

import pytest

from helpers.base import clock
from helpers.base.clock import SECONDS, spent_on


def test_an_inner_part_is_not_counted_for_the_outer_one(monkeypatch):
    times = iter([0, 1, 3, 7, 15, 31, 63, 127])
    monkeypatch.setattr(clock.time, "monotonic", lambda: next(times))
    before = SECONDS.copy()

    @spent_on("test harvest")
    def harvest():
        raise ValueError

    with spent_on("test training"):  # 0 to 1, 3 to 7 and 15 to 31
        for _ in range(2):
            with pytest.raises(ValueError):
                harvest()  # 1 to 3 and 7 to 15
    with spent_on("test harvest"):  # 63 to 127
        pass
    assert SECONDS - before == {"test training": 1 + 4 + 16, "test harvest": 2 + 8 + 64}
