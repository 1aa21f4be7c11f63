"""The cache on disk saves the model, is never taken for another's, and is whole or not there."""

import errno
import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from twins import CountingSubject

from helpers.activations.cache import ActivationCache
from helpers.activations.stream import ActivationStream, Harvest

UNIT = Harvest(context=8, rows=3)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SUITE_CACHE", str(tmp_path))
    return tmp_path / "activations"


def stream(subject=None, harvest=UNIT, tokens=None, **options):
    tokens = torch.arange(320) if tokens is None else tokens
    options = {"batch_size": 32, "cache": True, **options}
    return ActivationStream(subject or CountingSubject(), tokens, harvest, **options)


def files(folder):
    return sorted(path.suffix for path in folder.iterdir()) if folder.exists() else []


def rows_read(found):
    """How many rows the model is asked for until everything was seen."""
    for _ in found.batches():
        pass
    return found.subject.rows_read


def in_memory(n_rows):
    return n_rows * UNIT.kept * (4 * 4 + 8) / 1e9


def test_what_was_written_is_read_in_the_order_asked_for():
    values = torch.arange(24.0).view(12, 2)
    cache = ActivationCache({"of": "a test"}, (4, 3, 2), torch.float16)
    assert not cache.ready()
    cache.write(values.split(5))
    assert cache.ready()
    pieces = list(cache.read(torch.tensor([3, 0, 2]), at_once=2))
    assert [len(piece) for piece in pieces] == [6, 3]
    assert torch.equal(torch.cat(pieces).float(), values.view(4, 3, 2)[[3, 0, 2]].flatten(0, 1))
    assert cache.path.stat().st_size == 48
    header = json.loads(cache.path.with_suffix(".json").read_text())
    assert header == {"of": "a test", "shape": [4, 3, 2], "dtype": "torch.float16"}


def test_a_second_stream_does_not_ask_the_model():
    assert rows_read(stream()) == 40
    assert rows_read(stream()) == 0


@pytest.mark.parametrize("n_rows", [40, 12])
def test_cached_activations_are_the_harvested_ones_in_16_bits(n_rows):
    for harvest, tolerance in [(UNIT, 2**-11), (Harvest(context=8, rows=3, normalisation="none"), 2**-8)]:
        memory = in_memory(n_rows)
        cached, harvested = (stream(harvest=harvest, memory_limit_gb=memory, cache=c).take(280) for c in (True, False))
        assert cached.dtype == torch.float32
        assert torch.allclose(cached, harvested, rtol=tolerance, atol=1e-7)
        assert not torch.equal(cached, harvested)  # else it was not read


def test_large_activations_without_normalisation_do_not_overflow():
    tokens = torch.arange(60_000, 60_320) * 10
    found = stream(tokens=tokens, harvest=Harvest(context=8, rows=3, normalisation="none"))
    assert 65_504 < found.take(280).max() < 700_000  # the first is the largest float16


def other_site():
    subject = CountingSubject()
    subject.site = "there"
    return subject


def other_dtype():
    subject = CountingSubject()
    subject.dtype = torch.bfloat16
    return subject


@pytest.mark.parametrize(
    "change",
    [
        {"subject": CountingSubject(fingerprint="other weights")},
        {"subject": other_site()},
        {"subject": other_dtype()},
        {"tokens": torch.arange(320).flip(0)},
        {"tokens": torch.arange(312)},
        {"harvest": Harvest(context=16, rows=3)},
        {"harvest": Harvest(context=8, rows=3, drop="none")},
        {"harvest": Harvest(context=8, rows=3, normalisation="none")},
    ],
    ids=["weights", "site", "dtype", "tokens", "fewer", "context", "drop", "normalisation"],
)
def test_whatever_activations_depend_on_makes_another_cache(change, cache_folder):
    rows_read(stream())
    assert rows_read(stream(**change)) > 0
    assert files(cache_folder) == [".bin", ".bin", ".json", ".json"]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 3},
        {"batch_size": 7},
        {"memory_limit_gb": in_memory(12)},
        {"harvest": Harvest(context=8, rows=5)},
        {"harvest": Harvest(context=8, rows=3, dtype=torch.bfloat16)},
    ],
    ids=["seed", "batch size", "memory", "rows a pass", "dtype of batches"],
)
def test_what_activations_do_not_depend_on_does_not(change, cache_folder):
    rows_read(stream())
    stored = next(cache_folder.glob("*.bin")).read_bytes()
    assert rows_read(stream(**change)) == 0
    next(cache_folder.glob("*.bin")).unlink()
    rows_read(stream(**change))
    assert next(cache_folder.glob("*.bin")).read_bytes() == stored


def cut(data: Path):
    data.write_bytes(data.read_bytes()[:-1])


def lose_header(data: Path):
    data.with_suffix(".json").unlink()


def spoil_header(data: Path):
    data.with_suffix(".json").write_text('{"context":')


def exchange_header(data: Path):
    header = json.loads(data.with_suffix(".json").read_text())
    data.with_suffix(".json").write_text(json.dumps(header | {"site": "elsewhere"}))


@pytest.mark.parametrize("damage", [cut, lose_header, spoil_header, exchange_header])
def test_a_damaged_or_foreign_file_is_rebuilt_with_one_line(damage, cache_folder, capsys):
    expected = stream().take(280)
    assert capsys.readouterr().out == ""
    damage(next(cache_folder.glob("*.bin")))
    again = stream()
    assert torch.equal(again.take(280), expected) and again.subject.rows_read == 40
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "harvesting it again" in said
    assert rows_read(stream()) == 0


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError, MemoryError])
def test_whatever_stops_the_harvest_nothing_is_left(interruption, cache_folder):
    subject = CountingSubject()
    harvest, calls = subject.residuals, []

    def interrupted(tokens):
        calls.append(tokens)
        if len(calls) == 5:
            assert files(cache_folder) == [".bin"]  # being written, under another name
            raise interruption
        return harvest(tokens)

    subject.residuals = interrupted
    with pytest.raises(interruption):
        stream(subject).take(1)
    assert files(cache_folder) == []
    assert rows_read(stream()) == 40


def test_a_full_disk_is_one_clear_error_and_nothing_is_left(cache_folder, monkeypatch):
    class Full(io.FileIO):
        def write(self, data):
            if self.tell() > 200:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(Path, "open", lambda path, mode: Full(path, mode.replace("b", "")))
    with pytest.raises(OSError, match=r"could not write .*activations.*No space left.*free space") as caught:
        stream().take(1)
    assert caught.value.errno == errno.ENOSPC
    assert files(cache_folder) == []


def test_a_reader_pickles_without_model_and_text_and_gives_the_same():
    found = stream(tokens=torch.arange(32_000))
    found.subject.weights = torch.ones(10**6)
    found.take(1)  # a block is in memory
    sent = pickle.dumps(found.reader())
    assert len(sent) < 10_000 and found.subject.rows_read == 4_000
    received = pickle.loads(sent)
    assert torch.equal(torch.cat(list(received.batches(30_000))), torch.cat(list(found.batches(30_000))))
    assert received.fingerprint == found.fingerprint == stream(tokens=torch.arange(32_000)).fingerprint
    assert found.subject.rows_read == 4_000


def test_a_reader_needs_a_cache_and_says_so_when_it_is_gone(cache_folder):
    with pytest.raises(ValueError, match="make the ActivationStream with cache=True"):
        stream(cache=False).reader()
    reader = stream().reader()
    next(cache_folder.glob("*.bin")).unlink()
    with pytest.raises(RuntimeError, match=r"\.bin cannot be used here, where no model is .* SUITE_CACHE"):
        next(reader.batches())
