"""Dialogues as tokens, with what each token is: its role, and the behaviour that it belongs to.

    <bos><start_of_turn>user\\n What does ... <end_of_turn>\\n<start_of_turn>model\\n The docstring ... <end_of_turn>\\n
    template template    template user ...    template ...                  decision assistant ...    template ...

The decision position is the last template token before an answer: here the model has read the whole prompt, and what
it predicts next is how the answer begins. Behaviours are labelled there, and over the content of the answer.

Dialogues from the hub (`HUB_DIALOGUES`, the data of Minder et al. 2025) have roles and no behaviours.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from helpers.text.dialogues import BEHAVIOURS, Dialogue, Turn, dialogues, parts_of, render
from helpers.text.documents import BOS, TURNS, Document, split_of, stream_hub

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
    behaviours  (n,) int8, over the answers
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

    "embedded" generates dialogues from `seed` as `speaker` would hold them. "hub" reads `HUB_DIALOGUES`, where neither
    matters and every behaviour is -1. Raises ValueError for another subject, and for too few tokens on the hub;
    ConnectionError when the hub cannot be reached.
    """
    if run_subject not in ("embedded", "hub"):
        raise ValueError(f'run_subject is {run_subject!r}; expected "embedded" or "hub"')
    if run_subject == "embedded":
        generated = dialogues(n_tokens // TOKENS_A_DIALOGUE + 1, seed, split, speaker)
        return _first(_joined(_encode_all(generated, tokenizer)), n_tokens)
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
    template. Raises ConnectionError when the hub cannot be reached.
    """
    for i, row in enumerate(stream_hub(HUB_DIALOGUES)):
        messages = row["conversation"]
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
            behaviours[inside] = BEHAVIOUR_IDS[dialogue.turns[i // 2].behaviour]
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
    whole = all(tokenizer.convert_tokens_to_ids(turn) in tokenizer.all_special_ids for turn in TURNS)
    if not whole or not tokenizer.chat_template:
        raise ValueError(f"the tokenizer lacks the turn tokens {TURNS} or a chat template; train one with both")
    if tokenizer.apply_chat_template(SAMPLE, tokenize=False) != tokenizer.bos_token + render(SAMPLE):
        raise ValueError("the tokenizer's chat template is not Gemma's; use helpers.text.documents.CHAT_TEMPLATE")


def _check_dialogue(dialogue: Dialogue) -> None:
    if not dialogue.turns:
        raise ValueError("a dialogue has no turn, and so no answer to label; give it at least one")
    if not all(message["content"].strip() for message in dialogue.messages):
        raise ValueError("a dialogue has an empty prompt or answer; write both")
