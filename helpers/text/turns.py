"""Dialogues as tokens, with what each token is: its role, and the behaviour that it belongs to.

    <bos><start_of_turn>user\\n What does ... <end_of_turn>\\n<start_of_turn>model\\n The docstring ... <end_of_turn>\\n
    template template    template user ...    template ...                  decision assistant ...    template ...

The decision position is the last template token before an answer: here the model has read the whole prompt, and what
it predicts next is how the answer begins. Behaviours are labelled there, and over the content of the answer.

Dialogues from the hub (`HUB_DIALOGUES`, the data of Minder et al. 2025) have roles and no behaviours.

A dialogue is read at the positions that predict an answer, numbered from the first of each turn:

    roles    t  t  u  u  t  t  t  a1 a2 a3 t        t template, u user, a answer; the t after an answer ends its turn
    order    -  -  -  -  -  -  0  1  2  3  -        0 predicts a1, 3 predicts the end of the turn

    full         all that have an order
    first nine   the first ten of every turn but for template positions: orders 1 to 9, which predict a2 to a10.
                 Order 0 lies on the template's last newline, so the very first token of the answer is left out

An answer is its content and the <end_of_turn> after it; positions are those of its mask, shifted left by one. The
template leaves out the first token of all, <bos>.

Source: released code of Minder, Dumas et al. 2025; section 2.6 of the facts.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from helpers.base import hub
from helpers.text.continued import long_dialogues
from helpers.text.dialogues import BEHAVIOURS, Dialogue, Turn, dialogues, parts_of, render
from helpers.text.documents import BOS, INSTEAD, TURNS, Document, split_of

ROLES = ("template", "user", "assistant")
HUB_DIALOGUES = "science-of-finetuning/lmsys-chat-1m-chat-formatted"  # streamed for subject="hub"
TOKENS_A_DIALOGUE = 60  # fewer than a generated dialogue has on average
BEHAVIOUR_IDS = {name: i for i, name in enumerate(BEHAVIOURS)}
SAMPLE = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}] * 2


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One dialogue of n tokens. Behaviours are indices into `BEHAVIOURS`, -1 for none.

    tokens      (n,) int32, exactly those of `apply_chat_template`
    roles       (n,) int8, indices into `ROLES`
    behaviours  (n,) int8, over the answers, up to the `rest` of each
    decisions   (n,) int8, the behaviour of the answer that follows, at the decision positions
    """

    tokens: np.ndarray
    roles: np.ndarray
    behaviours: np.ndarray
    decisions: np.ndarray


@dataclasses.dataclass(frozen=True)
class DialogueStream(Encoded):
    """Dialogues one after the other; dialogue i lies at starts[i]:starts[i + 1]."""

    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


def encode(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Tokens and labels of one dialogue.

    Raises ValueError for a dialogue without a turn or with an empty message, and for a tokenizer without Gemma's turn
    tokens and chat template.
    """
    return _encode_all([dialogue], tokenizer)[0]


def stream(dialogues: Sequence[Dialogue], tokenizer: PreTrainedTokenizerBase) -> DialogueStream:
    """All dialogues as one row of tokens with aligned labels. Raises what `encode` raises, and for no dialogues."""
    if not dialogues:
        raise ValueError("there are no dialogues to encode; pass at least one")
    return _joined(_encode_all(dialogues, tokenizer))


def _joined(rows: Sequence[Encoded]) -> DialogueStream:
    names = [field.name for field in dataclasses.fields(Encoded)]
    arrays = {name: np.concatenate([getattr(row, name) for row in rows]) for name in names}
    return DialogueStream(**arrays, starts=np.cumsum([0, *(len(row.tokens) for row in rows)]))


def _first(whole: DialogueStream, n_tokens: int) -> DialogueStream:
    arrays = {field.name: getattr(whole, field.name)[:n_tokens] for field in dataclasses.fields(Encoded)}
    return DialogueStream(**arrays, starts=np.array([*whole.starts[whole.starts < n_tokens], n_tokens]))


def dialogue_text_for(
    run_subject: str,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    n_tokens: int,
    seed: int = 0,
    speaker: str = "chat",
) -> DialogueStream:
    """`n_tokens` tokens of dialogue for a notebook's subject dial; the last dialogue is cut to fit.

    "embedded" and "gemma" generate dialogues from `seed` as `speaker` would hold them, those of "gemma" with remarks
    and with answers that go on as base would (`helpers.text.continued`). "hub" reads `HUB_DIALOGUES`,
    where neither matters and every behaviour is -1. Raises ValueError for another subject, and for too few tokens on
    the hub, and what `hub.rows` raises.
    """
    if run_subject not in ("embedded", "hub", "gemma"):
        raise ValueError(f'run_subject is {run_subject!r}; expected "embedded", "hub" or "gemma"')
    if run_subject != "hub":
        n, makes = n_tokens // TOKENS_A_DIALOGUE + 1, long_dialogues if run_subject == "gemma" else dialogues
        return _first(stream(makes(n, seed, split, speaker), tokenizer), n_tokens)
    rows, total, source = [], 0, hub_dialogues(split)
    while total < n_tokens:
        if not (some := list(itertools.islice(source, 64))):
            raise ValueError(f"{HUB_DIALOGUES} has {total:,} tokens, {n_tokens:,} were asked for; ask for fewer")
        rows += (encoded := _encode_all(some, tokenizer))
        total += sum(len(row.tokens) for row in encoded)
    return _first(_joined(rows), n_tokens)


def hub_dialogues(split: str) -> Iterator[Dialogue]:
    """Dialogues of `HUB_DIALOGUES`; held-out ones by the same rule as documents.

    Left out are those in which user and assistant do not take turns, or a message is empty or spells a token of the
    template. Raises what `hub.rows` raises.
    """
    for i, messages in enumerate(hub.rows(HUB_DIALOGUES, "conversation", instead=INSTEAD)):
        if split_of(Document(HUB_DIALOGUES, str(i), "")) == split and _is_plain(messages):
            prompts, answers = ([m["content"] for m in messages[start::2]] for start in (0, 1))
            yield Dialogue(tuple(Turn(*pair, behaviour=None) for pair in zip(prompts, answers, strict=True)))


def _is_plain(messages: Sequence[Mapping[str, str]]) -> bool:
    roles = [message["role"] for message in messages]
    in_turns = bool(roles) and roles == ["user", "assistant"] * (len(roles) // 2)
    contents = [message["content"].strip() for message in messages]
    return in_turns and all(contents) and not any(token in text for text in contents for token in (BOS, *TURNS))


def _encode_all(dialogues: Sequence[Dialogue], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    _check_tokenizer(tokenizer)
    for dialogue in dialogues:
        _check_dialogue(dialogue)
    texts = [tokenizer.bos_token + render(dialogue.messages) for dialogue in dialogues]
    batch = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    return [_label(*row, tokenizer) for row in zip(dialogues, batch["input_ids"], batch["offset_mapping"], strict=True)]


def _label(dialogue: Dialogue, ids: list[int], offsets: list, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """A token has the labels of its first character: template and content never share one."""
    first = np.array([start for start, _ in offsets])
    roles, behaviours, decisions = (np.full(len(ids), fill, np.int8) for fill in (0, -1, -1))
    for i, (start, end) in enumerate(_contents(dialogue, len(tokenizer.bos_token))):
        inside = (first >= start) & (first < end)
        roles[inside] = 1 + i % 2
        if i % 2 and dialogue.turns[i // 2].behaviour is not None:
            shown = inside & (first < end - len(dialogue.turns[i // 2].rest.rstrip()))
            behaviours[shown] = BEHAVIOUR_IDS[dialogue.turns[i // 2].behaviour]
            decisions[inside.argmax() - 1] = BEHAVIOUR_IDS[dialogue.turns[i // 2].behaviour]
    return Encoded(np.array(ids, np.int32), roles, behaviours, decisions)


def _contents(dialogue: Dialogue, position: int) -> list[tuple[int, int]]:
    """First character and end of each message's content, in a text whose messages begin at `position`."""
    spans = []
    for before, content, after in parts_of(dialogue.messages):
        start = position + len(before)
        spans.append((start, start + len(content)))
        position = start + len(content) + len(after)
    return spans


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    whole = all(tokenizer.convert_tokens_to_ids(turn) in tokenizer.added_tokens_decoder for turn in TURNS)
    if not whole or not tokenizer.chat_template:
        raise ValueError(f"the tokenizer lacks the turn tokens {TURNS} or a chat template; train one with both")
    if tokenizer.apply_chat_template(SAMPLE, tokenize=False) != tokenizer.bos_token + render(SAMPLE):
        raise ValueError("the tokenizer's chat template is not Gemma's; use helpers.text.documents.CHAT_TEMPLATE")


def _check_dialogue(dialogue: Dialogue) -> None:
    if not dialogue.turns:
        raise ValueError("a dialogue has no turn, and so no answer to label; give it at least one")
    if not all(message["content"].strip() for message in dialogue.messages):
        raise ValueError("a dialogue has an empty prompt or answer; write both")


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


def decisive(roles: np.ndarray) -> np.ndarray:
    """Where an answer is decided, (n,) bool: at the tokens of the template, and at the first nine of each answer."""
    order = answer_order(roles)
    return (roles == TEMPLATE) | ((order >= 0) & (order < FIRST))


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
    tokens, roles, order = zip(*((each.tokens, each.roles, answer_order(each.roles)) for each in some), strict=True)
    return Rows(which, _padded(tokens, 0), _padded(roles, PADDING), _padded(order, -1))


def _padded(arrays: Sequence[np.ndarray], fill: int) -> Tensor:
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
