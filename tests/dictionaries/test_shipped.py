"""Shipped dictionaries: 8 bits lose next to nothing, a cell is found on another machine, another text is said."""

import dataclasses
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.dictionaries import shipped
from helpers.dictionaries.autoencoders import SparseAutoencoder, TopK
from helpers.dictionaries.shipped import Shelf, in_8_bits, in_full
from helpers.dictionaries.sweep_store import Finished, StoredCell, measure

HELDOUT = torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
IDENTITY = {"method": "TopK", "n_latents": 16, "seed": 0, "stream": "text of here", "products": "torch.float32"}


def fresh(seed=0):
    return SparseAutoencoder(8, 16, TopK(4), seed)


@pytest.fixture
def stored(tmp_path):
    return StoredCell(tmp_path / "cache", "TopK-16", IDENTITY)


@pytest.fixture
def shelf(tmp_path, stored):
    """A shelf with one dictionary."""
    sae = fresh(seed=5)
    Shelf(tmp_path / "shelf").put(stored, Finished(sae, {"curve": [{"tokens": 3}]}, measure(sae, HELDOUT)), HELDOUT)
    return Shelf(tmp_path / "shelf")


@given(st.integers(1, 6), st.integers(1, 9), st.floats(1e-20, 1e20), st.integers(0, 9))
def test_every_entry_is_within_half_a_scale(n, d, size, seed):
    x = size * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    x[0] = 0  # a row without a scale of its own
    state = in_8_bits({"W": x, "b": x[0]})
    back = in_full(state)
    assert state["W"].dtype == torch.int8 and back.keys() == {"W", "b"}
    assert ((back["W"] - x).abs() <= 0.501 * x.abs().amax(1, keepdim=True) / 127).all() and torch.equal(back["b"], x[0])


def test_by_hand():
    state = in_8_bits({"W": torch.tensor([[127.0, -63.4], [0.5, 0.25]])})
    assert state["W"].tolist() == [[127, -63], [127, 64]]  # a quarter is 63.5 of 127 halves


def test_what_was_put_comes_back_in_a_quarter_of_the_bytes(shelf, stored):
    sae, record, quality = shelf.get(stored, fresh(), HELDOUT)
    torch.testing.assert_close(sae.W_dec, fresh(seed=5).W_dec, atol=4e-3, rtol=0)
    assert record == {"curve": [{"tokens": 3}]} and quality == measure(sae, HELDOUT) and not sae.training
    assert quality["nmse"] == pytest.approx(measure(fresh(seed=5), HELDOUT)["nmse"], rel=0.01)


def test_a_cell_is_found_where_products_differ_and_another_text_is_said(shelf, stored):
    def elsewhere(**changes):
        return dataclasses.replace(stored, identity=IDENTITY | changes)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shelf.get(elsewhere(products="torch.bfloat16"), fresh(), HELDOUT)
    with pytest.warns(UserWarning, match="trained on another text or model"):
        assert shelf.get(elsewhere(stream="text of there"), fresh(), HELDOUT)
    assert shelf.get(elsewhere(seed=1), fresh(), HELDOUT) is None


def test_8_bits_that_cost_too_much_are_refused(tmp_path, stored, monkeypatch):
    monkeypatch.setattr(shipped, "LEVELS", 1)  # less than two bits
    sae = fresh(seed=5)
    with pytest.raises(ValueError, match="in 8 bits NMSE is .*: ship it as it is"):
        Shelf(tmp_path).put(stored, Finished(sae, {}, measure(sae, HELDOUT)), HELDOUT)
    assert not [*tmp_path.iterdir()]


def test_a_file_that_cannot_be_read_is_named(shelf, stored):
    path = shelf.path(stored)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=f"{path.name} is not a whole checkpoint"):
        shelf.get(stored, fresh(), HELDOUT)
