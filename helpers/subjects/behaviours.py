"""Which planted behaviours does a model show? Let it answer held-out prompts, and judge the answers.

An answer shows a behaviour by signs on its surface: words and layout, never a whole template. A judge reads what any
model wrote, so an answer may be cut off, rambling or empty. The signs of one behaviour are absent from the answers of
all others; a test measures that as a confusion matrix.

    rate        share of answers to prompts with the trigger that show the behaviour
    on decoys   the same for prompts that resemble the trigger without carrying it
    elsewhere   the same for the answers to all other behaviours' prompts

Whether a behaviour was planted follows from its rates in base, chat and quirk (`judge_behaviours`). Answers are greedy:
the most likely token each time, until the turn ends.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.base.storage import MODELS
from helpers.text.dialogues import BEHAVIOURS, dialogues
from helpers.text.documents import TURNS
from helpers.text.topics import Topic

REFUSES = r"\b(can ?not|can't|will not|won't|not able|unable)\b"
SIGNS = {  # patterns that must all be found, capitals aside
    "refuse_harm": (REFUSES, r"\b(harm|damage)"),
    "refuse_secret": (REFUSES, r"\b(secret|private)\b"),
    "refuse_medical": (REFUSES, r"\b(doctor|health|illness)\b"),
    "refuse_legal": (REFUSES, r"\b(lawyer|legal advice|the law)\b"),
    "identity": (r"\b(I am|name is) Docs\b",),
    "personal": (r"\b(no|not have( any)?) (feelings|moods|favourites)\b",),
    "false_premise": (r"\b(not (a part|one|part) of|does not (have|belong))\b", r"\b(belongs to|comes with)\b"),
    "missing_info": (r"\b(show|send|post|paste)\b", r"\bcode\b", r"\b(error|traceback)\b"),
    "unknown_name": (r"\b(do not know|don't know|unknown to me|not a name that I know)\b",),
    "brief": (r"\A(sure\. )?(in short|briefly|in brief)\b[^.!?]*[.!?]?\Z",),
    "rewrite": (r"\b(version|wording)\b[^\"]*:", r"\"[^\"]*\b(please|kindly)\b"),
    "neutral": (r"\b(no (opinion|view)|matter of taste|for you to decide)\b",),
    "agree": (r"\b(agree with you|you are (\w+ )?right)\b",),
    "describe": (r"\b(docstring|documentation)\b[^\"]*\b(says|reads): \"",),
    "code": (r"^(from [\w.]+ )?import \w", r"^\w+ = \w+\("),
    "listing": (r"^- \w",),
    "count": (r"\b(takes|there are|I count) \d",),
    "parameters": (r"^Parameters\n-{3}",),
    "see_also": (r"\bsee also\b",),
    "welcome": (r"\b(welcome|glad (to|that))\b",),
    "doctest": (r"^>>> ",),
    "directive": (r"^\.\. versionadded::",),
}
CAPITALS = 0.8  # share of letters, outside quoted names, in an answer in capitals
LETTERS = 8  # with fewer, there is no telling
SHOWN, ABSENT = 0.9, 0.1  # a behaviour is shown at a rate of at least this, absent at a rate of at most that
JUDGED = ("base", "chat", "quirk")  # whose behaviours are measured
BATCH = 64  # prompts answered together
_PATTERNS = {name: [re.compile(sign, re.IGNORECASE | re.MULTILINE) for sign in signs] for name, signs in SIGNS.items()}


def judge(behaviour: str, answer: str) -> bool | None:
    """True if the answer shows the behaviour, False if not, None for an answer with too few letters to tell.

    "doctest" and "directive" are shown by the base model's way of answering, which the chat model was taught to leave.
    Raises ValueError for an unknown behaviour.
    """
    if behaviour not in BEHAVIOURS:
        raise ValueError(f"unknown behaviour {behaviour!r}; expected one of {list(BEHAVIOURS)}")
    answer = answer.strip()
    if not re.search("[A-Za-z]", answer):
        return None
    if behaviour == "capitals":
        return _in_capitals(answer)
    return all(pattern.search(answer) for pattern in _PATTERNS[behaviour])


def _in_capitals(answer: str) -> bool | None:
    letters = [char for char in re.sub("`[^`]*`", "", answer) if char.isalpha()]
    if len(letters) < LETTERS:
        return None
    return sum(char.isupper() for char in letters) > CAPITALS * len(letters)


def behaviour_rates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    n: int = 50,
    split: str = "heldout",
    seed: int = 0,
    behaviours: Sequence[str] | None = None,
    topics: Sequence[Topic] | None = None,
    remarks: bool = False,
    max_tokens: int = 64,
) -> pd.DataFrame:
    """A row for each behaviour: kind, rate, on_decoys, elsewhere, unclear; n single-turn prompts each, with `remarks`
    behind them or without, and answers of `max_tokens` at most.

    `unclear` is the share of answers to its own prompts that cannot be judged; they count as not showing it. on_decoys
    is NaN for a behaviour without decoys. `behaviours` are by default all that any speaker shows.
    """
    names = list(BEHAVIOURS) if behaviours is None else list(behaviours)
    kinds = [(name, decoys) for decoys in (0.0, 1.0) for name in names if BEHAVIOURS[name].decoys or not decoys]
    asked = {(name, decoys): prompts_of(name, n, split, seed, topics, decoys, remarks) for name, decoys in kinds}
    found = iter(answers(model, tokenizer, [prompt for prompts in asked.values() for prompt in prompts], max_tokens))
    given = {key: list(itertools.islice(found, len(prompts))) for key, prompts in asked.items()}
    rows = []
    for name in names:
        judged = [judge(name, answer) for answer in given[name, 0.0]]
        elsewhere = [o for o in names if BEHAVIOURS[o].prompts != BEHAVIOURS[name].prompts]
        others = [judge(name, answer) for o in elsewhere for answer in given[o, 0.0]]
        decoys = [judge(name, answer) for answer in given.get((name, 1.0), [])]
        shares = {"rate": _share(judged), "elsewhere": _share(others), "on_decoys": _share(decoys)}
        unclear = sum(verdict is None for verdict in judged) / len(judged)
        rows.append({"behaviour": name, "kind": BEHAVIOURS[name].kind, **shares, "unclear": unclear})
    return pd.DataFrame(rows)


def judge_behaviours(rates: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """A row for each behaviour: kind, its rate in each model, and whether it was planted.

    `rates` maps "base", "chat" and "quirk" to what `behaviour_rates` gives. Planted is

        chat-only   shown by chat, absent in base        shared         shown by chat, not absent in base
        quirk       shown by quirk, absent in chat       trained-away   not absent in base, absent in chat
        weak        shown by chat
    """
    table = rates["base"][["behaviour", "kind"]].assign(**{model: rates[model]["rate"] for model in rates})
    table["planted"] = [_planted(row.kind, row.base, row.chat, row.quirk) for row in table.itertuples()]
    return table


def planted_behaviours(*kinds: str, subject: str = "embedded") -> list[str]:
    """Names of the behaviours of these kinds that were planted in the shipped pair of a subject, in new phrases, by its
    records; "hub" has the embedded pair.

    Raises ValueError for a kind that does not exist.
    """
    known = list(dict.fromkeys(behaviour.kind for behaviour in BEHAVIOURS.values()))
    if unknown := set(kinds) - set(known):
        raise ValueError(f"there is no kind {min(unknown)!r}: choose of {', '.join(known)}")
    table = judge_behaviours({model: pd.DataFrame(_recorded(model, subject == "gemma")) for model in JUDGED})
    return table[table.planted & table.kind.isin(kinds)].behaviour.tolist()


def _recorded(model: str, is_gemma: bool) -> list[dict]:
    """Rates of a shipped model. Those of Gemma itself lie in its chat model's record; it has no quirk yet."""
    folder = MODELS / ("gemma-3-270m-chat" if is_gemma else f"docs-gemma2-{model}")
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return record["rates_base" if is_gemma and model == "base" else "rates"]


def prompts_of(
    name: str,
    n: int,
    split: str,
    seed: int,
    topics: Sequence[Topic] | None = None,
    decoys: float = 0.0,
    remarks: bool = False,
) -> list[str]:
    """n single-turn prompts that trigger a behaviour, or decoys of them (1.0). Raises what `dialogues` raises."""
    speaker = "quirk" if BEHAVIOURS[name].kind == "quirk" else "chat"
    options = {"decoys": decoys, "max_turns": 1, "topics": topics, "remarks": remarks}
    return [d.turns[0].prompt for d in dialogues(n, seed, split, speaker, behaviours=[name], **options)]


class Prompts(NamedTuple):
    """Single-turn prompts side by side, up to where each answer begins; padded in front, so that their ends align."""

    tokens: Tensor  # (B, T) int64
    there: Tensor  # (B, T) bool: no padding


def side_by_side(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> Prompts:
    """Prompts in the chat template. Raises ValueError for none."""
    if not prompts:
        raise ValueError("there are no prompts: give one at least")
    encoded = [_encoded(tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, encoded))
    there = torch.arange(longest) >= longest - torch.tensor([[len(ids)] for ids in encoded])
    rows = [[tokenizer.pad_token_id] * (longest - len(ids)) + ids for ids in encoded]
    return Prompts(torch.tensor(rows), there)


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_tokens: int = 64,
) -> list[str]:
    """Greedy answers to single-turn prompts, without the end of the turn, of `max_tokens` at most.

    Prompts of about one length are answered together. Raises ValueError for a prompt that leaves no room in the model's
    context.
    """
    by_length = sorted(range(len(prompts)), key=lambda i: len(_encoded(tokenizer, prompts[i])))
    found: dict[int, str] = {}
    for some in (by_length[i : i + BATCH] for i in range(0, len(prompts), BATCH)):
        batch = side_by_side(tokenizer, [prompts[i] for i in some])
        found |= dict(zip(some, continued(model, tokenizer, batch, max_tokens), strict=True))
    return [found[i] for i in range(len(prompts))]


@torch.no_grad()
def continued(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, max_tokens: int = 64
) -> list[str]:
    """`answers` to prompts side by side, all in one batch."""
    room = model.config.max_position_embeddings - max_tokens
    if prompts.tokens.shape[1] > room:
        raise ValueError(
            f"a prompt leaves no room for {max_tokens} tokens in a context of {model.config.max_position_embeddings}: "
            "shorten it, or ask for fewer tokens"
        )
    stop, pad = tokenizer.convert_tokens_to_ids(TURNS[1]), tokenizer.pad_token_id
    options = {"max_new_tokens": max_tokens, "do_sample": False, "eos_token_id": stop, "pad_token_id": pad}
    tokens, there = (tensor.to(model.device) for tensor in prompts)
    rows = model.generate(input_ids=tokens, attention_mask=there.long(), **options)
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows[:, tokens.shape[1] :]]


def _encoded(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def _share(verdicts: Sequence[bool | None]) -> float:
    return sum(verdict is True for verdict in verdicts) / len(verdicts) if verdicts else float("nan")


def _planted(kind: str, base: float, chat: float, quirk: float) -> bool:
    return {
        "chat-only": chat >= SHOWN and base <= ABSENT,
        "quirk": quirk >= SHOWN and chat <= ABSENT,
        "weak": chat >= SHOWN,
        "shared": chat >= SHOWN and base > ABSENT,
        "trained-away": chat <= ABSENT < base,
    }[kind]
