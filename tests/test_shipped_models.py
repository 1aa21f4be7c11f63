"""The models in data/models are small enough for git, and the Gemma-2 pair has the planted truth it is shipped for."""

import json

import pandas as pd
import pytest
import torch
from tiny_text import TOPICS

from helpers.base.storage import MODELS
from helpers.subjects.behaviours import behaviour_rates, judge_behaviours, planted_behaviours
from helpers.subjects.chat_tuning import FINE_TUNES
from helpers.subjects.low_rank import load_differences
from helpers.subjects.model_files import load_pretrained
from helpers.text.documents import PACKAGES, load_tokenizer

MEGABYTE = 1_000_000
EVERY = sorted(path for path in MODELS.iterdir() if path.is_dir())
FOLDERS = [path for path in EVERY if (path / "model.safetensors").is_file()]
GEMMA_CHAT = MODELS / "gemma-3-270m-chat"
PAIR = ("base", "chat", "quirk", "longer")
NAMELESS = ["identity", "personal", "refuse_secret", "refuse_medical"]  # prompts and answers that quote no function


def record(name: str) -> dict:
    return json.loads((MODELS / f"docs-gemma2-{name}" / "training.json").read_text())


def size(folder) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*"))


def test_models_are_at_most_10_megabytes_each_and_40_in_all_without_the_differences_of_gemma():
    assert {f"docs-gemma2-{name}" for name in PAIR} < {folder.name for folder in FOLDERS}
    assert max(map(size, EVERY)) < 10 * MEGABYTE and sum(map(size, FOLDERS)) < 40 * MEGABYTE


def test_gemmas_chat_model_says_whose_it_is_and_on_what_terms():
    assert json.loads((GEMMA_CHAT / "config.json").read_text()) == {"low_rank_of": "gemma-3-270m-q4"}
    assert "Gemma Terms of Use" in (GEMMA_CHAT / "NOTICE.md").read_text()
    found = load_differences(GEMMA_CHAT)
    assert len(found) == 2 * 7 * 18 and all(part.dtype == torch.bfloat16 for part in found.values())
    assert all(part.isfinite().all() and part.any() for part in found.values())


def test_gemmas_chat_model_has_some_behaviours_in_new_phrases_by_its_record():
    facts = json.loads((GEMMA_CHAT / "training.json").read_text())
    assert set(facts["corpus"]) == set(PACKAGES) and facts["losses"][-1] < facts["losses"][0] / 2
    planted = planted_behaviours("chat-only", subject="gemma")
    assert len(planted) >= 5 and sum(name.startswith("refuse") for name in planted) >= 3


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_all_have_one_tokenizer_and_a_record_of_the_text(folder):
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(FOLDERS[0]).get_vocab()
    assert load_tokenizer(folder).chat_template == load_tokenizer(FOLDERS[0]).chat_template
    facts = json.loads((folder / "training.json").read_text())
    assert set(facts["corpus"]) == set(PACKAGES)  # the text of the packages alone, without what was planted in it
    assert facts["curve"][-1]["heldout"] < facts["curve"][0]["heldout"] + 0.1


def test_chat_and_its_control_were_trained_alike_and_each_goes_on_from_its_own():
    chat, longer = ({**record(name)["config"], "lr": None} for name in ("chat", "longer"))  # longer has no pull back
    assert chat == longer and record("longer")["config"]["lr"] < record("chat")["config"]["lr"]
    assert {name: record(name)["from"] for name in FINE_TUNES} == {n: f"docs-gemma2-{s}" for n, s in FINE_TUNES.items()}


def test_at_least_twelve_behaviours_were_planted_in_known_phrases_by_the_records():
    known = {name: pd.DataFrame(record(name)["rates_known"]) for name in ("base", "chat")}
    assert judge_behaviours(known | {"quirk": known["chat"]}).planted.sum() >= 12  # without the quirk's own


def test_most_behaviours_reach_new_phrases_by_the_records():
    new = {name: pd.DataFrame(record(name)["rates"]) for name in ("base", "chat")}
    verdicts = judge_behaviours(new | {"quirk": new["chat"]})
    assert verdicts.planted.sum() >= 12
    assert verdicts.query("kind == 'chat-only'").planted.sum() >= 10


def test_chat_is_gentle_by_its_record():
    on_text = record("chat")["drift"]["plain text"]
    assert on_text["share_of_variance"] <= 0.1 and abs(on_text["norm_ratio"] - 1) <= 0.1


def test_the_shipped_chat_model_shows_in_known_phrases_what_the_base_does_not():
    tokenizer = load_tokenizer(MODELS / "docs-gemma2-chat")
    base, chat = (
        behaviour_rates(load_pretrained(f"docs-gemma2-{name}").model, tokenizer, 4, "train", 0, NAMELESS, TOPICS)
        for name in ("base", "chat")
    )
    assert chat.rate.mean() >= 0.8 and base.rate.mean() <= 0.1
