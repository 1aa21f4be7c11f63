import collections
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from helpers.base import products
from helpers.base.storage import load_state
from helpers.subjects import pretraining
from helpers.subjects.pretraining import PretrainConfig, heldout_loss, ngram_losses, pretrain, ship, token_loss
from helpers.text.documents import Document, load_tokenizer, train_tokenizer

N_VOCAB, CONTEXT, BATCH = 64, 16, 64


def tiny_gpt2(seed: int = 0, **settings) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": N_VOCAB, "n_positions": CONTEXT, "n_embd": 16, "n_layer": 1, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **dropout, "bos_token_id": 2, "eos_token_id": 1, **settings}))


def tiny_gemma2() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8}
    sizes = {"vocab_size": N_VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, max_position_embeddings=CONTEXT))


def config(n_steps: int = 16, **settings) -> PretrainConfig:
    sizes = {"tokens": n_steps * BATCH, "context": CONTEXT, "batch": BATCH, "micro_batch": BATCH // 2}
    return PretrainConfig(**{**sizes, "evaluations": 4, "lr": 0.02, "warmup": 0.0, **settings})


def learnable(n: int, seed: int) -> np.ndarray:
    """Each token decides the next one nine times in ten."""
    random = np.random.default_rng(seed)
    follows, chance = np.random.default_rng(0).permutation(N_VOCAB), random.random(n) < 0.1
    tokens = random.integers(N_VOCAB, size=n)
    for i in range(1, n):
        tokens[i] = tokens[i] if chance[i] else follows[tokens[i - 1]]
    return tokens.astype(np.uint16)


TRAIN, HELDOUT = learnable(6_000, seed=1), learnable(600, seed=2)


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(parameter, state(other)[name]) for name, parameter in state(model).items())


def without_minutes(curve: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "minutes"} for row in curve]


@pytest.fixture
def stop_before(monkeypatch):
    """stop_before(step): the next run is interrupted just before that update."""
    update = pretraining._update

    def stop_before(stop: int) -> None:
        def interrupted(model, optimizers, rows, config, step, loss):
            if step == stop:
                raise KeyboardInterrupt
            return update(model, optimizers, rows, config, step, loss)

        monkeypatch.setattr(pretraining, "_update", interrupted)

    yield stop_before
    monkeypatch.setattr(pretraining, "_update", update)


@pytest.fixture
def stopped(tmp_path, stop_before):
    """stopped(config, steps): a folder with the checkpoint of a run that was interrupted after that many updates."""

    def stopped(config: PretrainConfig, steps: int):
        stop_before(steps)
        with pytest.raises(KeyboardInterrupt):
            pretrain(tiny_gpt2(), TRAIN, HELDOUT, config, tmp_path, save_every_minutes=0)
        stop_before(-1)
        return tmp_path

    return stopped


@pytest.fixture
def exact(monkeypatch):
    """Products in fp32, so that twins agree to rounding."""
    monkeypatch.setattr(products, "has_fast_bf16", lambda device_type: False)


# Training


def test_a_tiny_model_learns_what_no_unigram_knows(tmp_path):
    settings = config(200, evaluations=6, decay=0.25)
    curve = pretrain(tiny_gpt2(), TRAIN, HELDOUT, settings, tmp_path)
    losses = [row["heldout"] for row in curve]
    baselines = ngram_losses(TRAIN, HELDOUT, N_VOCAB)
    assert losses[0] > baselines["unigram"] - 0.3
    assert losses[-1] < baselines["unigram"] - 1
    assert curve[-1]["loss"] == pytest.approx(losses[-1], abs=0.3)
    assert [row["tokens"] // BATCH for row in curve] == [1, 3, 9, 25, 70, 150, 200]
    assert [row["lr"] for row in curve] == [0.02] * 6 + [pytest.approx(0.02 * 0.02)]
    assert [row["minutes"] for row in curve] == sorted(row["minutes"] for row in curve)


def test_a_run_is_a_function_of_its_seed(tmp_path):
    models = [tiny_gpt2() for _ in range(3)]
    for i, (model, seed) in enumerate(zip(models, (0, 0, 1), strict=True)):
        pretrain(model, TRAIN, HELDOUT, config(3, seed=seed), tmp_path / str(i))
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def test_the_loss_of_the_curve_is_the_mean_since_the_last_row(tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "_update", lambda *arguments: float(arguments[4]))
    curve = pretrain(tiny_gpt2(), TRAIN, HELDOUT, config(16, evaluations=3), tmp_path)
    assert [(row["tokens"] // BATCH, row["loss"]) for row in curve] == [(1, 0.0), (4, 2.0), (12, 7.5), (16, 13.5)]


def test_another_loss_may_be_trained_on(tmp_path):
    model, before = tiny_gpt2(), tiny_gpt2()
    curve = pretrain(model, TRAIN, HELDOUT, config(3), tmp_path, loss=lambda model, rows: 0 * token_loss(model, rows))
    assert [row["loss"] for row in curve] == [0.0] * len(curve)
    assert torch.equal(model.transformer.wpe.weight, before.transformer.wpe.weight)  # no gradient, no decay there


def test_the_progress_bar_shows_speed_and_time_left(tmp_path, stopped, capsys):
    pretrain(tiny_gpt2(), TRAIN, HELDOUT, config(6), stopped(config(6), 3))
    last = re.split(r"[\r\n]+", capsys.readouterr().err.strip())[-1]
    assert re.search(r"100%\|.*\| 384/384 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+k?tok/s, loss=\d\.\d{3}\]", last), last


def test_micro_batches_add_up_to_the_gradient_of_the_batch(exact):
    rows = torch.from_numpy(TRAIN[:BATCH].astype(np.int64)).view(-1, CONTEXT)
    model, twin = tiny_gpt2(), tiny_gpt2()
    for parameter in [*model.parameters(), *twin.parameters()]:
        parameter.data *= 3  # so that the norm is clipped
    loss = pretraining._update(model, [], rows, config(micro_batch=CONTEXT), 0, token_loss)
    logits = twin(rows).logits[:, :-1]
    expected = F.cross_entropy(logits.reshape(-1, N_VOCAB), rows[:, 1:].reshape(-1))
    expected.backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in twin.parameters()]).norm()
    assert norm > 1
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(parameter.grad, other.grad / norm, atol=1e-6)


def test_every_update_sets_the_learning_rate_of_both_optimizers_and_clears_gradients():
    model, settings = tiny_gpt2(), config(20, decay=0.25)
    optimizers = pretraining._optimizers(model, settings)
    for step, multiple in ((3, 1.0), (18, 0.4)):
        pretraining._update(model, optimizers, pretraining._rows(TRAIN, settings, step), settings, step, token_loss)
        assert [o.param_groups[0]["lr"] for o in optimizers] == pytest.approx([0.02 * multiple] * 2)
    assert not any(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_gemma2, lambda: tiny_gpt2(tie_word_embeddings=False)])
def test_muon_gets_the_matrices_of_the_blocks_and_nothing_else(make):
    model = make()
    muon, adam = (
        [p for group in optimizer.param_groups for p in group["params"]]
        for optimizer in pretraining._optimizers(model, config())
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    blocks = {"gpt2": ("attn.c_", "mlp.c_"), "gemma2": ("self_attn.", "mlp.")}[model.config.model_type]
    expected = [n for n, p in model.named_parameters() if any(b in n for b in blocks) and n.endswith("weight")]
    assert [names[id(p)] for p in muon] == expected
    assert [names[id(p)] for p in adam] == [name for name in names.values() if name not in expected]


def test_gemma2_learns_too(tmp_path):
    curve = pretrain(tiny_gemma2(), TRAIN, HELDOUT, config(60), tmp_path)
    assert curve[-1]["heldout"] < curve[0]["heldout"] - 0.5


def test_rows_go_where_the_model_is():
    def far_away(rows, use_cache):
        return SimpleNamespace(logits=torch.zeros(*rows.shape, N_VOCAB, device=rows.device))

    far_away.device = torch.device("meta")
    rows = torch.zeros(2, CONTEXT, dtype=torch.int64)
    assert token_loss(far_away, rows).device == far_away.device


# Interruption and resumption


def test_an_interrupted_run_ends_bitwise_like_an_uninterrupted_one(tmp_path, stop_before):
    straight = tiny_gpt2()
    expected = pretrain(straight, TRAIN, HELDOUT, config(), tmp_path / "straight")
    folder = tmp_path / "interrupted"
    for stop, save_every in [(6, 0), (11, 60)]:  # the second loses what it did
        stop_before(stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain(tiny_gpt2(), TRAIN, HELDOUT, config(), folder, save_every_minutes=save_every)
        assert load_state(folder / "checkpoint.safetensors")[1]["step"] == 6
    stop_before(-1)
    resumed = tiny_gpt2()
    curve = pretrain(resumed, TRAIN, HELDOUT, config(), folder)
    assert same(resumed, straight)
    assert without_minutes(curve) == without_minutes(expected)
    assert [row["minutes"] for row in curve] == sorted(row["minutes"] for row in curve)


def test_a_finished_run_is_read_and_not_trained_again(tmp_path, stop_before):
    done = tiny_gpt2()
    curve = pretrain(done, TRAIN, HELDOUT, config(4), tmp_path)
    stop_before(4)
    again = tiny_gpt2()
    assert pretrain(again, TRAIN, HELDOUT, config(4), tmp_path) == curve
    assert same(again, done)


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        ("context", {"context": 8}),
        ("batch", {"batch": 32, "tokens": 512}),
        ("lr, weight_decay", {"lr": 0.01, "weight_decay": 0.0}),
        ("seed", {"seed": 1}),
        ("micro_batch", {"micro_batch": BATCH}),
        ("evaluations", {"evaluations": 7}),
    ],
)
def test_a_run_with_other_settings_is_refused_by_their_names(stopped, names, settings):
    folder = stopped(config(), 2)
    with pytest.raises(ValueError, match=rf"checkpoint\.safetensors is from a run with other {names}: use the same"):
        pretrain(tiny_gpt2(), TRAIN, HELDOUT, config(**settings), folder)


@pytest.mark.parametrize(
    ("name", "change"),
    {
        "text": {"train": TRAIN[::-1]},
        "text ": {"heldout": HELDOUT[::-1]},
        "start": {"model": lambda: tiny_gpt2(seed=1)},
        "start ": {"model": lambda: tiny_gpt2(n_layer=2)},
        "objective": {"loss": lambda model, rows: 2 * token_loss(model, rows)},
    }.items(),
)
def test_a_run_on_other_text_from_another_start_or_for_another_loss_is_refused(stopped, name, change):
    folder, usual = stopped(config(), 2), {"model": tiny_gpt2, "train": TRAIN, "heldout": HELDOUT}
    given = usual | change
    with pytest.raises(ValueError, match=f"from a run with other {name.strip()}: use the same"):
        pretrain(given.pop("model")(), given.pop("train"), given.pop("heldout"), config(), folder, **given)


@pytest.mark.parametrize("changed", [{"n_steps": 12}, {"n_steps": 24}, {"n_steps": 16, "decay": 0.5}])
def test_at_a_constant_rate_a_run_may_change_its_end_and_is_then_the_other_run(tmp_path, stopped, changed):
    other, resumed = tiny_gpt2(), tiny_gpt2()
    expected = pretrain(other, TRAIN, HELDOUT, config(**changed), tmp_path / "other")
    curve = pretrain(resumed, TRAIN, HELDOUT, config(**changed), stopped(config(), 8))
    assert same(resumed, other)
    assert curve[-1]["heldout"] == expected[-1]["heldout"]


@pytest.mark.parametrize(
    ("steps", "names", "before", "now"),
    [
        (14, "tokens", config(16), config(32)),  # the old rate has begun to fall
        (14, "tokens", config(32), config(16)),  # the new one should have
        (14, "decay", config(16, decay=0.0), config(16, decay=0.25)),
        (4, "tokens", config(16, warmup=0.1), config(80, warmup=0.1)),  # the new one should still rise
        (16, "tokens", config(16), config(32)),  # the end of a whole run
        (9, "tokens", config(16, decay=0.0), config(8, decay=0.0)),  # longer than the new run will be
    ],
)
def test_a_run_whose_rate_was_not_constant_keeps_its_length(stopped, tmp_path, steps, names, before, now):
    if steps < before.n_steps:
        stopped(before, steps)
    else:
        pretrain(tiny_gpt2(), TRAIN, HELDOUT, before, tmp_path)
    with pytest.raises(ValueError, match=f"other {names}: .*may change while the learning rate is constant"):
        pretrain(tiny_gpt2(), TRAIN, HELDOUT, now, tmp_path)
    curve = pretrain(tiny_gpt2(), TRAIN, HELDOUT, before, tmp_path)
    assert curve[-1]["tokens"] == before.tokens


# The schedule and the rows


def test_the_learning_rate_rises_stays_and_falls():
    multiples = [config(20, warmup=0.1, decay=0.25).lr_at(step) for step in range(20)]
    assert multiples == pytest.approx([0.5] + [1.0] * 15 + [0.8, 0.6, 0.4, 0.2])
    assert {config(20, decay=0.0).lr_at(step) for step in range(20)} == {1.0}
    assert config(20, warmup=0.5, decay=0.5).lr_at(9) == config(20).lr_at(0) == 1.0


def test_evaluations_are_even_in_log_tokens_with_the_end_of_the_constant_rate_among_them():
    assert pretraining._evaluation_steps(config(1000, evaluations=3)) == {5, 71, 750, 1000}
    assert pretraining._evaluation_steps(config(2, evaluations=40, decay=0.0)) == {1, 2}


@pytest.mark.parametrize(
    "settings",
    [
        {"context": 24},
        {"context": 1},
        {"micro_batch": 24},
        {"micro_batch": 48},
        {"micro_batch": 128},
        {"micro_batch": 0},
        {"tokens": 63},
    ],
)
def test_sizes_that_do_not_fit_each_other_are_refused(settings):
    with pytest.raises(ValueError, match="must each divide the next, and tokens .* must fill a batch"):
        config(**settings)


@pytest.mark.parametrize("settings", [{"warmup": -0.1}, {"decay": -0.1}, {"warmup": 0.6, "decay": 0.5}])
def test_fractions_that_are_none_are_refused(settings):
    with pytest.raises(ValueError, match="must be fractions that sum to at most 1"):
        config(**settings)


@given(st.integers(BATCH + CONTEXT, 8 * BATCH), st.integers(0, 3), st.integers(0, 2))
def test_an_epoch_reads_each_row_of_a_random_cut_once(length, seed, epoch):
    settings, stream = config(seed=seed), np.arange(length, dtype=np.uint16)
    steps = (length - CONTEXT) // BATCH
    batches = [pretraining._rows(stream, settings, epoch * steps + step) for step in range(steps)]
    assert {batch.shape for batch in batches} == {(BATCH // CONTEXT, CONTEXT)}
    rows = torch.cat(batches)
    starts = rows[:, 0].sort().values
    assert torch.equal(rows, rows[:, :1] + torch.arange(CONTEXT))  # contiguous
    assert 0 <= starts[0] < CONTEXT  # and side by side from the cut on
    assert torch.equal(starts, starts[0] + CONTEXT * torch.arange(len(rows)))


def test_rows_depend_on_seed_and_step_alone_and_change_with_them():
    batches = [pretraining._rows(TRAIN, config(seed=seed), step) for seed in (0, 1) for step in (0, 1, 93)]
    again = [pretraining._rows(TRAIN, config(80, seed=seed), step) for seed in (0, 1) for step in (0, 1, 93)]
    assert all(map(torch.equal, batches, again))
    assert len({tuple(batch.flatten().tolist()) for batch in batches}) == 6


def test_the_cut_moves_between_epochs():
    stream = np.arange(2 * BATCH, dtype=np.uint16)
    assert len({pretraining._rows(stream, config(), epoch).min().item() for epoch in range(20)}) > 5


def test_a_stream_shorter_than_a_batch_is_refused():
    with pytest.raises(ValueError, match="79 tokens do not fill a batch of 64 and one row; use more text"):
        pretraining._rows(TRAIN[: BATCH + CONTEXT - 1], config(), 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_gpt2(attn_pdrop=0.1), "the model has dropout, so a resumed run would not repeat itself"),
        (lambda: tiny_gpt2(n_positions=8), "rows of 16 tokens do not fit the model's 8 positions; lower context"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        pretrain(make(), TRAIN, HELDOUT, config(), tmp_path)


# Losses


def test_the_held_out_loss_is_that_of_a_plain_loop(exact):
    model, total, n = tiny_gpt2(), 0.0, 0
    for start in range(0, 330 - CONTEXT, CONTEXT):  # 20 rows: more than are read at a time
        row = torch.from_numpy(HELDOUT[start : start + CONTEXT].astype(np.int64))
        log_probs = model(row[None]).logits[0].log_softmax(-1)
        total -= sum(log_probs[i, row[i + 1]].item() for i in range(CONTEXT - 1))
        n += CONTEXT - 1
    assert heldout_loss(model, HELDOUT, CONTEXT, n_tokens=330) == pytest.approx(total / n, rel=1e-5)
    assert heldout_loss(model, HELDOUT[:330], CONTEXT) == pytest.approx(total / n, rel=1e-5)


def test_fast_products_hardly_change_the_held_out_loss(monkeypatch):
    model = tiny_gpt2()
    for parameter in model.parameters():
        parameter.data *= 6  # so that there is something to round
    fast = heldout_loss(model, HELDOUT, CONTEXT)
    monkeypatch.setattr(products, "has_fast_bf16", lambda device_type: False)
    assert heldout_loss(model, HELDOUT, CONTEXT) == pytest.approx(fast, abs=0.01)


@pytest.mark.parametrize("training", [True, False])
def test_the_held_out_loss_is_without_dropout_and_leaves_the_model_as_it_was(training):
    model = tiny_gpt2(attn_pdrop=0.5, embd_pdrop=0.5).train(training)
    assert heldout_loss(model, HELDOUT, CONTEXT) == heldout_loss(tiny_gpt2(), HELDOUT, CONTEXT)
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_held_out_text_shorter_than_a_row_is_refused():
    with pytest.raises(ValueError, match="15 held-out tokens do not fill one row of 16; use more text"):
        heldout_loss(tiny_gpt2(), HELDOUT[: CONTEXT - 1], CONTEXT)


def slow_ngrams(train: list[int], heldout: list[int], n_vocab: int) -> dict[str, float]:
    """Twin: counts in dictionaries, probabilities one token at a time."""
    n_fit = len(train) * 9 // 10
    fit, tune = train[:n_fit], train[n_fit:]
    ones, twos = collections.Counter(fit), collections.Counter(zip(fit, fit[1:], strict=False))

    def unigram(b: int) -> float:
        return (ones[b] + 1) / (len(fit) + n_vocab)

    def bigram_loss(tokens: list[int], strength: float) -> float:
        loss = 0.0
        for a, b in zip(tokens, tokens[1:], strict=False):
            followed = sum(n for (first, _), n in twos.items() if first == a)
            loss -= math.log((twos[a, b] + strength * unigram(b)) / (followed + strength))
        return loss / (len(tokens) - 1)

    strengths = [2.0**i for i in range(12)]
    best = min(strengths, key=lambda strength: bigram_loss(tune, strength))
    losses = [-math.log(unigram(b)) for b in heldout[1:]]
    return {"unigram": sum(losses) / len(losses), "bigram": bigram_loss(heldout, best)}


@given(st.lists(st.integers(0, 4), min_size=20, max_size=60), st.lists(st.integers(0, 4), min_size=2, max_size=20))
def test_ngram_losses_are_those_of_counting_by_hand(train, heldout):
    found = ngram_losses(np.array(train, np.uint16), np.array(heldout, np.uint16), 5)
    assert found == pytest.approx(slow_ngrams(train, heldout, 5))


def test_a_bigram_knows_a_circle_and_a_unigram_does_not():
    losses = ngram_losses(np.tile(np.arange(8, dtype=np.uint16), 500), np.tile(np.arange(8, dtype=np.uint16), 9), 8)
    assert losses == {"unigram": pytest.approx(math.log(8), abs=1e-3), "bigram": pytest.approx(0, abs=0.01)}


# Shipping


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_gemma2, lambda: tiny_gpt2(tie_word_embeddings=False)])
def test_a_shipped_model_loads_like_any_other_and_is_the_same_rounded_to_bf16(tmp_path, make):
    model, tokenizer = make(), train_tokenizer([Document("made", "x.py", "def f(): pass\n")], vocab_size=300)
    ship(model, tokenizer, tmp_path / "shipped", {"tokens": 7, "name": "é"})
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "shipped").dtype == torch.bfloat16
    assert model.dtype == torch.float32  # the caller's stays as it was
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "shipped", dtype=torch.float32)
    rows = torch.from_numpy(HELDOUT[: 4 * CONTEXT].astype(np.int64)).view(-1, CONTEXT)
    exact = model.eval()(rows).logits
    for parameter in model.parameters():
        parameter.data = parameter.to(torch.bfloat16).float()
    assert torch.equal(loaded(rows).logits, model(rows).logits)
    assert torch.allclose(loaded(rows).logits, exact, atol=0.01)
    assert json.loads((tmp_path / "shipped" / "training.json").read_text()) == {"tokens": 7, "name": "é"}
    assert load_tokenizer(tmp_path / "shipped")("def")["input_ids"] == tokenizer("def")["input_ids"]


def test_a_shipped_model_is_two_bytes_a_weight_and_stores_a_tied_head_once(tmp_path):
    model = tiny_gpt2(n_embd=32, n_layer=2)
    ship(model, train_tokenizer([], vocab_size=300), tmp_path, {})
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in weights
    n_weights = sum(parameter.numel() for parameter in model.parameters())
    assert sum(tensor.numel() for tensor in weights.values()) == n_weights
    assert 2 * n_weights < (tmp_path / "model.safetensors").stat().st_size < 2 * n_weights + 4096
    settings = json.loads((tmp_path / "config.json").read_text())
    assert (settings["architectures"], settings["dtype"]) == (["GPT2LMHeadModel"], "bfloat16")
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # what older readers ask for


def test_an_interrupted_shipping_leaves_no_half_of_the_weights(tmp_path, monkeypatch):
    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ship(tiny_gpt2(), train_tokenizer([], vocab_size=300), tmp_path, {})
    assert not [path.name for path in tmp_path.iterdir() if "safetensors" in path.name]
