"""The cache on disk saves the model, is never taken for another's, and is whole or not there."""

import errno
import io
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
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
    cache = ActivationCache({"of": "a test"}, (12, 2), torch.float16)
    assert not cache.ready()
    cache.write(values.split(5))
    assert cache.ready()
    places = torch.tensor([11, 9, 0, 1, 5])
    assert cache.read(places).dtype == torch.float16 and torch.equal(cache.read(places).float(), values[places])
    assert cache.path.stat().st_size == 48
    header = json.loads(cache.path.with_suffix(".json").read_text())
    assert header == {"of": "a test", "shape": [12, 2], "dtype": "torch.float16"}


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


@pytest.mark.parametrize(
    ("interruption", "left", "to_read"),
    [(KeyboardInterrupt, [".bin"], 28), (SystemExit, [".bin"], 28), (ValueError, [], 40), (MemoryError, [], 40)],
)
def test_a_harvest_that_is_interrupted_goes_on_and_one_that_fails_leaves_nothing(
    interruption, left, to_read, cache_folder
):
    expected = stream(cache=False).take(280)
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
    assert files(cache_folder) == left
    again = stream()
    assert rows_read(again) == to_read and files(cache_folder) == [".bin", ".json"]
    torch.testing.assert_close(again.take(280), expected, rtol=2**-10, atol=1e-7)


KILLED = """
import os, sys
sys.path[:0] = sys.argv[1:]
from test_cache import CountingSubject, stream
subject = CountingSubject()
harvest, calls = subject.residuals, []

def residuals(tokens):
    calls.append(tokens)
    if len(calls) == 5:
        os.kill(os.getpid(), 9)
    return harvest(tokens)

subject.residuals = residuals
stream(subject).take(1)
"""


def test_a_harvest_that_was_killed_goes_on_until_it_is_whole(cache_folder):
    places = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    for done in (12, 24, 36):  # of 40 rows, three a pass
        subprocess.run([sys.executable, "-c", KILLED, *places], env=environment, stderr=subprocess.DEVNULL)
        cut_off = max(cache_folder.glob(".*.bin"), key=lambda path: path.stat().st_size)
        with cut_off.open("ab") as file:
            file.write(b"half an activation"[:5])
        assert cut_off.stat().st_size >= done * 7 * 8
    found = stream()
    assert rows_read(found) == 4 and files(cache_folder) == [".bin", ".json"]
    torch.testing.assert_close(found.take(280), stream(cache=False).take(280), rtol=2**-10, atol=1e-7)


def test_of_two_at_once_one_harvests(cache_folder):
    subjects = [CountingSubject(), CountingSubject()]
    harvest, begun = subjects[0].residuals, threading.Event()

    def slow(tokens):
        begun.set()
        time.sleep(0.01)
        return harvest(tokens)

    subjects[0].residuals = slow
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(stream(subjects[0]).take, 280)
        assert begun.wait(30)
        assert torch.equal(stream(subjects[1]).take(280), first.result())
    assert [subject.rows_read for subject in subjects] == [40, 0]


def test_rows_with_fewer_activations_come_from_the_cache_as_from_the_model():
    """Rows of 8 tokens keep 7 activations, or fewer where special tokens stand in them, or none."""
    tokens = torch.arange(320)
    special = [*range(8, 16), 20, 21, 100, 319]
    for memory in (1.0, in_memory(12)):
        cached, harvested = (
            stream(CountingSubject(special_ids=special), tokens=tokens, cache=cache, memory_limit_gb=memory, seed=3)
            for cache in (True, False)
        )
        assert cached.n_activations == 280 - 7 - 4
        a, b = (torch.cat(list(each.batches(600))) for each in (cached, harvested))
        torch.testing.assert_close(a, b, rtol=2**-10, atol=1e-7)


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
    found = stream(tokens=torch.arange(32_000).to(torch.uint16))  # as text comes
    found.subject.weights = torch.ones(10**6)
    found.take(1)  # a block is in memory
    sent = pickle.dumps(found.reader())
    assert len(sent) < 10_000 and found.subject.rows_read == 4_000
    received = pickle.loads(sent)
    assert torch.equal(torch.cat(list(received.batches(30_000))), torch.cat(list(found.batches(30_000))))
    assert received.fingerprint == found.fingerprint == stream(tokens=torch.arange(32_000)).fingerprint
    assert found.subject.rows_read == 4_000


def test_of_a_cache_no_activations_are_in_memory_but_those_of_a_batch():
    reader = stream(tokens=torch.arange(32_000)).reader()
    next(reader.batches())
    places, order = reader._held.held[1], reader._order.held[1]
    assert places.dtype == torch.int64 and torch.equal(places.sort().values, torch.arange(28_000))
    assert torch.equal(order.sort().values, places.sort().values)


def test_a_reader_needs_a_cache_and_says_so_when_it_is_gone(cache_folder):
    with pytest.raises(ValueError, match="make the ActivationStream with cache=True"):
        stream(cache=False).reader()
    reader = stream().reader()
    next(cache_folder.glob("*.bin")).unlink()
    with pytest.raises(RuntimeError, match=r"\.bin cannot be used here, where no model is .* SUITE_CACHE"):
        next(reader.batches())
