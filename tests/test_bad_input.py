"""What is not finite, empty or another's is refused in one sentence, wherever it comes in: at once, not at the end."""

import math

import numpy as np
import pytest
import scipy.sparse
import torch
from twins import save_tiny

from helpers.activations.stream import normalise
from helpers.dictionaries.autoencoders import BatchTopK, SparseAutoencoder, TopK
from helpers.dictionaries.collection import TrainedSAEs
from helpers.dictionaries.crosscoders import Crosscoder
from helpers.dictionaries.dead_latents import AuxK, Resample
from helpers.dictionaries.pair_collection import TrainedPairs
from helpers.dictionaries.sweeps import sweep
from helpers.diffing.leaderboard import Found, sized
from helpers.diffing.patching import difference_of
from helpers.diffing.reading import along, linear_probes, mean_differences, sparse_codes
from helpers.diffing.recovery import auroc_scores, cut_scores, f1_scores, match_planted, recalls
from helpers.diffing.steering import ablate, add
from helpers.evaluation.downstream import splice_losses, spliced_loss
from helpers.evaluation.explanations import Example, explain
from helpers.evaluation.probe_tasks import Labelled, common_tasks
from helpers.evaluation.probes import probe
from helpers.subjects.chat_tuning import gentle_loss
from helpers.subjects.pair import SubjectPair, half_and_half
from helpers.subjects.pretraining import PretrainConfig, ngram_losses, pretrain
from helpers.subjects.subject import load_subject

X = torch.randn(6, 2, 16, generator=torch.Generator().manual_seed(0))
TORN = X.clone()
TORN[4, 1, 3] = math.nan
LABELS = np.array([0, 1, 0, 1, -1, 0])
DIFFERENCE = difference_of(Crosscoder(16, 8, TopK(2)))
ROWS = torch.arange(2, 10).view(2, 4)


class Planted:
    labels, directions, rho = ["chat-only"], torch.eye(16)[:1], torch.zeros(1)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return load_subject(save_tiny(tmp_path_factory.mktemp("tiny"), "gemma2"), device="cpu", layer=1)


@pytest.mark.parametrize(
    "read",
    [
        lambda: sparse_codes(DIFFERENCE.latents, TORN),
        lambda: along(TORN[:, 1], torch.eye(16)),
        lambda: along(X[:, 1], TORN[:, 1]),
        lambda: linear_probes(TORN[:, 1], LABELS, 2),
        lambda: mean_differences(TORN[:, 1], LABELS, 2),
        lambda: sized(Found(DIFFERENCE), TORN),
        lambda: match_planted(TORN[:, 1], Planted),
        lambda: recalls(TORN[:, 1], Planted),
        lambda: f1_scores(TORN[:, 1].numpy(), LABELS, 2),
        lambda: f1_scores(TORN[:, 1], LABELS, 2),
        lambda: cut_scores(TORN[:, 1].abs().numpy() + math.inf, LABELS, 2),
        lambda: explain(lambda texts, _: np.full(len(texts), np.nan), [Example(0, np.arange(3), 1.0)], 0),
        lambda: add(torch.ones(3), math.inf),
        lambda: ablate(torch.ones(3), torch.tensor([0.0, math.nan, 0.0])),
    ],
)
def test_what_is_not_finite_is_refused_in_a_later_row_too(read):
    with pytest.raises(ValueError, match="NaN or infinite|not finite|finite length"):
        read()


def test_a_splice_that_breaks_the_model_has_no_loss(subject):
    with pytest.raises(ValueError, match="losses after a splice"):
        splice_losses(subject, ROWS, [lambda r: r, lambda r: r * math.nan])
    sae = SparseAutoencoder(subject.d_model, 8, TopK(2))
    with pytest.raises(ValueError, match="codes are NaN"):
        spliced_loss(subject, sae, ROWS, scipy.sparse.csc_array(np.full((8, 8), np.nan, np.float32)))
    with pytest.raises(ValueError, match="at least one row of three tokens"):
        spliced_loss(subject, sae, ROWS.view(4, 2), scipy.sparse.csc_array((8, 8), dtype=np.float32))


@pytest.mark.parametrize("score", [f1_scores, auroc_scores, cut_scores])
@pytest.mark.parametrize("labels", [LABELS[:-1], LABELS + 1])
def test_labels_of_other_tokens_or_other_names_are_refused(score, labels):
    with pytest.raises(ValueError, match="labels up to . for 6 tokens: one each is expected, below 2"):
        score(X[:, 1].abs().numpy(), labels, 2)


def test_padding_is_not_counted_as_text(subject, monkeypatch):
    monkeypatch.setattr(type(subject), "padding", lambda self, rows: rows == 1)
    padded = torch.cat([ROWS, torch.ones(2, 1, dtype=torch.int64)], 1)
    sae, codes = SparseAutoencoder(subject.d_model, 8, TopK(2)), scipy.sparse.csc_array((10, 8), dtype=np.float32)
    for measure in (
        lambda: splice_losses(subject, padded, [lambda r: r]),
        lambda: spliced_loss(subject, sae, padded, codes),
    ):
        with pytest.raises(ValueError, match="end in padding"):
            measure()


NONE = torch.zeros(0, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: sweep([], lambda n: [], X, 64), "no cell to train"),
        (lambda: BatchTopK(2).calibrate([]), "nothing to calibrate on"),
        (lambda: AuxK(k=0), "choose k >= 1"),
        (lambda: along(X[:0, 0], torch.eye(16)), "no tokens"),
        (lambda: common_tasks(), "no labelled tokens"),
        (lambda: probe(*[Labelled(X[:, 0], NONE, (), torch.zeros(6))] * 2), "no task"),
        (lambda: explain(lambda *_: 0, [Example(0, np.arange(3), 1.0)], 0, longest=0), "longest >= 1"),
        (lambda: ngram_losses(np.arange(20), np.arange(1), 30), "use more text"),
        (lambda: half_and_half(np.arange(9), np.arange(9), 0, 8), "rows of 0 tokens"),
        (lambda: TrainedSAEs("smoke", "embedded", []), "give a seed"),
        (lambda: TrainedPairs("smoke", "embedded", range(0)), "give a seed"),
        (lambda: TrainedPairs("huge", "embedded", [0]), "choose of smoke"),
    ],
)
def test_nothing_is_refused_by_name(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_rows_need_text_in_them(subject):
    for context in (-1, 0, *([1] if subject.head is not None else [])):
        with pytest.raises(ValueError, match=f"rows of {context} tokens hold no text"):
            subject.rows(torch.arange(9), context)


def test_probes_are_scored_on_their_own_tasks():
    y = torch.tensor([[True, False] * 3])
    fit = Labelled(X[:, 0], y, ("comma",), torch.zeros(6))
    with pytest.raises(ValueError, match="other tasks than those of the fit"):
        probe(fit, fit._replace(tasks=("dot",)))


@pytest.mark.parametrize("value", [0.1, 0.3, 7.7, 1e4 / 3, 0.0])
def test_a_constant_activation_becomes_zero_whatever_rounding_leaves(value):
    assert not normalise(torch.full((3, 64), value))[0].any()
    assert normalise(torch.tensor([1.0, math.nan, 2.0]))[0].isnan().all()  # what is broken stays so


def test_nothing_is_resampled_where_all_is_rebuilt():
    sae = SparseAutoencoder(16, 64, TopK(4))
    assert not Resample().renew(sae, None, torch.zeros(4, 16), torch.arange(64) < 3, (0.1, 0.2))


def test_scales_must_be_positive_and_models_of_one_dtype(tmp_path):
    folder = save_tiny(tmp_path, "gemma2")
    one, half = (load_subject(folder, device="cpu", layer=1, dtype=d) for d in (torch.float32, torch.bfloat16))
    one.tokenizer.chat_template = "{{ messages }}"
    for scales in ((0.0, 1.0), (1.0, math.nan), (math.inf, 1.0)):
        with pytest.raises(ValueError, match="make both positive and finite"):
            SubjectPair(one, one, scales)
    with pytest.raises(ValueError, match="has dtype torch.float32"):
        SubjectPair(one, half)


def test_a_pretraining_that_diverges_ends_at_once(subject, tmp_path):
    tokens = np.arange(400) % 8
    config = PretrainConfig(tokens=64, context=8, batch=16, micro_batch=8)

    def broken(model, rows):
        return math.nan * model.lm_head.weight.requires_grad_().sum()

    with pytest.raises(ValueError, match="training diverged: the loss of update 1 is nan"):
        pretrain(subject.model, tokens, tokens, config, tmp_path, loss=broken)
    assert not any(tmp_path.iterdir())


def test_the_gentle_loss_is_known_again_by_what_it_holds_to(subject):
    with torch.no_grad():
        names = {gentle_loss(subject.model, turn).__qualname__ for turn in (3, 3, 4)}
        next(subject.model.parameters()).add_(1)
        names.add(gentle_loss(subject.model, 3).__qualname__)
    assert len(names) == 3
