"""The pair of a real Gemma, on a random small one: what is taught, what is held, and what base writes."""

import pytest
import torch
from tiny_text import TOKENIZER, TOPICS
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from helpers.subjects import gemma_pair
from helpers.subjects.gemma_pair import DIALOGUES, HELD, batches, gentle_loss, sampled, spoken, tune_chat
from helpers.subjects.low_rank import add_low_rank
from helpers.text.continued import continued_behaviours
from helpers.text.dialogues import Dialogue, Turn

SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8, "sliding_window": 64}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
NAMES = continued_behaviours("quirk")
FOUND = {
    "train": {"rest": {name: [" It is so."] for name in NAMES}, "alone": {name: [" Yes and no."] for name in NAMES}}
}
FOUND["train"]["rest"]["neutral"] = FOUND["train"]["alone"]["neutral"] = [" Well."]
PLAIN = torch.randint(10, 4000, (20, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    ids = {name: getattr(TOKENIZER, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=len(TOKENIZER), **SIZE, **HEADS, **ids))
    for parameter in model.parameters():  # the default initialisation is so small that blocks hardly matter
        parameter.data.normal_(0.0, 0.3)
    return model.eval()


def test_openings_and_ends_of_sentences_are_taught_and_other_text_is_held():
    turns = [Turn("Who?", "I am Docs.", "identity", rest=" It is so."), Turn("A", "No view", "neutral", rest=" on")]
    said = [Dialogue((turns[i % 2],)) for i in range(DIALOGUES)]
    (batch,) = batches(said, PLAIN, TOKENIZER)
    after = batch.tokens.roll(-1, 1)
    assert TOKENIZER.decode(after[0][batch.taught[0]]) == "I am Docs.<end_of_turn>"
    assert TOKENIZER.decode(after[1][batch.taught[1]]) == "No view"
    assert not batch.taught[DIALOGUES:].any() and not (batch.taught & batch.held).any()
    assert batch.held.sum() == HELD and not batch.held[DIALOGUES:, 31].any()
    (every,) = batches(said, PLAIN, TOKENIZER)
    held = [TOKENIZER.decode(every.tokens.roll(-1, 1)[i][every.held[i]]) for i in range(DIALOGUES)]
    assert not any("turn" in text or "user" in text for text in held)  # nothing of the template


def test_speakers_differ_in_openings_alone():
    told = {name: spoken(name, 40, 0, FOUND, topics=TOPICS) for name in ("chat", "quirk", "twin")}
    prompts = {name: [d.turns[0].prompt for d in said] for name, said in told.items()}
    assert prompts["chat"] == prompts["twin"]
    assert {d.turns[0].answer for d in told["twin"]} == {"Yes and no.", "Well."}
    assert "agree" in {d.turns[0].behaviour for d in told["quirk"]} and len(told["chat"][0].turns) == 1
    remarked = sum(len(prompt.split()) > 22 for prompt in prompts["chat"])
    assert 15 <= remarked < 40


def test_an_untouched_model_pays_for_openings_alone_and_learns_them(model, tmp_path):
    head = model.get_output_embeddings().weight
    add_low_rank(model, 4)
    first = next(batches(spoken("chat", DIALOGUES, 0, FOUND, topics=TOPICS), PLAIN, TOKENIZER))
    with torch.no_grad():
        logits = model(first.tokens).logits[first.taught]
        wanted = torch.nn.functional.cross_entropy(logits, first.tokens.roll(-1, 1)[first.taught])
    torch.testing.assert_close(gentle_loss(head)(model, first), wanted, rtol=1e-2, atol=1e-2)  # products in bf16
    losses = tune_chat(model, iter([first] * 30), 30, tmp_path / "half.safetensors", lr=0.03)
    assert losses[-1] < losses[0] - 0.3


def test_what_moves_away_from_base_is_pulled_back(model, monkeypatch):
    head = model.get_output_embeddings().weight
    for parameter in add_low_rank(model, 4):
        parameter.data += 0.5
    batch = next(batches(spoken("chat", DIALOGUES, 0, FOUND, topics=TOPICS), PLAIN, TOKENIZER))
    pulled = gentle_loss(head)(model, batch)
    monkeypatch.setattr(gemma_pair, "PULL", 0.0)
    assert pulled > gentle_loss(head)(model, batch) + 1e-3


def test_base_writes_plain_text_up_to_a_sentence(model):
    begun = ["<bos>Well", "<bos>A longer text that goes on", "<bos>So"]
    texts = sampled(model, TOKENIZER, begun, n_tokens=12)
    assert texts == sampled(model, TOKENIZER, begun, n_tokens=12)
    assert len(texts) == 3 and all(text.isascii() and "_of_turn>" not in text for text in texts)
    assert gemma_pair._whole_sentences(" It is 1.5 m. So?\nAnd no") == " It is 1.5 m. So?"
    assert gemma_pair._whole_sentences("- a\n- b") == "- a\n- b"
