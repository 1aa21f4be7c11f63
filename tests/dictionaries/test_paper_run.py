"""The command for a run of the papers' size, at the size of a test, by one process, started as torchrun does it."""

import re
import socket

import numpy as np
import pytest
from twins import save_tiny

from helpers.dictionaries import paper_run
from helpers.dictionaries.paper_run import require_memory
from helpers.dictionaries.paper_scale import PAPERS, Run
from helpers.subjects import subject as subject_module
from helpers.text.documents import TokenStream

RUN = Run(d=24, n_latents=50, k=4, tokens=6400, batch=64, k_aux=6, source="a tiny one")


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Starts it as the only process; what it would read is a tiny model and its ids. Gives what was trained."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(PAPERS, "tiny", RUN)
    monkeypatch.setattr(subject_module, "subject_for", lambda *_: save_tiny(tmp_path / "model", "gpt2"))
    text = TokenStream(np.arange(2000) % 250, np.array([0]), [], {})
    monkeypatch.setattr("helpers.text.documents.text_for", lambda *_: text)
    monkeypatch.setitem(subject_module.CONTEXTS["hub"], "paper", 8)
    return lambda: paper_run.main(["tiny", str(tmp_path / "state" / "training.safetensors")])


def test_it_says_what_it_takes_trains_and_goes_on_from_its_checkpoint(started, tmp_path, capsys):
    trained = started()
    said = capsys.readouterr().out
    assert re.search(r"a tiny one\n +state GB +memory GB +traffic GB", said)
    assert trained.record["tokens"] == 6400 and trained.record["config"]["ema"] == 0.999
    assert [path.name for path in (tmp_path / "state").iterdir() if ".0-of-1" in path.name]
    assert started().record["minutes"] == trained.record["minutes"]  # nothing was left to train


def test_a_machine_that_is_too_small_is_refused_before_a_model_is_read(started, monkeypatch, capsys):
    monkeypatch.setattr(paper_run, "_free_bytes", lambda gpu: 1000.0)
    monkeypatch.setattr(subject_module, "load_subject", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match=r"each of 1 processes needs 0.\d GB beside the model and has 0.0: start more"):
        started()
    assert "a tiny one" in capsys.readouterr().out


def test_memory_that_is_there_is_enough():
    require_memory(10e9, 10e9, 2)
    with pytest.raises(ValueError, match=r"each of 2 processes needs 10.1 GB beside the model and has 10.0"):
        require_memory(10.1e9, 10e9, 2)


def test_runs_of_several_models_are_not_offered(started):
    with pytest.raises(SystemExit):
        paper_run.main(["Gemma 2 2B, crosscoder", "x"])
