"""Files appear whole or not at all, folders come from the environment, and a training's state comes back to the bit."""

import errno
import os
import socket
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from helpers.base import storage as files
from helpers.base.storage import (
    alone,
    cache_dir,
    load_optimizer,
    load_state,
    optimizer_tensors,
    restore_training,
    results_dir,
    save_state,
    training_tensors,
    write_atomic,
    written_aside,
)


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


class Tiny(nn.Module):
    """An embedding that is also the head, and one matrix between."""

    def __init__(self, d_model: int = 4):
        super().__init__()
        self.embed = nn.Embedding(6, d_model)
        self.block = nn.Linear(d_model, d_model)
        self.head = nn.Linear(d_model, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embed(ids)).relu())


def a_training(seed: int) -> tuple[Tiny, list[torch.optim.Optimizer]]:
    torch.manual_seed(seed)
    model = Tiny()
    muon = torch.optim.Muon([model.block.weight], lr=0.1, momentum=0.9)
    return model, [muon, torch.optim.AdamW([model.embed.weight, model.block.bias], lr=0.1, fused=True)]


def take_steps(model: Tiny, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
    for step in steps:
        ids = torch.arange(6).roll(step)
        nn.functional.cross_entropy(model(ids), (ids * step) % 6).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_tensors_and_metadata_come_back_as_they_were(tmp_path):
    tensors = {
        "half": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "trained": nn.Parameter(torch.ones(2)),
    }
    metadata = {"step": 3, "curve": [{"loss": 0.1 + 0.2}], "name": "é✔", "nothing": None}
    save_state(tmp_path / "a" / "x.safetensors", tensors, **metadata)
    loaded, meta = load_state(tmp_path / "a" / "x.safetensors")
    assert meta == metadata
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


def test_a_training_goes_on_as_if_it_had_never_stopped(tmp_path):
    straight = a_training(0)
    take_steps(*straight, range(8))
    stopped = a_training(0)
    take_steps(*stopped, range(5))
    save_state(tmp_path / "x.safetensors", training_tensors(*stopped))
    resumed = a_training(1)
    restore_training(load_state(tmp_path / "x.safetensors")[0], *resumed)
    take_steps(*resumed, range(5, 8))
    expected = training_tensors(*straight)
    assert expected.keys() == {
        *("model.embed.weight", "model.block.weight", "model.block.bias", "optimizer0.0.momentum_buffer"),
        *(f"optimizer1.{i}.{entry}" for i in range(2) for entry in ("step", "exp_avg", "exp_avg_sq")),
    }
    for name, tensor in training_tensors(*resumed).items():
        assert torch.equal(tensor, expected[name]), name


def test_what_was_loaded_does_not_change_when_training_goes_on():
    stopped, resumed = a_training(0), a_training(1)
    take_steps(*stopped, range(5))
    tensors = {name: tensor.detach().clone() for name, tensor in training_tensors(*stopped).items()}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    restore_training(tensors, *resumed)
    take_steps(*resumed, range(5, 8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())


def test_settings_stay_those_of_the_new_optimizer():
    weight = nn.Parameter(torch.ones(2))
    old, new = (torch.optim.AdamW([weight], lr=lr) for lr in (0.1, 0.2))
    weight.sum().backward()
    old.step()
    load_optimizer(new, optimizer_tensors(old, "x"), "x")
    assert (new.param_groups[0]["lr"], new.state[weight]["step"]) == (0.2, 1)


def test_the_state_of_one_optimizer_is_not_taken_for_that_of_another():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    tensors = {f"optimizer{i}.0.step": torch.tensor(float(i)) for i in (1, 10, 2)}
    load_optimizer(optimizer, tensors, "optimizer1")
    assert optimizer.state[weight] == {"step": 1.0}


def test_another_model_is_refused_and_left_alone(tmp_path):
    tensors = training_tensors(*a_training(0))
    other = Tiny(d_model=5)
    before = [parameter.clone() for parameter in other.parameters()]
    with pytest.raises(ValueError, match="of another model; build the same one, or move the checkpoint away"):
        restore_training(tensors, other, [])
    assert all(map(torch.equal, before, other.parameters()))
    with pytest.raises(ValueError, match="of another model"):
        restore_training(tensors | {"model.more": torch.ones(1)}, *a_training(0))


@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_a_file_cut_short_is_refused_by_name(tmp_path, kept):
    path = tmp_path / "x.safetensors"
    save_state(path, {"a": torch.ones(100)}, step=1)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"x\.safetensors is not a whole checkpoint .*; delete it and run again"):
        load_state(path)


def test_a_file_of_another_kind_is_refused_by_name(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole checkpoint"):
        load_state(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        load_state(tmp_path / "none.safetensors")


@pytest.mark.parametrize("problem", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_save_leaves_the_old_state_and_nothing_else(tmp_path, monkeypatch, problem):
    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half")
        raise problem

    save_state(tmp_path / "x.safetensors", {"a": torch.ones(1)}, step=1)
    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    with pytest.raises(problem):
        save_state(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, step=2)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    tensors, meta = load_state(tmp_path / "x.safetensors")
    assert (tensors["a"].item(), meta) == (1.0, {"step": 1})


def test_metadata_that_is_not_json_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_state(tmp_path / "x.safetensors", {}, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SUITE_CACHE": "", "XDG_CACHE_HOME": "/c"}, "/c/topk-to-crosscoders"),
        ({"SUITE_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/topk-to-crosscoders"),
        ({"SUITE_CACHE": "~/x", "HOME": "/h"}, "/h/x"),
        ({"XDG_CACHE_HOME": "~/c", "HOME": "/h"}, "/h/c/topk-to-crosscoders"),
        ({"SUITE_CACHE": "$HOME/x", "HOME": "/h"}, "/h/x"),
        ({"SUITE_CACHE": "my cache"}, f"{files.ROOT}/my cache"),  # wherever the process was started
    ],
)
def test_a_variable_names_one_folder_however_it_is_written(monkeypatch, variables, expected):
    for name in ("SUITE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert files.cache_dir() == Path(expected)
    monkeypatch.setenv("SUITE_RESULTS", "")
    assert files.results_dir() == files.OUT / "results"


def test_a_named_cache_needs_no_home(monkeypatch):
    monkeypatch.setenv("SUITE_CACHE", "/c")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert files.cache_dir() == Path("/c")


def test_a_full_disk_under_safetensors_names_the_target_too(tmp_path, monkeypatch):
    def full(*_, **__):
        raise safetensors.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="could not write .*state.safetensors .*No space left.*free space and run again"):
        files.save_state(tmp_path / "state.safetensors", {"a": torch.zeros(2)})
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path):
    host, ended = socket.gethostname(), subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, living, elsewhere = (
        tmp_path / f".x.bin.{name}.bin"
        for name in (f"{host}.{ended.pid}.a", f"{host}.{os.getppid()}.b", f"other.{ended.pid}.c")
    )
    for file in (left, living, elsewhere):
        file.touch()
    files.write_atomic(tmp_path / "x.bin", b"whole")
    assert sorted(tmp_path.iterdir()) == sorted([living, elsewhere, tmp_path / "x.bin"])


@pytest.mark.parametrize("below", ["a file/x/y", "a file/y", "a folder"])
def test_a_place_that_cannot_be_written_to_is_one_clear_sentence(tmp_path, below):
    (tmp_path / "a file").write_text("")
    (tmp_path / "a folder").mkdir()
    with pytest.raises(
        OSError, match=f"could not write .*/{below} .*; nothing was changed, choose a folder that can be"
    ):
        write_atomic(tmp_path / below, "x")


# ---- one at a time


def test_of_many_one_is_alone_and_no_lock_lies_beside(tmp_path, tmp_path_factory, monkeypatch):
    """Each adds one to a number that it has read before; the lock is a file's, so threads are as good as processes."""
    monkeypatch.setenv("SUITE_CACHE", str(tmp_path_factory.mktemp("cache")))
    path = write_atomic(tmp_path / "count", "0")

    def add(_):
        with alone(path) as ours:
            count = int(path.read_text())
            time.sleep(0.001)
            path.write_text(str(count + 1))
        return ours

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(add, range(100)))
    assert everything(tmp_path) == {"count": b"100"}


def test_who_does_not_wait_is_told_and_the_lock_of_a_killed_process_is_free(tmp_path, monkeypatch):
    monkeypatch.setenv("SUITE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "new" / "x"
    code = "import time; from pathlib import Path; from helpers.base.storage import alone\n"
    code += f"with alone(Path({str(path)!r})):\n    print(flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    holder.stdout.readline()
    with alone(path, wait=False) as ours:
        assert not ours
    holder.kill()
    holder.communicate()
    with alone(path, wait=False) as ours:
        assert ours
    assert not path.parent.exists()  # nothing lies beside the entry


def test_a_leftover_that_another_process_removes_first_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_leftovers", lambda path, name=None: [tmp_path / ".gone"])
    assert files.write_atomic(tmp_path / "file", "text").read_text() == "text"
