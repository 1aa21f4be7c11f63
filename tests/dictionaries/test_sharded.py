"""Training by 2 and by 4 processes is that of one. They are started by torchrun and talk over loopback."""

import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sharded_worker
import torch
from sharded_worker import CASES, N, batches, other_start
from twins import CountingSubject

from helpers.activations.stream import ActivationStream, Harvest
from helpers.base import products
from helpers.base.storage import ROOT, load_state, save_state
from helpers.dictionaries import shards
from helpers.dictionaries.autoencoders import BatchTopK, MultiTopK, ReLU, SparseAutoencoder, TopK
from helpers.dictionaries.dead_latents import Resample
from helpers.dictionaries.designated import DedicatedCrosscoder, DeltaCrosscoder
from helpers.dictionaries.shard_files import load_rows
from helpers.dictionaries.sharded import Together, part, split
from helpers.dictionaries.training import TrainConfig, Training, train

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Path, list[tuple[int, str]], dict]:
    """Where one of four processes was killed: the folder, how each ended and what it said, the checkpoint."""
    folder = tmp_path_factory.mktemp("sharded")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "4"}
    command = [sys.executable, sharded_worker.__file__, "killed", str(folder)]
    workers = [
        subprocess.Popen(command, env=ENVIRONMENT | place | {"RANK": str(r)}, stderr=subprocess.PIPE, text=True)
        for r in range(4)
    ]
    said = [worker.communicate(timeout=60)[1] for worker in workers]
    ends = [(worker.returncode, words) for worker, words in zip(workers, said, strict=True)]
    shutil.copytree(folder, folder / "of four")
    return folder, ends, load_state(folder / "training.safetensors")[1]


@pytest.fixture(scope="module")
def folder(killed) -> Path:
    """What all processes left, with the leftover of a process that was killed as it saved."""
    folder = killed[0]
    (folder / "training.safetensors.9999.0-of-4").write_text("cut sho")
    stop_at_batch_nine(folder / "of one" / "training.safetensors")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", sharded_worker.__file__]
    done = subprocess.run(
        [sys.executable, *command, "compared", str(folder)], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module", autouse=True)
def in_32_bits():
    """As the workers do, what a fixture trains as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "has_fast_bf16", lambda *_: False)
        yield


def stop_at_batch_nine(checkpoint: Path) -> None:
    """One process, which stops as the killed four did."""
    make, config = CASES["batchtopk auxk"]
    with pytest.raises(ValueError, match="the batches ended"):
        train(make(), batches()[:9], config, None, checkpoint, 0.0)


class OneOf:
    """Stands in for a group."""

    def __init__(self, rank, size):
        self.rank, self.size = (lambda: rank), (lambda: size)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_fifty_steps_of_several_processes_are_those_of_one(name, size, folder):
    make, config = CASES[name]
    sae, record = train(make(), batches(), config)
    for rank in range(size):
        found = torch.load(folder / f"{name} {rank} of {size}.pt")
        for key, value in sae.state_dict().items():
            torch.testing.assert_close(found[key], value, atol=1e-5, rtol=0)
        for row, ours in zip(found["curve"], record["curve"], strict=True):
            assert row == pytest.approx(ours, abs=1e-5)
        torch.testing.assert_close(found["own x_hat"], sae(batches()[0]).detach(), atol=1e-5, rtol=0)
    if "auxk" in name:
        assert max(row["dead"] for row in record["curve"]) > 0  # else AuxK has done nothing


def test_each_process_holds_its_share_and_the_same_b_dec(folder):
    parts = [torch.load(folder / f"topk {rank} of 4.pt") for rank in range(4)]
    assert [len(part["own.W_enc"]) for part in parts] == [12, 13, 12, 13]
    for name in ("W_enc", "W_dec", "b_enc"):
        assert torch.equal(torch.cat([part[f"own.{name}"] for part in parts]), parts[0][name])
    assert all(torch.equal(part["own.b_dec"], parts[0]["b_dec"]) for part in parts)  # to the bit: it never drifts


def test_a_killed_process_ends_the_others_with_one_sentence_and_leaves_the_last_checkpoint(killed):
    _, ends, state = killed
    assert ends[3][0] == -signal.SIGKILL
    for code, said in ends[:3]:
        assert code == 1
        assert re.search("ConnectionError: another process .* has ended .* start all of them again", said)
    assert state["tokens"] == 9 * 64 and [rows for _, rows in state["parts"]] == [12, 13, 12, 13]


def test_one_process_goes_on_from_the_checkpoint_of_four(folder, tmp_path):
    make, config = CASES["batchtopk auxk"]
    shutil.copytree(folder / "of four", tmp_path, dirs_exist_ok=True)
    found = train(other_start(), batches(), config, None, tmp_path / "training.safetensors").sae.state_dict()
    for key, value in train(make(), batches(), config).sae.state_dict().items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("of", ["four", "one"])
def test_two_processes_go_on_from_the_checkpoint_of_four_or_one_to_the_end_of_one(of, folder):
    make, config = CASES["batchtopk auxk"]
    sae = train(make(), batches(), config).sae
    for rank in range(2):
        found = torch.load(folder / f"resumed of {of} {rank}.pt")
        for key, value in sae.state_dict().items():
            torch.testing.assert_close(found[key], value, atol=1e-5, rtol=0)
    names = sorted(path.name for path in folder.glob("training*"))
    assert names == ["training.safetensors", *(f"training.safetensors.3200.{rank}-of-2" for rank in range(2))]


def test_any_rows_are_read_from_whatever_parts_hold_them(tmp_path):
    x = torch.arange(10.0)
    for name, rows in {"a": x[:4], "b": x[4:5], "c": x[5:]}.items():
        save_state(tmp_path / name, {"silent": rows})
    parts = [("a", 4), ("b", 1), ("c", 5)]
    for first, last in itertools.combinations(range(11), 2):
        assert torch.equal(load_rows(tmp_path / "state", parts, first, last)["silent"], x[first:last])


def test_a_lost_or_broken_part_is_named(tmp_path):
    with pytest.raises(ValueError, match="part.0 is not a whole part of a checkpoint"):
        load_rows(tmp_path / "state", [("part.0", 4)], 0, 4)
    (tmp_path / "part.0").write_text("cut sho")
    with pytest.raises(ValueError, match="part.0 is not a whole part of a checkpoint"):
        load_rows(tmp_path / "state", [("part.0", 4)], 0, 4)


def test_shares_follow_each_other_and_cover_all_latents():
    spans = [shards.span(50, OneOf(rank, 4)) for rank in range(4)]
    assert spans == [(0, 12), (12, 25), (25, 37), (37, 50)]
    assert shards.span(50, None) == (0, 50)


def test_fewer_latents_than_processes_are_refused():
    with pytest.raises(ValueError, match="3 latents are too few for 4 processes"):
        shards.span(3, OneOf(0, 4))


def test_the_k_largest_of_all_processes_win_and_equals_go_to_the_first(monkeypatch):
    """Two processes offer the 2 largest of a token each: 5, 3 and 4, 3; then three equals for two places."""
    offers = torch.tensor([[[5.0, 3.0], [1.0, 1.0]], [[4.0, 3.0], [1.0, 0.0]]])  # (processes, batch, k)
    monkeypatch.setattr(shards, "gathered", lambda x, group: offers)
    assert shards.winners(offers[0], 2, OneOf(0, 2)).tolist() == [[5, 0], [1, 1]]
    assert shards.winners(offers[1], 2, OneOf(1, 2)).tolist() == [[4, 0], [0, 0]]


def test_a_process_can_make_its_part_alone_and_parts_differ():
    parts = [part(lambda n, seed: SparseAutoencoder(8, n, TopK(3), seed), 50, OneOf(rank, 4)) for rank in range(4)]
    assert [sae.n_latents for sae in parts] == [12, 13, 12, 13] and parts[2].group.rank() == 2
    assert torch.cat([sae.W_dec for sae in parts]).unique(dim=0).shape == (50, 8)


@pytest.mark.parametrize(
    "crosscoder",
    [
        DedicatedCrosscoder(8, N, TopK(3), dedicated=2),
        DeltaCrosscoder(8, N, BatchTopK(3), delta=4, k_delta=2, weight=1.0),
    ],
)
def test_crosscoders_with_latents_of_their_own_kind_are_refused(crosscoder):
    with pytest.raises(ValueError, match=f"a {type(crosscoder).__name__} is not trained by several processes"):
        split(crosscoder, OneOf(0, 2))


def test_other_remedies_are_refused():
    sae = split(SparseAutoencoder(8, N, TopK(3)), OneOf(0, 2))
    with pytest.raises(ValueError, match=r"Resample is not for several processes: use AuxK\(\) or Remedy\(\)"):
        Training(sae, TrainConfig(64, remedy=Resample()), torch.randn(64, 8))


def test_processes_with_different_batches_are_refused(monkeypatch):
    """The first number is another process's."""
    monkeypatch.setattr(shards, "gathered", lambda x, group: torch.stack([x + 1, x]))
    with pytest.raises(ValueError, match="the processes have different batches"):
        Training(split(SparseAutoencoder(8, N, TopK(3)), OneOf(0, 2)), TrainConfig(64), torch.randn(64, 8))


@pytest.mark.parametrize("activation", [ReLU(), MultiTopK(3)])
def test_architectures_without_one_contest_are_refused(activation):
    with pytest.raises(ValueError, match="not trained by several processes: use TopK or BatchTopK"):
        split(SparseAutoencoder(8, N, activation), OneOf(0, 2))


class Threads:
    """Stands in for the processes of a group: threads, each with a `member` of its own."""

    def __init__(self, size, monkeypatch):
        self.barrier, self.given = threading.Barrier(size), {}
        self.members = [OneOf(rank, size) for rank in range(size)]
        monkeypatch.setattr(shards, "gathered", self.gathered)

    def gathered(self, x, member):
        self.given[member.rank()] = x
        self.barrier.wait(10)
        everyone = torch.stack([self.given[rank] for rank in range(member.size())])
        self.barrier.wait(10)
        return everyone


def harvested(subject):
    """The first 90 shuffled activations of 25 rows, three rows a forward pass and at last one."""
    tokens = torch.arange(200) % 50
    stream = ActivationStream(subject, tokens, Harvest(context=8, rows=3, normalisation="none"), batch_size=30)
    return torch.cat(list(stream.batches(90)))


@pytest.mark.parametrize("size", [2, 4])
def test_a_harvest_by_several_processes_is_that_of_one_and_each_runs_its_share(size, monkeypatch):
    alone, members = CountingSubject(), Threads(size, monkeypatch).members
    subjects = [CountingSubject() for _ in members]
    with ThreadPoolExecutor(size) as threads:
        found = list(threads.map(harvested, map(Together, subjects, members)))
    assert all(torch.equal(each, harvested(alone)) for each in found)
    assert sum(subject.rows_read for subject in subjects) == 25
    assert subjects[0].rows_read == {2: 17, 4: 9}[size]  # of 8 passes of three rows 16 or 8, and the last row


def test_a_divided_harvest_with_a_cache_is_refused():
    """They would wait for each other: one in the forward pass, the others for its cache."""
    together = Together(CountingSubject(), OneOf(0, 2))
    with pytest.raises(ValueError, match="no harvest can be divided there: give the stream cache=False, or the sub"):
        ActivationStream(together, torch.arange(200) % 50, Harvest(context=8), batch_size=30, cache=True)
