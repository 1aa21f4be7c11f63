"""What is timed is what the table says: so many latents are on, and dense methods take the sparse path."""

import pytest
from competitors import METHODS, suite
from side_by_side import activations

from helpers.dictionaries import training


@pytest.mark.parametrize("method", METHODS)
def test_as_many_latents_are_on_as_the_table_says(method, monkeypatch):
    x, plain, sparse = activations(64, 512), training._reconstruct_above, []
    monkeypatch.setattr(training, "_reconstruct_above", lambda *a: (made := plain(*a), sparse.append(made))[0])
    step = suite(method, 64, 1024, 16, x.repeat(1, 2) if method == "L1 crosscoder" else x)
    for _ in range(3):
        step(x.repeat(1, 2) if method == "L1 crosscoder" else x)
    assert step.__self__.curve[0]["l0"] == pytest.approx(16, rel=0.2)
    assert all(sparse) and len(sparse) == (0 if method.endswith("TopK") else 3)
