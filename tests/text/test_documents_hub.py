"""Text for subject="hub": streamed documents, split by the same rule; no network is one clear sentence."""

import pytest

from helpers.base import hub
from helpers.base.storage import MODELS
from helpers.text.documents import HUB_TEXT, hub_documents, load_tokenizer, split_of, text_for

ROWS = [f"Document {i} says something of its own, and says it at some length." for i in range(400)]


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    """A hub that counts what is read from it."""
    read = []

    def rows(name, column, *config, instead):
        assert (name, column, config) == (HUB_TEXT, "text", ("sample-10BT",))
        return (read.append(row) or row for row in ROWS)

    monkeypatch.setattr(hub, "rows", rows)
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


def test_no_network_is_one_clear_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("SUITE_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match='fineweb is not complete in the local cache .* use subject="embedded"'):
        hub_documents("train", 10)
