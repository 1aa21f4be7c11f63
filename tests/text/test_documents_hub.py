"""Text for subject="hub": streamed documents, split by the same rule; no network is one clear sentence."""

import datasets
import pytest

from helpers.base.storage import MODELS
from helpers.text import documents as text
from helpers.text.documents import hub_documents, load_tokenizer, split_of, text_for

ROWS = [{"text": f"Document {i} says something of its own, and says it at some length."} for i in range(400)]


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    """A hub that counts what is read from it."""
    read = []

    def load_dataset(*arguments, **keywords):
        assert keywords == {"split": "train", "streaming": True}
        return (read.append(row) or row for row in ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setenv("SUITE_CACHE", str(tmp_path))
    return read


def test_reads_no_more_than_it_needs_and_splits_as_the_packages_do(fake_hub):
    found = hub_documents("train", n_characters=600)
    assert sum(len(d.text) for d in found) >= 600 and len(fake_hub) < 20
    assert all(split_of(d) == "train" for d in found)
    heldout = {d.name for d in hub_documents("heldout", n_characters=300)}
    assert heldout and heldout.isdisjoint(d.name for d in hub_documents("train", n_characters=10**9))


def test_the_hub_dial_gives_a_stream_of_the_asked_length(fake_hub):
    tokenizer = load_tokenizer(MODELS / "docs-gpt2")
    stream = text_for("hub", "train", tokenizer, 200)
    assert len(stream) == 200
    assert tokenizer.decode(stream.tokens[1:20]).startswith("Document ")


def test_no_network_is_one_clear_sentence(monkeypatch):
    def unreachable(*arguments, **keywords):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ConnectionError, match="could not be read from the hub .* use subject='embedded'"):
        text.hub_documents("train", 10)
