"""A finished cell comes back as it was, and a file that is not it is named, refused and left alone."""

import shutil

import pytest
import safetensors.torch
import torch

from helpers.dictionaries import sweep_store
from helpers.dictionaries.autoencoders import BatchTopK, SparseAutoencoder
from helpers.dictionaries.sweep_store import Finished, StoredCell, measure

HELDOUT = torch.randn(100, 8, generator=torch.Generator().manual_seed(1))
IDENTITY = {"n_latents": 16, "config": {"lr": 0.1, "remedy": {"name": "AuxK", "at": [0.5]}}}


def fresh(seed=0):
    return SparseAutoencoder(8, 16, BatchTopK(3), seed)


def test_another_sample_of_any_dtype_is_told_apart():
    digests = {sweep_store._digest(x) for x in (HELDOUT, HELDOUT.bfloat16(), HELDOUT.half(), HELDOUT.flip(0))}
    assert len(digests) == 4 and sweep_store._digest(HELDOUT.clone()) in digests


@pytest.fixture
def stored(tmp_path):
    """A cell whose file is there."""
    sae = fresh(seed=5)
    sae.activation.threshold.fill_(0.7)
    cell = StoredCell(tmp_path / "new" / "folder", "BatchTopK-16", IDENTITY)
    cell.save(Finished(sae, {"curve": [{"tokens": 3, "loss": 0.1}]}, measure(sae, HELDOUT)), HELDOUT)
    return cell


def test_what_was_saved_comes_back(stored):
    sae, record, quality = stored.load(fresh(), HELDOUT)
    assert not sae.training
    assert torch.equal(sae.W_dec, fresh(seed=5).W_dec) and sae.activation.threshold == torch.tensor(0.7)
    assert record == {"curve": [{"tokens": 3, "loss": 0.1}]} and quality == measure(sae, HELDOUT)
    assert stored.path.name.startswith("BatchTopK-16-") and len(list(stored.directory.iterdir())) == 1


def test_what_is_not_there_is_none(tmp_path):
    assert StoredCell(tmp_path, "TopK", {}).load(fresh(), HELDOUT) is None


def test_any_part_of_the_identity_makes_another_file_and_its_order_does_not(stored):
    other = {"n_latents": 16, "config": {"lr": 0.2, "remedy": {"name": "AuxK", "at": [0.5]}}}
    turned = dict(reversed(IDENTITY.items()))
    assert StoredCell(stored.directory, "BatchTopK-16", other).path != stored.path
    assert StoredCell(stored.directory, "BatchTopK-16", turned).path == stored.path


def test_quality_is_measured_again_on_another_sample_and_only_then(stored, monkeypatch):
    calls = []
    monkeypatch.setattr(sweep_store, "measure", lambda *args: (calls.append(1), measure(*args))[1])
    assert stored.load(fresh(), HELDOUT[:50]).quality == measure(fresh_loaded(stored), HELDOUT[:50])
    del calls[:]
    assert stored.load(fresh(), HELDOUT[:50]).quality != measure(fresh_loaded(stored), HELDOUT)
    assert calls == []


def fresh_loaded(cell):
    sae = fresh()
    sae.load_state_dict(safetensors.torch.load_file(cell.path))
    return sae


def test_the_checkpoint_goes_when_the_cell_is_finished(stored):
    stored.checkpoint.write_text("the sweep was killed before it removed this")
    stored.load(fresh(), HELDOUT)
    assert not stored.checkpoint.exists()
    stored.checkpoint.write_text("under way")
    stored.save(Finished(fresh(), {}, {}), HELDOUT)
    assert not stored.checkpoint.exists()


def truncated(cell):
    cell.path.write_bytes(cell.path.read_bytes()[:-5])


def empty(cell):
    cell.path.write_bytes(b"")


def no_safetensors(cell):
    cell.path.write_text("something else" * 100)


def anothers(cell):
    other = StoredCell(cell.directory, "BatchTopK-16", {"n_latents": 17})
    other.save(Finished(fresh(), {}, {}), HELDOUT)
    shutil.copy(other.path, cell.path)


def weights_alone(cell):
    safetensors.torch.save_file(fresh().state_dict(), cell.path)


def older(cell):
    sweep_store.VERSION -= 1
    cell.save(Finished(fresh(), {}, {}), HELDOUT)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "not a whole .* delete it and run again"),
        (empty, "not a whole .* delete it and run again"),
        (no_safetensors, "not a whole .* delete it and run again"),
        (anothers, "another configuration than its name says: move it away"),
        (weights_alone, "format None .* this suite uses 1: move it away"),
        (older, "format 0 .* this suite uses 1: move it away"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_left_alone(stored, damage, message, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(sweep_store, "VERSION", sweep_store.VERSION)
        damage(stored)
    content = stored.path.read_bytes()
    with pytest.raises(ValueError, match=message) as caught:
        stored.load(fresh(), HELDOUT)
    assert str(stored.path) in str(caught.value)
    assert stored.path.read_bytes() == content
