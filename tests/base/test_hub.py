"""Against a stand-in for the hub on loopback: what works is fetched once, and every fault is one sentence."""

import itertools
import re
import time

import pandas as pd
import pytest
from hub_server import Fault
from huggingface_hub import constants

from helpers.base import hub
from helpers.base.storage import cache_dir

REPO, DATA = "google/gemma-2-2b", "owner/talk"
FILES = {"config.json": b'{"a": 1}', "model.safetensors": bytes(range(256)) * 40}
ROWS = [f"row {i}" for i in range(600)]
README = "---\nconfigs:\n- config_name: few\n  data_files:\n  - split: train\n    path: data/*.parquet\n---\n"
IN_A_SENTENCE = "run once with a network, or use another$"


@pytest.fixture(autouse=True)
def repositories(live_hub):
    folder, data = live_hub.root / "models" / REPO, live_hub.root / "datasets" / DATA
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (data / "data").mkdir(parents=True)
    (data / "README.md").write_text(README)
    pd.DataFrame({"text": ROWS}).to_parquet(data / "data" / "0.parquet", row_group_size=100)


@pytest.fixture(autouse=True)
def slept(monkeypatch):
    """Nobody waits; the seconds that would have passed."""
    seconds = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def whole(folder):
    for name in FILES:
        (folder / name).stat()
    return folder


def fetch():
    return hub.snapshot(REPO, whole, "use another", allow_patterns=["*.json", "*.safetensors"])


def read(n=None):
    return list(itertools.islice(hub.rows(DATA, "text", "few", instead="use another"), n))


GET = {"model": fetch, "dataset": read}
NAMES = {"model": REPO, "dataset": DATA}
both = pytest.mark.parametrize("kind", GET)


def refused(kind, error, match):
    with pytest.raises(error, match=match) as caught:
        GET[kind]()
    assert type(caught.value) is error and "\n" not in str(caught.value)


def test_a_model_is_fetched_once_and_then_read_from_the_cache(live_hub):
    folder = fetch()
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    live_hub.asked.clear()
    assert fetch() == folder and live_hub.asked == []


def test_rows_come_in_order_and_are_kept(live_hub):
    assert read() == ROWS
    live_hub.asked.clear()
    assert read() == ROWS and live_hub.asked == []


def test_no_more_rows_are_kept_than_were_needed_and_reading_goes_on_from_there(live_hub):
    assert read(10) == ROWS[:10]
    assert [path.name for path in sorted(cache_dir().rglob("*.json"))] == ["000000.json"]
    assert read() == ROWS and len(list(cache_dir().rglob("*.json"))) == 3


def test_a_block_of_rows_cut_short_is_read_anew():
    read(10)
    next(cache_dir().rglob("*.json")).write_text('["row')
    assert read(10) == ROWS[:10]


@both
def test_a_gated_repository_without_a_token_says_all_three_steps(kind, live_hub):
    live_hub.gated.add(NAMES[kind])
    place = {"model": REPO, "dataset": f"datasets/{DATA}"}[kind]
    login = "run `hf auth login` or set HF_TOKEN"
    refused(kind, PermissionError, f"{NAMES[kind]} is gated.* not logged in: open {live_hub.url}/{place}, .*{login}")


@both
def test_a_licence_that_was_not_accepted_is_no_missing_token(kind, live_hub, monkeypatch):
    live_hub.gated.add(NAMES[kind])
    monkeypatch.setenv("HF_TOKEN", "hf_unlicensed")
    refused(kind, PermissionError, f"your token has not accepted its licence: open {live_hub.url}.* then run again")


@both
def test_with_a_token_and_the_licence_it_works(kind, live_hub, monkeypatch):
    live_hub.gated.add(NAMES[kind])
    monkeypatch.setenv("HF_TOKEN", "hf_licensed")
    got = GET[kind]()
    assert got == ROWS if kind == "dataset" else whole(got)


@both
def test_an_unknown_token_is_named(kind, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    refused(kind, PermissionError, f"does not know your token, which {NAMES[kind]} .*`hf auth login`, or mend HF_TOKEN")


@both
def test_a_token_without_the_right_is_named(kind, live_hub):
    live_hub.faults.append(Fault("/resolve/", 403))
    refused(kind, PermissionError, f"your token may not read {NAMES[kind]}: give it the right")


@both
def test_a_name_that_the_hub_does_not_know(kind, live_hub, monkeypatch):
    for directory in (REPO, DATA):
        monkeypatch.setattr(live_hub, "root", live_hub.root / directory)  # nothing is there
    refused(kind, ValueError, f"{NAMES[kind]} is neither a directory here nor a {kind} on the hub: check the name")


def test_what_a_repository_lacks_is_said_as_for_a_folder(live_hub):
    (live_hub.root / "models" / REPO / "model.safetensors").unlink()
    refused("model", FileNotFoundError, "model.safetensors")


@both
@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("on", ["/api/", "/tree/", "/resolve/", "/large/"])
def test_a_busy_hub_is_asked_again(kind, status, on, live_hub, slept):
    live_hub.faults.append(Fault(on, status, times=2))
    assert GET[kind]()
    assert live_hub.faults[0].times == 0 and 0 < sum(slept) < 60


@both
@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_stays_busy_is_named(kind, status, live_hub, slept):
    live_hub.faults.append(Fault("/resolve/", status))
    refused(kind, ConnectionError, rf"the hub is busy \({status}\) and gave no .* run again later, .*or use another$")
    assert sum(slept) == sum(hub.WAITS)


@both
def test_a_file_that_ends_early_is_gone_on_with(kind, live_hub):
    live_hub.faults.append(Fault("/large/", "cut", times=2))
    GET[kind]()
    assert live_hub.faults[0].times == 0


def test_a_file_that_always_ends_early_is_named_and_left_out(live_hub):
    live_hub.faults.append(Fault("/large/", "cut"))
    refused("model", ConnectionError, IN_A_SENTENCE)
    live_hub.faults.clear()
    assert (fetch() / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_file_with_another_hash_is_fetched_again(live_hub):
    live_hub.faults.append(Fault("/large/", "spoilt", times=1))
    assert (fetch() / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_file_that_always_has_another_hash_is_named_and_not_kept(live_hub):
    live_hub.faults.append(Fault("/large/", "spoilt"))
    refused("model", ConnectionError, r"model.safetensors came with another hash than the hub states")
    assert not [path for path in live_hub.root.parent.joinpath("hub").rglob("model.safetensors") if path.exists()]


def test_a_damaged_table_is_named(live_hub):
    live_hub.faults.append(Fault("/large/", "spoilt"))
    refused("dataset", ConnectionError, rf"{DATA} .*\(ArrowInvalid: .*{IN_A_SENTENCE}")


@both
def test_a_cache_on_a_read_only_disk_serves_what_it_has(kind, live_hub):
    expected, caches = GET[kind](), live_hub.root.parent
    before = {path: path.lstat().st_mtime_ns for path in caches.rglob("*")}
    for path in before:
        if path.is_dir():
            path.chmod(0o555)  # of no effect for root: that nothing was written is looked up as well
    assert GET[kind]() == expected
    assert {path: path.lstat().st_mtime_ns for path in caches.rglob("*")} == before
    for path in before:
        if path.is_dir():
            path.chmod(0o755)


@both
def test_a_cache_that_cannot_be_written_is_named(kind, live_hub, monkeypatch):
    blocked = live_hub.root / "file"
    blocked.write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(blocked / "hub"))
    refused(kind, NotADirectoryError, f"{NAMES[kind]} could not be written to the hub's cache {blocked}.* set HF_HOME")


@pytest.mark.parametrize(
    ("kind", "on"),
    [*itertools.product(GET, ["/api/", "/tree/", "/resolve/", "/large/"]), ("model", "/resolve/.*safetensors")],
)
def test_a_stalled_connection_is_given_up_soon(kind, on, live_hub, monkeypatch, slept):
    usual = {"HEAD": hub.PATIENCE, "GET": constants.HF_HUB_DOWNLOAD_TIMEOUT, "POST": constants.HF_HUB_DOWNLOAD_TIMEOUT}
    live_hub.faults.append(Fault(on, "stall"))
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    monkeypatch.setattr(hub, "PATIENCE", 0.05)
    began = time.monotonic()
    refused(kind, ConnectionError, IN_A_SENTENCE)
    assert time.monotonic() - began < 30  # the library alone would wait for minutes
    waits = [usual[asked.split()[0]] for asked in live_hub.asked if re.search(on, asked)]
    assert waits and sum(waits) + sum(slept) <= hub.STALLED


@both
def test_no_network_is_one_sentence_and_a_warm_cache_needs_none(kind, live_hub):
    expected = GET[kind]()
    live_hub.server_close()
    assert GET[kind]() == expected


@both
def test_no_network_and_a_cold_cache(kind, live_hub):
    live_hub.server_close()
    refused(kind, ConnectionError, f"{NAMES[kind]} is not complete in the local cache .*{IN_A_SENTENCE}")


@both
def test_offline_is_named(kind, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(kind, ConnectionError, rf"\(HF_HUB_OFFLINE is set\): {IN_A_SENTENCE}")
