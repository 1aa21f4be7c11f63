import errno
import stat
from pathlib import Path

import pytest

from helpers.base import storage as files
from helpers.base.storage import cache_dir, results_dir, write_atomic, written_aside


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("data", "expected"), [(b"\x00\xff", b"\x00\xff"), ("é✔", "é✔".encode())])
def test_bytes_and_text_arrive_whole_in_folders_made_as_needed(tmp_path, data, expected):
    path = write_atomic(tmp_path / "a" / "b" / "x.bin", data)
    assert everything(path.parent) == {"x.bin": expected}


def test_a_second_write_replaces_the_first(tmp_path):
    write_atomic(tmp_path / "x", "a longer first text")
    write_atomic(tmp_path / "x", "second")
    assert everything(tmp_path) == {"x": b"second"}


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    write_atomic(tmp_path / "x", "old")
    with written_aside(tmp_path / "x") as aside:
        aside.write_text("new, but not yet")
        assert (tmp_path / "x").read_text() == "old"
        assert aside.parent == tmp_path  # on the same disk, so that the rename is one step
    assert everything(tmp_path) == {"x": b"new, but not yet"}


@pytest.mark.parametrize("problem", [ValueError, KeyboardInterrupt, OSError(errno.EIO, "broken")])
def test_any_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path, problem):
    write_atomic(tmp_path / "x", "old")
    with pytest.raises(problem if isinstance(problem, type) else OSError), written_aside(tmp_path / "x") as aside:
        aside.write_text("half")
        raise problem
    assert everything(tmp_path) == {"x": b"old"}


def test_a_full_disk_is_one_clear_sentence(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_atomic(tmp_path / "x", "old")
    monkeypatch.setattr(Path, "write_bytes", full)
    message = "could not write .*/x .No space left on device.; nothing was changed, free space"
    with pytest.raises(OSError, match=message) as info:
        write_atomic(tmp_path / "x", "new")
    assert info.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert everything(tmp_path) == {"x": b"old"}


def test_the_suffix_is_kept_because_some_writers_choose_the_format_by_it(tmp_path):
    with written_aside(tmp_path / "x.safetensors") as aside:
        assert aside.suffix == ".safetensors"


def test_others_may_read_the_file_as_far_as_the_umask_allows(tmp_path):
    mask = files._umask()
    assert stat.S_IMODE(write_atomic(tmp_path / "x", "").stat().st_mode) == 0o666 & ~mask


def test_the_cache_and_the_results_go_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("SUITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path / "results"))
    assert (cache_dir(), results_dir()) == (tmp_path / "cache", tmp_path / "results")
    monkeypatch.delenv("SUITE_CACHE")
    monkeypatch.delenv("SUITE_RESULTS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert (cache_dir(), results_dir()) == (tmp_path / "topk-to-crosscoders", files.ROOT / "out" / "results")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "topk-to-crosscoders"
