import numpy as np
import pytest
import torch

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


def test_labels_go_with_their_tokens(tokenizer):
    rows = labelled_rows(DOCUMENTS, tokenizer, 12, 16)
    text = [tokenizer.decode([token]).strip() for token in rows.ids.flatten().tolist()]
    comma = rows.y[ROWS["comma"]].flatten().tolist()
    assert [token == "," for token in text] == comma and any(comma)
    assert rows.ids.shape == (12, 16) and rows.y.shape == (len(LABELS), 12, 16)


def test_a_row_is_of_one_document_and_bos_has_no_label(tokenizer):
    rows = labelled_rows(DOCUMENTS, tokenizer, 12, 16)
    packages = rows.y[[ROWS["package_python"], ROWS["package_torch"]]]
    is_bos = rows.ids == tokenizer.bos_token_id
    assert is_bos.any() and not rows.y[:, is_bos].any()
    assert (packages.any(2).sum(0) == 1).all() and (packages.any(0) ^ is_bos).all()


def test_every_document_gives_one_before_any_gives_two(tokenizer):
    rows = labelled_rows(DOCUMENTS, tokenizer, 4, 16)
    assert rows.y[ROWS["package_torch"]].any(1).sum() == 3 and rows.y[ROWS["package_python"]].any(1).sum() == 1


def test_rows_are_drawn_by_the_seed(tokenizer):
    one, same, other = (labelled_rows([LONG], tokenizer, 3, 16, seed).ids for seed in (0, 0, 1))
    assert one.equal(same) and not one.equal(other)
    ids = [tokenizer.bos_token_id, *tokenizer(LONG.text, add_special_tokens=False).input_ids]
    starts = [i for i in range(0, len(ids), 16) if ids[i : i + 16] in one.tolist()]
    assert len(starts) == 3 and max(starts) > 3 * 16  # from all over the document


def test_too_few_documents_are_named(tokenizer):
    with pytest.raises(ValueError, match="1 documents hold 0 rows of 16 tokens, not 1"):
        labelled_rows([BROKEN], tokenizer, 1, 16)


def test_activations_and_labels_stay_aligned(tokenizer):
    rows = labelled_rows(DOCUMENTS, tokenizer, 10, 16)
    data = with_activations(rows, lambda ids: ids[:, 1:].reshape(-1, 1).float())
    assert data.x[:, 0].equal(data.ids.float()) and len(data.x) == 150 and data.tasks == LABELS
    assert data.y.equal(rows.y[:, :, 1:].flatten(1))


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
