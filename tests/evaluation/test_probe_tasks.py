import numpy as np
import pytest
import torch
from twins import CountingSubject

from helpers.activations.stream import Harvest
from helpers.evaluation import probe_tasks
from helpers.evaluation.probe_tasks import Labelled, common_tasks, labelled_rows, mlp_neurons, with_activations
from helpers.subjects.subject import load_subject
from helpers.text.documents import Document, train_tokenizer
from helpers.text.labels import LABELS, ROWS

LONG = Document(
    "python", "long.py", '"""Numbers."""\n' + "".join(f"def f{i}(a, b):\n    return a + {i}\n" for i in range(40))
)
SHORT = [Document("torch", f"{i}.py", f"import os, sys\nx{i} = [1, 2, 3]\nprint(x{i}, os)\n" * 3) for i in range(3)]
BROKEN = Document("numpy", "broken.py", "def f(:\n" * 40)
DOCUMENTS = [LONG, *SHORT, BROKEN]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, vocab_size=300)


class Reader(CountingSubject):
    """Residuals tell their token; a tokenizer of its own."""

    def __init__(self, tokenizer, head=None):
        super().__init__(special_ids=[tokenizer.bos_token_id], head=head)
        self.tokenizer = tokenizer


@pytest.fixture
def subject(tokenizer):
    return Reader(tokenizer)


def test_labels_go_with_their_tokens(subject, tokenizer):
    rows = labelled_rows(DOCUMENTS, subject, 12, 16)
    text = [tokenizer.decode([token]).strip() for token in rows.ids.flatten().tolist()]
    comma = rows.y[ROWS["comma"]].flatten().tolist()
    assert [token == "," for token in text] == comma and any(comma)
    assert rows.ids.shape == (12, 16) and rows.y.shape == (len(LABELS), 12, 16)


def test_a_row_is_of_one_document_and_bos_has_no_label(subject, tokenizer):
    rows = labelled_rows(DOCUMENTS, subject, 12, 16)
    packages = rows.y[[ROWS["package_python"], ROWS["package_torch"]]]
    is_bos = rows.ids == tokenizer.bos_token_id
    assert is_bos.any() and not rows.y[:, is_bos].any()
    assert (packages.any(2).sum(0) == 1).all() and (packages.any(0) ^ is_bos).all()


def test_every_document_gives_one_before_any_gives_two(subject):
    rows = labelled_rows(DOCUMENTS, subject, 4, 16)
    assert rows.y[ROWS["package_torch"]].any(1).sum() == 3 and rows.y[ROWS["package_python"]].any(1).sum() == 1


def test_rows_are_drawn_by_the_seed(subject, tokenizer):
    one, same, other = (labelled_rows([LONG], subject, 3, 16, seed).ids for seed in (0, 0, 1))
    assert one.equal(same) and not one.equal(other)
    ids = [tokenizer.bos_token_id, *tokenizer(LONG.text, add_special_tokens=False).input_ids]
    starts = [i for i in range(0, len(ids), 16) if ids[i : i + 16] in one.tolist()]
    assert len(starts) == 3 and max(starts) > 3 * 16  # from all over the document


def test_too_few_documents_are_named(subject):
    with pytest.raises(ValueError, match="1 documents hold 0 rows of 16 tokens, not 1"):
        labelled_rows([BROKEN], subject, 1, 16)


@pytest.mark.parametrize(("drop", "kept"), [("special", 15), ("none", 16)])
def test_activations_and_labels_stay_aligned(subject, drop, kept):
    rows = labelled_rows(DOCUMENTS, subject, 10, 16)
    data = with_activations(subject, rows, Harvest(context=16, drop=drop, normalisation="none"))
    assert data.x[:, 0].equal(data.ids.float()) and len(data.x) == 10 * kept and data.tasks == LABELS
    assert data.y.equal(rows.y[:, :, 16 - kept :].flatten(1))


def test_special_tokens_inside_a_row_take_their_labels_with_them(subject):
    rows = labelled_rows(DOCUMENTS, subject, 10, 16)
    rows.ids[3, 7] = subject.tokenizer.bos_token_id
    data = with_activations(subject, rows, Harvest(context=16, normalisation="none"))
    kept = subject.studied(rows.ids)
    assert not kept[3, 7] and data.x[:, 0].equal(data.ids.float()) and data.y.equal(rows.y[:, kept])


def test_every_row_begins_with_the_head_that_the_subject_reads(tokenizer):
    bos = tokenizer.bos_token_id
    rows = labelled_rows([LONG], Reader(tokenizer, head=bos), 10, 16)
    assert (rows.ids[:, 0] == bos).all() and not (rows.ids[:, 1:] == bos).any() and not rows.y[:, :, 0].any()
    ids = tokenizer(LONG.text, add_special_tokens=False).input_ids
    text = [tokenizer.decode([token]).strip() == "," for token in rows.ids[:, 1:].flatten().tolist()]
    assert text == rows.y[ROWS["comma"], :, 1:].flatten().tolist() and any(text)
    pieces = [ids[i : i + 15] for i in range(0, len(ids) - 14, 15)]
    assert all(row[1:] in pieces for row in rows.ids.tolist())


def test_common_tasks_have_both_classes_everywhere(monkeypatch):
    monkeypatch.setattr(probe_tasks, "RAREST", 0.25)
    y = np.array([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]], bool)
    one = Labelled(torch.zeros(4, 1), torch.tensor(y), ("quarter", "all", "none", "half"), torch.zeros(4))
    other = one._replace(y=torch.tensor(y[[3, 3, 3, 0]]))
    first, second = common_tasks(one, other)
    assert first.tasks == second.tasks == ("quarter", "half")
    assert first.y.equal(one.y[[0, 3]]) and second.y.equal(other.y[[0, 3]])
    monkeypatch.setattr(probe_tasks, "RAREST", 0.3)
    assert common_tasks(one, other)[0].tasks == ()


def test_neurons_make_what_the_block_adds():
    subject, ids = load_subject("docs-gpt2-64"), torch.arange(24).view(2, 12) + 10
    mlp = subject.bridge.blocks[subject.layer].original_component.mlp
    outputs = []
    handle = mlp.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    neurons = mlp_neurons(subject, ids, Harvest(context=12))
    handle.remove()
    with torch.no_grad():
        torch.testing.assert_close(mlp.c_proj(neurons), outputs[0][:, 1:].flatten(0, 1))
    assert not mlp.c_proj._forward_pre_hooks
