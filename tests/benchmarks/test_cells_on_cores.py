"""Seconds of a sweep of eight small cells, side by side and in turn, alone and beside one busy process."""

import statistics
import subprocess
import sys
import time

import joblib
import torch

from helpers.activations.stream import ActivationStream, Harvest
from helpers.dictionaries.sweeps import Cell, sweep
from helpers.subjects.subject import load_subject
from helpers.text.documents import text_for

CELLS = [Cell("TopK", 512, 32, seed=seed) for seed in range(8)]
TOKENS, BATCH, TURNS = 61_440, 1_024, 3
BUSY = [sys.executable, "-c", "while True: pass"]


def test_a_small_sweep_beside_a_busy_process(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("SUITE_CACHE", str(tmp_path))
    model = load_subject("docs-gpt2")
    tokens = text_for("embedded", "train", model.tokenizer, int(1.05 * TOKENS)).tokens
    stream = ActivationStream(model, tokens, Harvest(), BATCH, cache=True)
    heldout = stream.take(4_096)
    seconds = {}
    ways = {"side by side": max(2, joblib.cpu_count()), "in turn": 1}
    for way in ways.values():
        sweep(CELLS, stream.batches, heldout, BATCH, n_jobs=way)  # starts the processes
    for _ in range(TURNS):
        for beside in ("alone", "beside a busy process"):
            busy = subprocess.Popen(BUSY) if beside != "alone" else None
            for way, n_jobs in ways.items():
                started = time.perf_counter()
                sweep(CELLS, stream.batches, heldout, TOKENS, n_jobs=n_jobs)
                seconds.setdefault((way, beside), []).append(time.perf_counter() - started)
            if busy:
                busy.kill()
                busy.wait()
    median = {case: statistics.median(times) for case, times in seconds.items()}
    with capsys.disabled():
        print(f"\n{len(CELLS)} cells of {TOKENS:,} tokens, {torch.get_num_threads()} threads where cells go in turn")
        for (way, beside), found in median.items():
            print(f"{way:>12}, {beside:<21} {found:6.1f} s")
    assert median["side by side", "beside a busy process"] <= 2.5 * median["side by side", "alone"]
