"""Every cut of a subject equals plain transformers, at every layer, on a tiny random GPT-2 and Gemma-2."""

import math

import numpy as np
import pytest
import torch
from twins import BOS, CONTEXT, D_MODEL, N_VOCAB, Twin, save_tiny

from helpers.subjects import model_files
from helpers.subjects import subject as subject_module
from helpers.subjects.subject import load_subject, subject_for, token_losses, warn_if_other_corpus

LAYERS = [("gpt2", layer) for layer in range(3)] + [("gemma2", layer) for layer in range(4)]
CORPUS = {"python": {"version": "3.11", "sha256": "a"}, "numpy": {"version": "2.0", "sha256": "b"}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(root / family, family) for family in ("gpt2", "gemma2")}


@pytest.fixture(scope="module")
def gpt2(folders):
    return load_subject(folders["gpt2"], layer=1)


def some_tokens(rows=3, length=CONTEXT, seed=0):
    return torch.randint(0, N_VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def halved(residuals):
    return residuals / 2 + 1


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "layer"), LAYERS)
def test_every_cut_equals_plain_transformers(folders, family, layer):
    subject, twin, tokens = load_subject(folders[family], layer=layer), Twin(folders[family], layer), some_tokens()
    residuals = subject.residuals(tokens)
    assert residuals.shape == (3, CONTEXT, D_MODEL)
    close(residuals, twin.residuals(tokens))
    close(subject.resume(halved(residuals)), twin.resume(halved(residuals)))
    close(subject.splice(tokens, halved), twin.splice(tokens, halved))


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_logits_and_losses_equal_plain_transformers(folders, family):
    subject, twin, tokens = load_subject(folders[family]), Twin(folders[family], 0), some_tokens()
    close(subject.logits(tokens), twin.logits(tokens))
    assert subject.losses(tokens).shape == (3, CONTEXT - 1)
    close(subject.losses(tokens), twin.losses(tokens))


@pytest.mark.parametrize(("family", "layer"), LAYERS)
def test_resuming_where_it_stopped_and_splicing_nothing_give_the_models_logits(folders, family, layer):
    subject, tokens = load_subject(folders[family], layer=layer), some_tokens()
    assert torch.equal(subject.resume(subject.residuals(tokens)), subject.logits(tokens))
    assert torch.equal(subject.splice(tokens, lambda residuals: residuals), subject.logits(tokens))


@pytest.mark.parametrize(("family", "layer"), LAYERS)
def test_logits_of_some_positions_are_those_among_all_and_the_head_reads_no_others(folders, family, layer):
    subject, tokens = load_subject(folders[family], layer=layer), some_tokens()
    residuals, at = halved(subject.residuals(tokens)), some_tokens(seed=1) % 3 == 0
    read = []
    with subject.bridge.original_model.lm_head.register_forward_hook(lambda head, args, out: read.append(out.shape)):
        close(subject.resume(residuals, at), subject.resume(residuals)[at])
    assert [*map(tuple, read)] == [(int(at.sum()), N_VOCAB), (3, CONTEXT, N_VOCAB)]
    with pytest.raises(ValueError, match="positions must be bool and .3, "):
        subject.resume(residuals, at[0])


def test_loss_of_a_hand_sized_example():
    logits = torch.tensor([[[1.0, 3.0], [1.0, 1.0], [9.0, 9.0]]]).log()
    assert torch.allclose(token_losses(logits, torch.tensor([[0, 1, 0]])), -torch.tensor([[3 / 4, 1 / 2]]).log())


@pytest.mark.parametrize(("family", "layer"), LAYERS)
def test_no_block_is_run_in_vain(folders, family, layer):
    subject, tokens = load_subject(folders[family], layer=layer), some_tokens()
    blocks = [block.original_component for block in subject.bridge.blocks]
    head = subject.bridge.original_model.lm_head
    ran = []
    for number, module in enumerate([*blocks, head]):
        module.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    residuals = subject.residuals(tokens)
    assert ran == list(range(layer + 1))
    ran.clear()
    subject.resume(residuals)
    assert ran == list(range(layer + 1, len(blocks) + 1))


@pytest.mark.parametrize(("family", "layer"), LAYERS)
def test_blocks_above_the_site_are_not_read_until_logits_are_asked_for(folders, family, layer, monkeypatch):
    read, tokens = [], some_tokens()
    model_of = model_files._model
    monkeypatch.setattr(model_files, "_model", lambda *args: read.append(args[1].num_hidden_layers) or model_of(*args))
    subject = load_subject(folders[family], layer=layer)
    before = subject.residuals(tokens)
    assert read == [layer + 1]
    assert torch.equal(subject.resume(before), subject.logits(tokens))
    assert torch.equal(subject.residuals(tokens), before)
    n_blocks = {"gpt2": 3, "gemma2": 4}[family]
    assert read == ([layer + 1, n_blocks] if layer + 1 < n_blocks else [n_blocks])


def test_a_failing_replacement_leaves_the_model_as_it_was(gpt2):
    tokens = some_tokens()
    before = gpt2.logits(tokens)
    with pytest.raises(ZeroDivisionError):
        gpt2.splice(tokens, lambda residuals: 1 / 0)
    assert torch.equal(gpt2.logits(tokens), before)


def test_an_interrupted_resume_leaves_the_model_as_it_was(gpt2):
    tokens = some_tokens()
    before = gpt2.logits(tokens)
    interruption = gpt2.bridge.original_model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gpt2.resume(torch.zeros(1, CONTEXT, D_MODEL))
    interruption.remove()
    assert torch.equal(gpt2.logits(tokens), before)


def test_the_model_is_frozen_and_gradients_reach_the_replacement(gpt2):
    scale = torch.ones(D_MODEL, requires_grad=True)
    token_losses(gpt2.splice(some_tokens(), lambda residuals: residuals * scale), some_tokens()).mean().backward()
    assert scale.grad.abs().min() > 0
    assert all(not p.requires_grad and p.grad is None for p in gpt2.bridge.original_model.parameters())
    assert not any(module.training for module in gpt2.bridge.original_model.modules())
    assert not gpt2.residuals(some_tokens()).requires_grad and not gpt2.logits(some_tokens()).requires_grad


def test_bfloat16_stays_close_and_still_resumes_exactly(folders):
    tokens = some_tokens()
    for family, folder in folders.items():
        exact, rounded = load_subject(folder), load_subject(folder, dtype=torch.bfloat16)
        for found in (rounded.residuals(tokens), rounded.logits(tokens), rounded.splice(tokens, lambda x: x)):
            assert found.dtype == torch.float32, family
        error = (rounded.residuals(tokens) - exact.residuals(tokens)).norm() / exact.residuals(tokens).norm()
        assert 0 < error < 0.03, family
        assert torch.equal(rounded.resume(rounded.residuals(tokens)), rounded.logits(tokens)), family


def test_facts_of_the_subject(gpt2, folders):
    assert (gpt2.n_layers, gpt2.d_model, gpt2.n_vocab, gpt2.context) == (3, D_MODEL, N_VOCAB, CONTEXT)
    assert (gpt2.layer, gpt2.site, gpt2.name) == (1, "blocks.1.hook_resid_post", str(folders["gpt2"]))
    assert gpt2.tokenizer.decode(gpt2.tokenizer("def f").input_ids) == "def f"
    assert gpt2.device.type == "cpu" and gpt2.dtype == torch.float32


@pytest.mark.parametrize(("family", "n_layers", "site"), [("gpt2", 12, 8), ("gpt2", 4, 2), ("gemma2", 26, 13)])
def test_default_site_is_the_papers(tmp_path, family, n_layers, site):
    assert load_subject(save_tiny(tmp_path, family, n_layers=n_layers)).layer == site


@pytest.mark.parametrize("layer", [-1, 3])
def test_unknown_layer_is_refused(folders, layer):
    with pytest.raises(ValueError, match=f"no layer {layer}: choose one of 0 to 2"):
        load_subject(folders["gpt2"], layer=layer)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, CONTEXT + 1, dtype=torch.int64), f"{CONTEXT + 1} tokens but .* reads at most {CONTEXT}"),
        (torch.full((1, 2), N_VOCAB), f"token id {N_VOCAB} is outside the vocabulary .* 0 to {N_VOCAB - 1}"),
        (torch.full((1, 2), -1), "token id -1 is outside"),
        (torch.zeros(1, 2), "integer ids"),
        (torch.zeros(2, dtype=torch.int64), "integer ids"),
        (torch.zeros(0, 2, dtype=torch.int64), "integer ids"),
    ],
)
def test_bad_tokens_are_refused(gpt2, tokens, message):
    for use in (gpt2.residuals, gpt2.logits, lambda t: gpt2.splice(t, halved)):
        with pytest.raises(ValueError, match=message):
            use(tokens)


def test_small_unsigned_ids_are_the_same_ids(gpt2):
    assert torch.equal(gpt2.logits(some_tokens().to(torch.uint16)), gpt2.logits(some_tokens()))


def test_residuals_of_another_shape_are_refused(gpt2):
    with pytest.raises(ValueError, match=rf"shape \(B, T, {D_MODEL}\), not \(2, {D_MODEL}\)"):
        gpt2.resume(torch.zeros(2, D_MODEL))
    with pytest.raises(ValueError, match=f"reads at most {CONTEXT}"):
        gpt2.resume(torch.zeros(1, CONTEXT + 1, D_MODEL))
    with pytest.raises(ValueError, match="replace must keep shape"):
        gpt2.splice(some_tokens(), lambda residuals: residuals[..., :-1])


@pytest.mark.parametrize(("at_once", "sizes"), [(2 * CONTEXT * N_VOCAB, [2, 2, 1]), (1, [1] * 5), (10**9, [5])])
def test_no_pass_makes_more_logits_than_fit(gpt2, at_once, sizes, monkeypatch):
    rows = torch.randint(N_VOCAB - 2, (5, CONTEXT), generator=torch.Generator().manual_seed(1))
    together = gpt2.losses(rows)
    monkeypatch.setattr(subject_module, "LOGITS_A_PASS", at_once)
    assert [len(part) for part in gpt2.passes(rows)] == sizes
    assert torch.equal(torch.cat(gpt2.passes(rows)), rows)
    torch.testing.assert_close(gpt2.losses(rows), together)
    monkeypatch.setattr(subject_module, "ROWS_A_PASS", 1)
    assert len(gpt2.passes(rows)) == 5


def test_subject_for_a_run():
    assert subject_for("embedded") == "docs-gpt2"
    assert subject_for("hub") == "openai-community/gpt2"
    assert subject_for("embedded", "gemma2-base") == "docs-gemma2-base"
    assert subject_for("hub", "gemma2-base") == "google/gemma-2-2b"
    assert subject_for("embedded", "gemma2-chat") == "docs-gemma2-chat"
    assert subject_for("hub", "gemma2-chat") == "google/gemma-2-2b-it"
    with pytest.raises(ValueError, match="use embedded or hub or gemma, of gpt2 or"):
        subject_for("embeded")
    with pytest.raises(ValueError, match="family"):
        subject_for("hub", family="gpt5")


def test_another_pair_of_the_hub_is_named_by_its_base(monkeypatch):
    monkeypatch.setenv("SUITE_PAIR", "google/gemma-3-270m")
    pair = [subject_for("hub", family) for family in ("gemma2-base", "gemma2-chat")]
    assert pair == ["google/gemma-3-270m", "google/gemma-3-270m-it"]
    assert subject_for("hub") == "openai-community/gpt2"
    assert subject_for("embedded", "gemma2-chat") == "docs-gemma2-chat"


def test_fingerprint_follows_weights_and_configuration(tmp_path, gpt2, folders):
    same = load_subject(save_tiny(tmp_path / "same", "gpt2"))
    other = load_subject(save_tiny(tmp_path / "other", "gpt2", seed=1))
    assert same.fingerprint == gpt2.fingerprint != other.fingerprint
    config = (same.folder / "config.json").read_text()
    (same.folder / "config.json").write_text(
        config.replace('"layer_norm_epsilon": 1e-05', '"layer_norm_epsilon": 1e-02')
    )
    assert load_subject(same.folder).fingerprint != gpt2.fingerprint


def test_another_corpus_is_warned_of_by_package(tmp_path):
    subject = load_subject(save_tiny(tmp_path, "gpt2", corpus=CORPUS))
    at_hand = {"python": CORPUS["python"], "numpy": {"version": "2.1", "sha256": "c"}, "scipy": CORPUS["python"]}
    with pytest.warns(UserWarning, match=r"numpy 2.0 -> 2.1, scipy absent -> 3.11\).*NMSE.*remain valid") as caught:
        warn_if_other_corpus(subject, at_hand)
    assert len(caught) == 1 and caught[0].filename == __file__


def test_the_same_corpus_and_an_unknown_one_pass_silently(tmp_path, gpt2, recwarn):
    subject = load_subject(save_tiny(tmp_path, "gpt2", corpus=CORPUS))
    assert subject.corpus == CORPUS and gpt2.corpus is None
    recwarn.clear()
    warn_if_other_corpus(subject, CORPUS)
    warn_if_other_corpus(gpt2, CORPUS)
    assert not recwarn.list


# --- what is read: heads of rows, special tokens, padding


def test_rows_are_cut_as_the_model_was_trained_to_read_them(tmp_path):
    cut_anywhere = load_subject(save_tiny(tmp_path / "a", "gemma2"))
    with_bos = load_subject(save_tiny(tmp_path / "b", "gemma2", bos_first=True))
    tokens = np.arange(11, dtype=np.uint16)
    assert cut_anywhere.head is None and with_bos.head == BOS
    assert cut_anywhere.rows(tokens, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert with_bos.rows(tokens, 4).tolist() == [[BOS, 0, 1, 2], [BOS, 3, 4, 5], [BOS, 6, 7, 8]]
    assert with_bos.rows(torch.arange(5), 4).tolist() == [[BOS, 0, 1, 2]]


def test_shipped_models_were_trained_on_rows_cut_anywhere():
    for name in ("docs-gpt2", "docs-gemma2-base"):
        subject = load_subject(name)
        assert subject.head is None and subject.special_ids == [0, 1, 2]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_neither_the_first_position_nor_a_special_token_is_studied(gpt2, dtype):
    rows = torch.as_tensor(np.array([[5, 6, 7], [BOS, 8, BOS], [9, BOS + 1, 10]], dtype=dtype))
    assert gpt2.special_ids == [BOS, BOS + 1]
    assert gpt2.studied(rows).tolist() == [[False, True, True], [False, True, False], [False, False, True]]


def test_an_end_that_the_chat_template_writes_belongs_to_the_text(tmp_path):
    folder = save_tiny(tmp_path, "gemma2")
    plain, chatty = load_subject(folder), load_subject(folder)
    chatty.tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
    assert plain.special_ids == [BOS, BOS + 1] and chatty.special_ids == [BOS]


def padded(subject, pad, bos=BOS):
    subject.tokenizer.pad_token_id, subject.tokenizer.bos_token_id = pad, bos
    return subject


CALLS = {
    "residuals": lambda subject, rows: subject.residuals(rows),
    "logits": lambda subject, rows: subject.logits(rows),
    "losses": lambda subject, rows: subject.losses(rows),
    "splice": lambda subject, rows: subject.splice(rows, lambda x: x),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_padding_on_the_left_is_refused_everywhere_and_on_the_right_moves_nothing(tmp_path, call):
    subject = padded(load_subject(save_tiny(tmp_path, "gpt2")), pad=0)
    text = torch.tensor([[5, 6, 7]])
    left, right = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 5, 6, 7]]), torch.tensor([[5, 6, 7, 0, 0], [5, 6, 0, 7, 8]])
    with pytest.raises(ValueError, match="row 1 begins with padding, .*: pad on the right"):
        call(subject, left)
    alone = call(subject, text)
    torch.testing.assert_close(call(subject, right)[:1, : alone.shape[1]], alone)
    assert subject.padding(right).tolist() == [[False] * 3 + [True] * 2, [False] * 5]


def test_a_tokenizer_that_pads_with_bos_still_begins_its_rows_with_one(tmp_path):
    subject = padded(load_subject(save_tiny(tmp_path, "gpt2")), pad=BOS)
    subject.residuals(torch.tensor([[BOS, 6, 7], [5, BOS, BOS]]))
    with pytest.raises(ValueError, match="row 0 begins with padding"):
        subject.residuals(torch.tensor([[BOS, BOS, 7]]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_activations_are_refused(tmp_path, value):
    subject = load_subject(save_tiny(tmp_path, "gpt2"))
    with torch.no_grad():
        subject.model.transformer.wpe.weight[2, 0] = value
    assert subject.residuals(torch.tensor([[5, 6]])).isfinite().all()
    with pytest.raises(
        ValueError, match=r"activations of .* at blocks\.2\.hook_resid_post are NaN or infinite, the first"
    ):
        subject.residuals(torch.tensor([[5, 6, 7]]))
