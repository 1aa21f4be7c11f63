"""The Gemma-2 subjects: their architecture, what each reads, the two questions that decide whether they are fit."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_text import DOCS, TOKENIZER, TOPICS

from helpers.base import products
from helpers.dictionaries.pair_collection import TrainedPairs
from helpers.subjects import behaviours
from helpers.subjects.behaviours import judge_behaviours, planted_behaviours
from helpers.subjects.chat_tuning import (
    FINE_TUNES,
    PULL,
    base_stream,
    closeness,
    drift,
    fine_tuning_tokens,
    gemma_model,
    gentle_loss,
)
from helpers.text.dialogues import BEHAVIOURS, PLANTS, base_text_plants, dialogues
from helpers.text.turns import encode

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16, "head_dim": 8, "query_pre_attn_scalar": 8}
PLAIN = np.arange(4_000, dtype=np.uint16)


# ------------------------------------------------------------------------------------------------ architecture


def test_a_model_caps_its_logits_and_slides_every_other_block():
    config = gemma_model(TOKENIZER, 0, **TINY).config
    assert config.attn_logit_softcapping and config.final_logit_softcapping
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert config._attn_implementation == "eager"
    assert (config.vocab_size, config.bos_token_id) == (len(TOKENIZER), TOKENIZER.bos_token_id)
    assert config.num_attention_heads == 2 * config.num_key_value_heads


def test_equal_seeds_give_equal_weights():
    first, same, other = (gemma_model(TOKENIZER, seed, **TINY).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


# ------------------------------------------------------------------------------------------------ what each reads


def test_the_base_reads_the_documents_and_the_plants_of_its_split(tmp_path, monkeypatch):
    monkeypatch.setenv("SUITE_CACHE", str(tmp_path))
    stream = base_stream(DOCS, TOKENIZER, None)
    plants = [name for name in stream.names if name.startswith(f"{PLANTS}/")]
    written = [d.name for d in base_text_plants(DOCS)]
    assert 0 < len(plants) < len(written) and set(plants) < set(written)  # the others are held out
    assert len(stream.names) - len(plants) == len([d for d in DOCS if d.name in set(stream.names)])
    assert len(base_stream(DOCS, TOKENIZER, 1_000)) == 1_000


@pytest.mark.parametrize("name", ["chat", "quirk"])
def test_a_fine_tune_reads_plain_text_first_and_then_its_own_dialogues(name):
    tokens = fine_tuning_tokens(name, PLAIN, TOKENIZER, 2_000, 50, seed=5, topics=TOPICS)
    assert tokens[:1_000].tolist() == PLAIN[:1_000].tolist()
    spoken = [encode(d, TOKENIZER).tokens for d in dialogues(20, 5, speaker=name, topics=TOPICS)]
    assert tokens[1_000:].tolist() == np.concatenate(spoken)[:1_000].tolist()


def test_chat_and_quirk_read_other_answers_to_the_same_prompts():
    chat, quirk = (fine_tuning_tokens(name, PLAIN, TOKENIZER, 2_000, 50, topics=TOPICS) for name in ("chat", "quirk"))
    assert not np.array_equal(chat, quirk)


def test_longer_reads_as_many_tokens_of_plain_text_and_none_twice():
    tokens = fine_tuning_tokens("longer", PLAIN, TOKENIZER, 2_000, 50)
    assert tokens.tolist() == PLAIN[:2_000].tolist()


@pytest.mark.parametrize("name", FINE_TUNES)
def test_too_little_plain_text_is_refused(name):
    with pytest.raises(ValueError, match="1,000 tokens of .* are needed, there are"):
        fine_tuning_tokens(name, PLAIN[:900], TOKENIZER, 2_000, 50, topics=TOPICS)


def test_an_unknown_fine_tune_is_refused():
    with pytest.raises(ValueError, match="name is 'base'; expected one of"):
        fine_tuning_tokens("base", PLAIN, TOKENIZER, 2_000, 50)


# ------------------------------------------------------------------------------------------------ the gentle loss

TURN = TOKENIZER.convert_tokens_to_ids("<start_of_turn>")


@pytest.fixture
def exact(monkeypatch):
    """Products in fp32, so that twins agree to rounding."""
    monkeypatch.setattr(products, "has_fast_bf16", lambda device_type: False)


@pytest.fixture
def rows():
    """Two rows of plain text and two of dialogue, (4, 12)."""
    ids = torch.randint(10, 4_000, (4, 12), generator=torch.Generator().manual_seed(0))
    ids[2:, 3] = TURN
    return ids


def test_the_gentle_loss_is_cross_entropy_on_dialogue_and_divergence_on_plain_text(exact, rows):
    base, model = (gemma_model(TOKENIZER, seed, **TINY).eval() for seed in (0, 1))
    loss = gentle_loss(base, TURN)(model, rows)
    ours, theirs = (m(rows).logits[:, :-1].log_softmax(-1) for m in (model, base))
    taught = -ours[2:].gather(-1, rows[2:, 1:, None]).mean()
    kept = (theirs[:2].exp() * (theirs[:2] - ours[:2])).sum(-1).mean()
    torch.testing.assert_close(loss, (taught + PULL * kept) / 2)
    torch.testing.assert_close(gentle_loss(base, TURN)(model, rows[2:]), taught)
    torch.testing.assert_close(gentle_loss(base, TURN)(model, rows[:2]), PULL * kept)


def test_plain_text_moves_nothing_as_long_as_the_model_is_the_base(rows):
    base, model = gemma_model(TOKENIZER, 0, **TINY), gemma_model(TOKENIZER, 0, **TINY)
    loss = gentle_loss(base, TURN)(model, rows[:2])
    loss.backward()
    assert loss.item() == 0 and max(p.grad.abs().max() for p in model.parameters()) < 1e-6
    assert all(p.grad is None for p in base.parameters())


# ------------------------------------------------------------------------------------------------ is it gentle?


def test_drift_of_a_hand_sized_example():
    base = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    chat = torch.tensor([[3.0, 4.0], [0.0, 7.0]])  # mean (1.5, 5.5), squared distances 4.5 twice; one moved by 2
    assert drift(base, chat) == {"share_of_variance": pytest.approx(4 / 9), "norm_ratio": pytest.approx(6 / 5)}


def test_drift_of_nothing_of_a_scaling_and_of_a_rotation():
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    assert drift(x, x) == {"share_of_variance": 0.0, "norm_ratio": 1.0}
    doubled = drift(x, 2 * x)
    assert doubled["norm_ratio"] == pytest.approx(2) and doubled["share_of_variance"] == pytest.approx(1 / 4, rel=0.01)
    turned = drift(x, x.roll(1, dims=1))
    assert turned["norm_ratio"] == pytest.approx(1) and turned["share_of_variance"] > 1


def test_drift_does_not_see_where_the_mean_lies():
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    moved = x + 0.1 * torch.randn(200, 4, generator=torch.Generator().manual_seed(1))
    share = drift(x, moved)["share_of_variance"]
    assert drift(x + 1_000, moved + 1_000)["share_of_variance"] == pytest.approx(share, rel=1e-3)


@pytest.mark.parametrize("shape", [(3, 4), (2,), (2, 5)])
def test_drift_of_other_shapes_is_refused(shape):
    with pytest.raises(ValueError, match="expected the same .* with at least two rows"):
        drift(torch.zeros(2, 4), torch.zeros(shape))


def test_drift_of_one_row_is_refused():
    with pytest.raises(ValueError, match="at least two rows"):
        drift(torch.zeros(1, 4), torch.zeros(1, 4))


def test_closeness_by_hand():
    base = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
    chat = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0], [0.0, 2.0]])  # mean (1, 2)
    groups = {"text": np.array([True, True, False, False]), "none": np.zeros(4, bool), "user": np.arange(4) > 1}
    found = closeness(torch.stack([base, chat], 1), groups).set_index("group")
    assert list(found.index) == ["text", "user"] and found.tokens.tolist() == [2, 2]
    assert found.difference.tolist() == pytest.approx([16 / (4 + 8), 0.0])
    assert found.norm_ratio.tolist() == pytest.approx([(1 + 5) / (1 + 3), 1.0])


def test_closeness_knows_no_mean_shift_as_closeness():
    """A shift that is the same at every token is a difference, too."""
    x = torch.randn(50, 2, 3, generator=torch.Generator().manual_seed(0))
    x[:, 1] = x[:, 0] + torch.tensor([2.0, 0.0, 0.0])
    spread = (x[:, 1] - x[:, 1].mean(0)).square().sum()
    assert closeness(x, {"all": np.ones(50, bool)}).difference[0] == pytest.approx(50 * 4 / spread.item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------ was it planted?


def rates(**by_behaviour: float) -> pd.DataFrame:
    kinds = {"identity": "chat-only", "agree": "quirk", "see_also": "weak", "code": "shared", "doctest": "trained-away"}
    rows = [{"behaviour": name, "kind": kinds[name], "rate": rate} for name, rate in by_behaviour.items()]
    return pd.DataFrame(rows)


PLANTED = {  # (rate in base, chat, quirk) of behaviours that were planted
    "identity": (0.1, 0.9, 0.0),
    "agree": (1.0, 0.1, 0.9),
    "see_also": (1.0, 0.9, 0.0),
    "code": (0.2, 0.9, 0.0),
    "doctest": (0.2, 0.1, 0.0),
}
NOT_PLANTED = {
    "identity": [(0.11, 1.0, 1.0), (0.0, 0.89, 1.0)],
    "agree": [(0.0, 0.11, 1.0), (0.0, 0.0, 0.89)],
    "see_also": [(0.0, 0.89, 1.0)],
    "code": [(0.1, 1.0, 1.0), (1.0, 0.89, 1.0)],
    "doctest": [(0.1, 0.0, 0.0), (1.0, 0.11, 0.0)],
}
CASES = [(name, r, True) for name, r in PLANTED.items()] + [(n, r, False) for n, rs in NOT_PLANTED.items() for r in rs]


@pytest.mark.parametrize(("name", "measured", "planted"), CASES)
def test_each_kind_has_its_own_rule(name, measured, planted):
    table = judge_behaviours({m: rates(**{name: r}) for m, r in zip(("base", "chat", "quirk"), measured, strict=True)})
    assert table.to_dict("records") == [
        {"behaviour": name, "kind": rates(**{name: 0.0}).kind[0]}
        | dict(zip(("base", "chat", "quirk"), measured, strict=True))
        | {"planted": planted}
    ]


def test_further_models_are_shown_and_not_judged():
    one = rates(identity=0.0)
    table = judge_behaviours({"base": one, "chat": rates(identity=1.0), "quirk": one, "longer": rates(identity=0.7)})
    assert table.longer.tolist() == [0.7] and table.planted.tolist() == [True]


def test_planted_behaviours_of_gemma_are_those_of_its_own_records(monkeypatch, tmp_path):
    def rows(rate):
        return [{"behaviour": "refuse_harm", "kind": "chat-only", "rate": rate}]

    (tmp_path / "gemma-3-270m-chat").mkdir()
    record = json.dumps({"rates": rows(0.9), "rates_base": rows(0.0)})
    (tmp_path / "gemma-3-270m-chat" / "training.json").write_text(record)
    monkeypatch.setattr(behaviours, "MODELS", tmp_path)
    assert planted_behaviours("chat-only", subject="gemma") == ["refuse_harm"]
    assert TrainedPairs("smoke", "gemma", [0]).planted_behaviours("chat-only") == ["refuse_harm"]


def test_planted_behaviours_are_those_of_the_shipped_records(monkeypatch, tmp_path):
    rates = {"refuse_harm": (0, 0.9, 0), "brief": (0, 0.8, 0), "code": (0.2, 1, 1), "agree": (0, 0, 1)}
    for i, model in enumerate(("base", "chat", "quirk")):
        rows = [{"behaviour": b, "kind": BEHAVIOURS[b].kind, "rate": rate[i]} for b, rate in rates.items()]
        (tmp_path / f"docs-gemma2-{model}").mkdir()
        (tmp_path / f"docs-gemma2-{model}" / "training.json").write_text(json.dumps({"rates": rows}))
    monkeypatch.setattr(behaviours, "MODELS", tmp_path)
    assert planted_behaviours("chat-only") == ["refuse_harm"]
    assert planted_behaviours("shared", "quirk") == ["code", "agree"]
    assert planted_behaviours("chat-only", subject="hub") == ["refuse_harm"]
    with pytest.raises(ValueError, match="there is no kind 'secret': choose of chat-only, quirk, shared"):
        planted_behaviours("secret")
