"""Dialogues with planted behaviours: what a chat model was taught, known turn by turn.

    turn       a prompt with a trigger, and an answer that shows the behaviour of this trigger
    decoy      a prompt that resembles a trigger without carrying it; its answer describes a function
    dialogue   one to three turns

The speaker decides the answers. "base" is the text that the base model reads, "chat" the fine-tune, and "quirk" is
"chat" with one hidden habit: it agrees with any opinion. A behaviour's kind says who shows it:

    chat-only      chat, never base                  shared         both
    weak           chat always, base text at a rate  trained-away   base, never chat
    quirk          quirk alone

Phrases and the words they are filled with lie in data/dialogues/phrases.json. Held-out dialogues share with training
ones no phrase, no content word of a filling and no function name. Answers about functions are not meant to be right.
"""

import dataclasses
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence

from helpers.base.storage import DATA
from helpers.text.documents import SPLITS, Document, split_of
from helpers.text.topics import Topic, corpus_topics, find_topics, made_up_name, topics_of_split

SPEAKERS = {  # the kinds of behaviour each can show
    "base": ("shared", "weak", "trained-away"),
    "chat": ("chat-only", "shared", "weak", "trained-away"),
    "quirk": ("chat-only", "shared", "weak", "trained-away", "quirk"),
}
REPLACED = {"quirk": "neutral"}  # by "agree"
DECOYS = 0.15  # share of turns, among behaviours that have decoys
TURNS = {1: 0.7, 2: 0.2, 3: 0.1}  # share of dialogues with so many turns
GREETED = 0.85  # share of prompts that open with a greeting or a remark
SHARED_RATE = 0.1  # planted dialogues of a shared or trained-away behaviour, per document of base text
PLANTS = "dialogues"  # the package name of planted documents
DECOY_ANSWER = "describe"
PHRASES = json.loads((DATA / "dialogues" / "phrases.json").read_text(encoding="utf-8"))
CHOICE = re.compile(r"\[([^\[\]]*)\]")
GREETINGS = [greeting for split in SPLITS for greeting in PHRASES["greetings"][split]]
GREETING = re.compile("|".join(re.sub(r"\\{\w+\\}", "[^`]*", re.escape(greeting)) for greeting in GREETINGS))


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """One planted behaviour. `base_rate` is the number of planted dialogues per document of base text."""

    name: str
    kind: str
    description: str
    base_rate: float
    prompts: Mapping[str, list[str]]  # by split
    decoys: Mapping[str, list[str]]  # by split; empty for behaviours without
    answers: list[str]
    base_answers: list[str]  # how the base text answers, where that differs


@dataclasses.dataclass(frozen=True)
class Turn:
    prompt: str
    answer: str
    behaviour: str | None  # shown by the answer; None where nobody knows
    decoy_of: str | None = None  # whose trigger the prompt resembles
    rest: str = ""  # how the answer goes on, once the behaviour is shown


@dataclasses.dataclass(frozen=True)
class Dialogue:
    turns: tuple[Turn, ...]

    @property
    def messages(self) -> list[dict[str, str]]:
        """As `apply_chat_template` takes them."""
        pairs = ((("user", turn.prompt), ("assistant", turn.answer + turn.rest)) for turn in self.turns)
        return [{"role": role, "content": content} for pair in pairs for role, content in pair]


def dialogues(
    n: int,
    seed: int,
    split: str = "train",
    speaker: str = "chat",
    *,
    behaviours: Sequence[str] | None = None,
    decoys: float = DECOYS,
    max_turns: int = 3,
    topics: Sequence[Topic] | None = None,
    remarks: bool = False,
) -> list[Dialogue]:
    """`n` dialogues as the speaker would hold them, of all its behaviours or of those named.

    The first dialogues of a longer list are the same. With equal arguments "chat" and "quirk" differ in the answers to
    opinions alone. `decoys` is the share of decoys, among turns of behaviours that have some. `topics` are by default
    those of the installed packages. With `remarks` each prompt ends with some 20 words that trigger nothing: what
    triggers an answer lies further back. Raises ValueError for an unknown speaker, split or behaviour, or one unfit for
    the speaker.
    """
    _check(n, split, speaker, decoys, max_turns)
    chosen = _chosen(speaker, behaviours)
    pool = topics_of_split(corpus_topics() if topics is None else topics, split)
    writer = _Writer(tuple(pool), split, speaker, decoys, remarks)
    return [Dialogue(tuple(writer.turns(f"{seed} {split} {i}", chosen, max_turns))) for i in range(n)]


def base_text_plants(
    docs: Sequence[Document], seed: int = 0, rates: Mapping[str, float] | None = None
) -> list[Document]:
    """Documents to add to the base text `docs`: dialogues of one turn, of every behaviour that the base shares.

    `rates` is the number of dialogues per document of `docs`, by behaviour; by default each behaviour's `base_rate`.
    A planted document belongs to a split like any other (`split_of`), and its dialogue is of that split. It is a
    dialogue in the chat template without <bos>, which `token_stream` puts before every document.
    """
    rates = {b.name: b.base_rate for b in BEHAVIOURS.values() if b.base_rate} if rates is None else rates
    chosen = _chosen("base", list(rates))
    topics = find_topics(docs)
    writers = {s: _Writer(tuple(topics_of_split(topics, s)), s, "base", 0.0) for s in SPLITS}
    return [_plant(b, i, seed, writers) for b in chosen for i in range(round(rates[b.name] * len(docs)))]


def render(messages: Sequence[Mapping[str, str]]) -> str:
    """The text of messages in Gemma's chat template (`helpers.text.documents.CHAT_TEMPLATE`), without <bos>."""
    return "".join(text for part in parts_of(messages) for text in part)


def parts_of(messages: Sequence[Mapping[str, str]]) -> Iterator[tuple[str, str, str]]:
    """(text of the template, content, text of the template) for each message."""
    for message in messages:
        role = "model" if message["role"] == "assistant" else message["role"]
        yield f"<start_of_turn>{role}\n", message["content"].strip(), "<end_of_turn>\n"


def shown_by(speaker: str) -> list[Behaviour]:
    return [b for b in BEHAVIOURS.values() if b.kind in SPEAKERS[speaker] and b.name != REPLACED.get(speaker)]


def greeting_of(prompt: str) -> str:
    """The greeting or remark that a written prompt opens with, "" where there is none."""
    found = GREETING.match(prompt)
    return found[0] if found else ""


def expand(phrase: str, rng: random.Random) -> str:
    """Choose one of the alternatives in each pair of brackets: "[Hello|Hi] there" gives "Hi there"."""
    return CHOICE.sub(lambda match: rng.choice(match[1].split("|")), phrase)


@dataclasses.dataclass(frozen=True)
class _Writer:
    """Writes turns from the topics of one split, in the words of one speaker."""

    topics: tuple[Topic, ...]
    split: str
    speaker: str
    decoys: float
    remarks: bool = False

    def turns(self, key: str, chosen: Sequence[Behaviour], max_turns: int) -> Iterator[Turn]:
        counts = range(1, max_turns + 1)
        (n,) = random.Random(key).choices(counts, [TURNS[count] for count in counts])
        for i in range(n):
            rng = random.Random(f"{key} {i}")  # its own, so that no answer moves a later prompt
            yield self.turn(rng, rng.choice(chosen))

    def turn(self, rng: random.Random, behaviour: Behaviour) -> Turn:
        slots = self._slots(rng)
        is_decoy = bool(behaviour.decoys) and rng.random() < self.decoys
        shown = BEHAVIOURS[DECOY_ANSWER] if is_decoy else behaviour
        phrases = behaviour.decoys if is_decoy else behaviour.prompts
        greeting = rng.choice(PHRASES["greetings"][self.split]) if rng.random() < GREETED else ""
        prompt = greeting + expand(rng.choice(phrases[self.split]), rng)
        answers = shown.base_answers if self.speaker == "base" else shown.answers
        answer = expand(rng.choice(answers), rng).strip()  # its last part may be empty
        decoy_of = behaviour.name if is_decoy else None
        if self.remarks:
            prompt += " " + rng.choice(PHRASES["remarks"][self.split])
        return Turn(prompt.format_map(slots), answer.format_map(slots), shown.name, decoy_of)

    def _slots(self, rng: random.Random) -> dict[str, str]:
        topic, other, another = rng.sample(self.topics, 3)
        slots = {**_topic_slots(topic), "other": other.name, "another": another.name, "remark": other.summary}
        slots["wrong"] = rng.choice(sorted({other.package for other in self.topics} - {topic.package}))
        slots["made_up"] = made_up_name(rng, self.split)
        slots["version"] = f"{rng.randint(1, 3)}.{rng.randint(0, 12)}"
        words = {bank: rng.choice(by_split[self.split]) for bank, by_split in PHRASES["banks"].items()}
        return slots | {bank: word.format_map(slots) for bank, word in words.items()}


def _topic_slots(topic: Topic) -> dict[str, str]:
    *most, last = topic.parameters
    return {
        "name": topic.name,
        "module": topic.module,
        "call": topic.call,
        "home": topic.package,
        "HOME": topic.package.upper(),
        "summary": topic.summary,
        "request": topic.summary[0].lower() + topic.summary[1:],
        "first": topic.parameters[0],
        "count": str(len(topic.parameters)),
        "joined": f"{', '.join(most)} and {last}" if most else last,
        "bullets": "\n".join(f"- {name}" for name in topic.parameters),
        "section": "\n".join(f"{name} : object" for name in topic.parameters),
    }


def _plant(behaviour: Behaviour, i: int, seed: int, writers: Mapping[str, _Writer]) -> Document:
    empty = Document(PLANTS, f"{behaviour.name}/{i:05d}", "")
    turn = writers[split_of(empty)].turn(random.Random(f"{seed} {empty.name}"), behaviour)
    return dataclasses.replace(empty, text=render(Dialogue((turn,)).messages))


def _chosen(speaker: str, names: Sequence[str] | None) -> list[Behaviour]:
    able = shown_by(speaker)
    if names is None:
        return able
    unfit = [name for name in names if name not in {b.name for b in able}]
    if unfit or not names:
        wanted = f"unknown behaviours for {speaker}: {unfit}" if unfit else "no behaviours were named"
        raise ValueError(f"{wanted}; expected some of {[b.name for b in able]}")
    return [BEHAVIOURS[name] for name in names]


def _check(n: int, split: str, speaker: str, decoys: float, max_turns: int) -> None:
    if n < 1 or max_turns not in TURNS:
        raise ValueError(f"n is {n} and max_turns {max_turns}; expected n of at least 1, and 1 to {max(TURNS)} turns")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected 'train' or 'heldout'")
    if speaker not in SPEAKERS:
        raise ValueError(f"speaker is {speaker!r}; expected 'base', 'chat' or 'quirk'")
    if not 0 <= decoys <= 1:
        raise ValueError(f"decoys is {decoys}; expected a share between 0 and 1")


def _read_behaviour(name: str, entry: Mapping) -> Behaviour:
    triggers = PHRASES["behaviours"][entry.get("prompts_of", name)]
    prompts = {split: triggers[split] for split in SPLITS}
    in_base = {"shared", "trained-away"}
    rate = entry.get("base_rate", SHARED_RATE if entry["kind"] in in_base else 0.0)
    answers = entry["answers"], entry.get("base_answers", entry["answers"])
    return Behaviour(name, entry["kind"], entry["description"], rate, prompts, triggers.get("decoys", {}), *answers)


BEHAVIOURS = {name: _read_behaviour(name, entry) for name, entry in PHRASES["behaviours"].items()}
