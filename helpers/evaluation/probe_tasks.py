"""Tasks for probes: tokens of Python documents, their activations, and binary labels from the documents' own syntax.

Documents, not tokens, are what is drawn and held out: two tokens of one file know too much of each other. Rows come
from as many documents as there are, so that no long file decides a task.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.activations.stream import Harvest, harvest_rows
from helpers.subjects.subject import Subject, in_rows
from helpers.text.documents import Document
from helpers.text.labels import LABELS, label_tokens, parses

Read = Callable[[Subject, Tensor, Harvest], Tensor]  # of token rows (B, context): (n, width) where they are kept
RAREST = 0.01  # share of the tokens, of either class of a task


class Labelled(NamedTuple):
    """Activations and the labels of their tokens."""

    x: Tensor  # (n_tokens, width)
    y: Tensor  # (n_tasks, n_tokens) bool
    tasks: tuple[str, ...]
    ids: Tensor  # (n_tokens,) token ids


class LabelledRows(NamedTuple):
    """Rows of tokens, each from within one document, and their labels."""

    ids: Tensor  # (n_rows, context)
    y: Tensor  # (n_labels, n_rows, context) bool, in the order of labels.LABELS


def labelled_rows(
    documents: Sequence[Document], subject: Subject, n_rows: int, context: int, seed: int = 0
) -> LabelledRows:
    """Rows drawn at random, a second of a document only when each has given one. A document starts with <bos>, and so
    does each row where the subject reads it so (`Subject.head`).

    Documents that do not parse are left out. Raises ValueError if there are fewer rows than asked for.
    """
    random = np.random.default_rng(seed)
    read = [_cut(document, subject, context, random) for document in documents if parses(document.text)]
    turns = [(turn, ids, y) for pieces in read for turn, (ids, y) in enumerate(zip(*pieces, strict=True))]
    if len(turns) < n_rows:
        raise ValueError(
            f"{len(documents)} documents hold {len(turns)} rows of {context} tokens, not {n_rows}: add some"
        )
    _, ids, y = zip(*sorted(turns, key=lambda row: row[0])[:n_rows], strict=True)
    return LabelledRows(torch.from_numpy(np.stack(ids)), torch.from_numpy(np.stack(y, axis=1)))


def with_activations(subject: Subject, rows: LabelledRows, harvest: Harvest, read: Read = harvest_rows) -> Labelled:
    """Labelled rows at the positions that the harvest keeps, with activations there, or with `mlp_neurons`."""
    x = torch.cat([read(subject, some, harvest).cpu() for some in rows.ids.split(16)])
    kept = harvest.keeps(subject, rows.ids)
    return Labelled(x, rows.y[:, kept], LABELS, rows.ids[kept])


def mlp_neurons(subject: Subject, ids: Tensor, harvest: Harvest) -> Tensor:
    """What the neurons of the block before the site give out, GPT-2 only: ids (B, context) -> (n, d_mlp), where the
    harvest keeps them."""
    found, mlp = [], subject.model.transformer.h[subject.layer].mlp
    handle = mlp.c_proj.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    try:
        subject.residuals(ids)
    finally:
        handle.remove()
    return found[0][harvest.keeps(subject, ids).to(found[0].device)].float()


def common_tasks(*parts: Labelled) -> list[Labelled]:
    """The parts with only those tasks of which both classes have at least RAREST of the tokens in every part."""
    if not parts:
        raise ValueError("there are no labelled tokens to compare: pass one part or more")
    rates = torch.stack([part.y.float().mean(1) for part in parts])
    keep = torch.minimum(rates, 1 - rates).amin(0) >= RAREST
    tasks = tuple(task for task, kept in zip(parts[0].tasks, keep.tolist(), strict=True) if kept)
    return [part._replace(y=part.y[keep], tasks=tasks) for part in parts]


def _cut(
    document: Document, subject: Subject, context: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """All rows of a document in random order, (n_rows, context), and labels (n_rows, n_labels, context)."""
    encoded = subject.tokenizer(document.text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)
    ids, y = torch.tensor(encoded.input_ids), torch.from_numpy(label_tokens(document, np.array(encoded.offset_mapping)))
    if subject.head is None:  # then the document alone starts with <bos>, which has no label
        ids, y = F.pad(ids, (1, 0), value=subject.tokenizer.bos_token_id), F.pad(y, (1, 0))
    rows = in_rows(ids, context, subject.head)
    labels = torch.stack([in_rows(label, context, None if subject.head is None else 0) for label in y], 1)
    order = random.permutation(len(rows))
    return rows[order].numpy(), labels[order].numpy()
