"""Where a dialogue is read: the positions that predict an answer, numbered from the first of each turn.

    roles    t  t  u  u  t  t  t  a1 a2 a3 t        t template, u user, a answer; the t after an answer ends its turn
    order    -  -  -  -  -  -  0  1  2  3  -        0 predicts a1, 3 predicts the end of the turn

    full         all that have an order
    first nine   the first ten of every turn but for template positions: orders 1 to 9, which predict a2 to a10.
                 Order 0 lies on the template's last newline, so the very first token of the answer is left out

An answer is its content and the <end_of_turn> after it; positions are those of its mask, shifted left by one. The
template leaves out the first token of all, <bos>.

Source: released code of Minder, Dumas et al. 2025; section 2.6 of the facts.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from helpers.text.turns import ROLES, DialogueStream, Encoded

FIRST = 10  # positions of each turn, of which the template's goes
TEMPLATE, ASSISTANT = ROLES.index("template"), ROLES.index("assistant")
PADDING = -1  # in place of a role


class Rows(NamedTuple):
    """Some dialogues side by side, the shorter ones padded at their ends."""

    dialogues: list[int]  # which they are
    tokens: Tensor  # (B, T) int64
    roles: Tensor  # (B, T) int64, `PADDING` after the end
    order: Tensor  # (B, T) int64, -1 at positions that predict no answer

    @property
    def template(self) -> Tensor:
        """(B, T) bool: tokens of the chat template, but for the first of all."""
        return (self.roles == TEMPLATE) & (torch.arange(self.roles.shape[1]) > 0)

    @property
    def first_nine(self) -> Tensor:
        """(B, T) bool."""
        return (self.order >= 0) & (self.order < FIRST) & (self.roles != TEMPLATE)


def answer_order(roles: np.ndarray) -> np.ndarray:
    """Order of each position within its answer, (n,) roles -> (n,) int64; -1 at positions that predict no answer."""
    answer = roles == ASSISTANT
    predicts = np.r_[answer[1:] | answer[:-1], False]
    so_far, starts = np.cumsum(predicts), predicts & ~np.r_[False, predicts[:-1]]
    return np.where(predicts, so_far - np.maximum.accumulate(np.where(starts, so_far, 0)), -1)


def dialogues_of(stream: DialogueStream, context: int) -> list[Encoded]:
    """The dialogues of a stream, each cut to `context` tokens; those in which nothing of an answer is left drop out.

    Raises ValueError if none is left.
    """
    ends = np.minimum(stream.starts[:-1] + context, stream.starts[1:])
    arrays = (stream.tokens, stream.roles, stream.behaviours, stream.decisions)
    cut = [
        Encoded(*(array[start:end] for array in arrays)) for start, end in zip(stream.starts[:-1], ends, strict=True)
    ]
    left = [dialogue for dialogue in cut if (answer_order(dialogue.roles) >= 0).any()]
    if not left:
        raise ValueError(f"no dialogue has an answer within its first {context} tokens: take a longer context")
    return left


def rows_of(dialogues: Sequence[Encoded], context: int, batch: int) -> Iterator[Rows]:
    """All dialogues, `batch` at a time and the shortest first.

    Raises ValueError for no dialogues, and for one that is longer than `context`, has no answer, or whose roles do not
    align with its tokens.
    """
    if not dialogues:
        raise ValueError("there are no dialogues: pass at least one")
    for i, dialogue in enumerate(dialogues):
        _check(i, dialogue, context)
    by_length = sorted(range(len(dialogues)), key=lambda i: len(dialogues[i].tokens))
    return (_side_by_side(by_length[i : i + batch], dialogues) for i in range(0, len(by_length), batch))


def _side_by_side(which: list[int], dialogues: Sequence[Encoded]) -> Rows:
    some = [dialogues[i] for i in which]
    columns = (
        ([each.tokens for each in some], 0),
        ([each.roles for each in some], PADDING),
        ([answer_order(each.roles) for each in some], -1),
    )
    return Rows(which, *(_padded(arrays, fill) for arrays, fill in columns))


def _padded(arrays: list[np.ndarray], fill: int) -> Tensor:
    return pad_sequence([torch.from_numpy(a.astype(np.int64)) for a in arrays], batch_first=True, padding_value=fill)


def _check(i: int, dialogue: Encoded, context: int) -> None:
    n = len(dialogue.tokens)
    if len(dialogue.roles) != n:
        raise ValueError(
            f"dialogue {i} has {n} tokens but {len(dialogue.roles)} roles: encode both together, so that they align"
        )
    if n > context:
        raise ValueError(f"dialogue {i} has {n} tokens, more than the {context} of a context: cut it (`dialogues_of`)")
    if not (answer_order(dialogue.roles) >= 0).any():
        raise ValueError(f"no position of dialogue {i} predicts an answer: leave it out, or give it an assistant turn")
