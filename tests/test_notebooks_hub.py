"""Notebooks with subject="hub", fed by a stand-in for the hub: GPT-2 and a Gemma-2 pair of few layers, and their text.

The pair's tokenizer puts <bos> before every text, and only the chat model's has a template, as Gemma's do.
"""

import json
import os
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from hub_server import serve
from tokenizers import processors

from helpers.base.storage import MODELS, ROOT
from helpers.suite import run as notebooks
from helpers.suite.run import execute, name_of, number_of
from helpers.text.documents import BOS, HUB_TEXT, load_tokenizer
from helpers.text.turns import HUB_DIALOGUES

PARAMETERS = {"scale": "smoke", "subject": "hub", "seed": 0}
SERVED = {"openai-community/gpt2": "docs-gpt2", "google/gemma-2-2b": "docs-gemma2-base"}
SERVED |= {"google/gemma-2-2b-it": "docs-gemma2-chat"}
WORDS = sorted(set(re.findall(r"[a-z]+", (ROOT / "README.md").read_text(encoding="utf-8"))))
CARD = "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n"
TESTED = "02 05 09 11"
ONLY = os.environ.get("HUB_NOTEBOOKS", TESTED)  # others on request
WITHOUT_CLAIMS = {"00"}
ON_EMBEDDED = {"12", "13", "14"}  # whatever the subject, as what they claim needs planted differences
NEEDS_BEHAVIOURS = {"11": {"C33"}}  # claims that dialogues of the hub cannot decide


def words(random: np.random.Generator, n: int) -> str:
    return " ".join(random.choice(WORDS, n)).capitalize() + "."


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    root, random = tmp_path_factory.mktemp("served"), np.random.default_rng(0)
    for repo, name in SERVED.items():
        folder = shutil.copytree(MODELS / name, root / "models" / repo, ignore=lambda *_: ["training.json"])
        tokenizer = load_tokenizer(folder)
        if "gemma" in repo:
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_token_id)]
            )
        if not repo.endswith("-it"):
            tokenizer.chat_template = None
            (folder / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer.save_pretrained(folder)
    text = [words(random, random.integers(200, 600)) for _ in range(3000)]
    talk = [
        [{"role": role, "content": words(random, 20)} for role in ("user", "assistant")] * random.integers(1, 3)
        for _ in range(4000)
    ]
    place = root / "datasets" / HUB_TEXT / "sample" / "10BT"
    place.mkdir(parents=True)
    (place.parents[1] / "README.md").write_text(CARD)
    pd.DataFrame({"text": text, "url": ""}).to_parquet(place / "000.parquet", row_group_size=500)
    place = root / "datasets" / HUB_DIALOGUES / "data"
    place.mkdir(parents=True)
    pd.DataFrame({"conversation": talk}).to_parquet(place / "train-00000-of-00001.parquet", row_group_size=500)
    with serve(root) as hub:
        yield hub


@pytest.mark.parametrize("path", notebooks.find(ONLY), ids=name_of)
def test_runs_on_what_a_hub_serves(path, hub, tmp_path, results_folder, monkeypatch):
    share = notebooks.share_of_cores(int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))
    here = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub")}
    here |= {"SUITE_CACHE": str(tmp_path / "cache")}
    outcome = execute(path, PARAMETERS, tmp_path / "copy.ipynb", limit_s=900, environment=share | here)
    assert not outcome.error, str(outcome)
    results = json.loads((results_folder / "hub-smoke" / f"{number_of(path)}.json").read_text())
    not_run = {claim for claim, row in results["claims"].items() if row["verdict"] == "not run"}
    assert results["claims"] or number_of(path) in WITHOUT_CLAIMS
    assert not_run >= NEEDS_BEHAVIOURS.get(number_of(path), set())
    assert all(results["claims"][claim]["why"] for claim in not_run)
    if number_of(path) in ON_EMBEDDED:
        assert not_run == results["claims"].keys() and results["read"] == "embedded" and results["why"]
    else:
        assert any(HUB_TEXT in asked for asked in hub.asked)
