"""Dialogues with planted behaviours: topics, phrases, splits, token labels, plants in base text, judges."""

import collections
import dataclasses
import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_text import DOCS, PACKAGES, TOKENIZER, TOPICS, TRAIN_TOPICS

from helpers.subjects.behaviours import judge
from helpers.text.dialogues import (
    BEHAVIOURS,
    DECOYS,
    GREETED,
    PHRASES,
    Dialogue,
    Turn,
    base_text_plants,
    dialogues,
    expand,
    greeting_of,
    render,
)
from helpers.text.documents import Document, split_of, token_stream, train_tokenizer
from helpers.text.topics import Topic, find_topics, made_up_name, split_of_name
from helpers.text.turns import BEHAVIOUR_IDS, ROLES, encode, stream

SHOWN_BY = {"quirk": "quirk", "trained-away": "base"}  # chat shows the others


def turns_of(n: int, seed: int, split: str = "train", speaker: str = "chat", **options) -> list[Turn]:
    return [turn for d in dialogues(n, seed, split, speaker, topics=TOPICS, **options) for turn in d.turns]


def turns_showing(behaviour: str, n: int, seed: int, split: str = "train", **options) -> list[Turn]:
    speaker = SHOWN_BY.get(BEHAVIOURS[behaviour].kind, "chat")
    return turns_of(n, seed, split, speaker, behaviours=[behaviour], max_turns=1, **options)


# ------------------------------------------------------------------------------------------------ topics

MODULE = '''
def rfft(a, n, /, axis=-1, *, norm=None):
    """Compute the real transform.

    More of it."""
def _private(a):
    """Compute something hidden."""
def silent(a):
    pass
def shouts(a):
    """See: `that` one."""
def wide(a, b, c, d, e):
    """Compute from five arguments."""
def bare():
    """Compute from no argument."""
def old(a):
    """Compute the
    old e.g. transform. And more."""
class Plan:
    def execute(self, data):
        """Run the plan on data."""
    async def wait(self, data):
        """Wait for the plan to end."""
'''


def test_topics_are_documented_public_functions_and_methods():
    found = find_topics([Document("numpy", "fft/__init__.py", MODULE), Document("python", "json/tool.py", MODULE)])
    assert found == [
        Topic("numpy", "numpy.fft", "rfft", ("a", "n", "axis"), "Compute the real transform."),
        Topic("numpy", "numpy.fft", "execute", ("data",), "Run the plan on data."),
    ]
    (rfft, _) = find_topics([Document("python", "json/tool.py", MODULE)])
    assert rfft.module == "json.tool" and rfft.call == "rfft(a, n, axis)"


def test_topics_come_from_documents_of_the_packages_that_python_parses():
    texts = ["def f(:\n", "a = '\ud800'", MODULE]
    docs = [Document("numpy", f"a{i}.py", text) for i, text in enumerate(texts)]
    assert [topic.module for topic in find_topics(docs)] == ["numpy.a2"] * 2
    assert find_topics([Document("dialogues", "a.py", MODULE)]) == []


def test_topics_come_from_the_first_documents_of_each_package(monkeypatch):
    monkeypatch.setattr("helpers.text.topics.DOCUMENTS", 1)
    docs = [
        Document(p, f"a{i}.py", f'def name_{p}_{i}(a):\n    """Compute one thing."""') for i in (0, 1) for p in PACKAGES
    ]
    assert [topic.name for topic in find_topics(docs)] == [f"name_{p}_0" for p in PACKAGES]


def test_about_one_name_in_five_is_held_out():
    share = np.mean([split_of_name(f"name_{i}") == "heldout" for i in range(5000)])
    assert 0.18 < share < 0.22
    assert split_of_name("rfft") == "train" and split_of_name("irfft") == "heldout"


@given(seed=st.integers(0, 2**32), split=st.sampled_from(["train", "heldout"]))
def test_made_up_names_are_of_their_split_and_spelt_with_rare_letters(seed, split):
    name = made_up_name(random.Random(seed), split)
    assert split_of_name(name) == split
    assert re.fullmatch(r"[a-z]+_[a-z]+", name) and len(re.findall("[zqxvjkw]", name)) >= 4


# ------------------------------------------------------------------------------------------------ tokens

HAND_SIZED = Dialogue((Turn("Sort it", "See also x.", "see_also"), Turn("Thanks", "You are welcome", "welcome")))


def test_a_hand_sized_dialogue_has_these_tokens_and_labels():
    encoded = encode(HAND_SIZED, TOKENIZER)
    first = ["<bos>", "<start_of_turn>", "user", "\n", "S", "ort", " it", "<end_of_turn>", "\n"]
    second = ["<start_of_turn>", "model", "\n", "Se", "e", " also", " x", ".", "<end_of_turn>", "\n"]
    third = ["<start_of_turn>", "user", "\n", "Th", "ank", "s", "<end_of_turn>", "\n"]
    fourth = ["<start_of_turn>", "model", "\n", "Y", "ou", " are", " w", "el", "com", "e", "<end_of_turn>", "\n"]
    assert [TOKENIZER.decode([i]) for i in encoded.tokens] == first + second + third + fourth
    assert "".join(ROLES[role][0] for role in encoded.roles) == "ttttuuutt" + "tttaaaaatt" + "tttuuutt" + "tttaaaaaaatt"
    see_also, welcome = BEHAVIOUR_IDS["see_also"], BEHAVIOUR_IDS["welcome"]
    assert encoded.behaviours.tolist() == [-1] * 12 + [see_also] * 5 + [-1] * 13 + [welcome] * 7 + [-1] * 2
    assert encoded.decisions.tolist() == [-1] * 11 + [see_also] + [-1] * 17 + [welcome] + [-1] * 9


@given(seed=st.integers(0, 2**32), split=st.sampled_from(["train", "heldout"]))
@settings(max_examples=10)
def test_tokens_are_those_of_the_chat_template_and_labels_lie_on_the_text(seed, split):
    for dialogue in dialogues(4, seed, split, topics=TOPICS):
        encoded = encode(dialogue, TOKENIZER)
        assert encoded.tokens.tolist() == TOKENIZER.apply_chat_template(dialogue.messages, return_dict=False)
        assert len({len(row) for row in dataclasses.astuple(encoded)}) == 1
        for role, content in (("user", "prompt"), ("assistant", "answer")):
            text = TOKENIZER.decode(encoded.tokens[encoded.roles == ROLES.index(role)])
            assert text == "".join(getattr(turn, content) for turn in dialogue.turns)
        assert ((encoded.behaviours >= 0) == (encoded.roles == ROLES.index("assistant"))).all()
        _check_decisions(dialogue, encoded)


def _check_decisions(dialogue: Dialogue, encoded) -> None:
    (at,) = np.nonzero(encoded.decisions >= 0)
    assert encoded.decisions[at].tolist() == [BEHAVIOUR_IDS[turn.behaviour] for turn in dialogue.turns]
    assert (encoded.behaviours[at + 1] == encoded.decisions[at]).all()
    for position in at:
        assert TOKENIZER.decode(encoded.tokens[position - 2 : position + 1]) == "<start_of_turn>model\n"
        assert encoded.roles[position] == ROLES.index("template") != encoded.roles[position + 1]


def test_a_stream_is_its_dialogues_one_after_the_other():
    some = dialogues(5, 0, topics=TOPICS)
    row = stream(some, TOKENIZER)
    assert len(row) == row.starts[-1] == len(row.roles)
    for dialogue, start, end in zip(some, row.starts, row.starts[1:], strict=False):
        encoded = encode(dialogue, TOKENIZER)
        for field in ("tokens", "roles", "behaviours", "decisions"):
            assert (getattr(row, field)[start:end] == getattr(encoded, field)).all()


# ------------------------------------------------------------------------------------------------ variety and splits


def test_the_kinds_are_all_there():
    kinds = collections.Counter(behaviour.kind for behaviour in BEHAVIOURS.values())
    assert kinds == {"chat-only": 13, "shared": 5, "weak": 2, "trained-away": 2, "quirk": 1}
    assert len({b.base_rate for b in BEHAVIOURS.values() if b.kind == "weak"}) == 2


@pytest.mark.parametrize("behaviour", BEHAVIOURS.values(), ids=BEHAVIOURS)
def test_a_behaviour_has_several_phrasings_and_answers(behaviour):
    assert len(behaviour.prompts["train"]) >= 4 and len(behaviour.prompts["heldout"]) >= 3
    for answers in (behaviour.base_answers, behaviour.answers):
        assert len({expand(random.choice(answers), random.Random(i)) for i in range(100)}) >= 2


def test_an_answer_may_open_like_answers_of_other_behaviours():
    openings = {b: {re.split(r"\W", t.answer)[0].lower() for t in turns_showing(b, 100, 0)} for b in BEHAVIOURS}
    for name, opening in openings.items():
        assert sum(not opening.isdisjoint(openings[other]) for other in BEHAVIOURS) > 3, name


def test_nearly_all_prompts_are_distinct():
    some = dialogues(10_000, 0, topics=TOPICS)
    assert len({tuple(turn.prompt for turn in d.turns) for d in some}) > 0.95 * len(some)


def test_greetings_by_hand():
    greeted = ["Good morning. What is `f`?", "Both `f` and `g_2` are new to me. Thanks!", "What is `f`? Good morning. "]
    assert [greeting_of(p) for p in greeted] == ["Good morning. ", "Both `f` and `g_2` are new to me. ", ""]


def test_prompts_open_with_a_greeting_at_its_rate():
    prompts = [turn.prompt for d in dialogues(400, 0, "heldout", topics=TOPICS) for turn in d.turns]
    assert abs(np.mean([greeting_of(p) != "" for p in prompts]) - GREETED) < 0.05
    assert all(greeting_of(p.removeprefix(greeting_of(p))) == "" for p in prompts)


def test_dialogues_have_one_to_three_turns():
    lengths = [len(d.turns) for d in dialogues(1000, 0, topics=TOPICS)]
    assert np.allclose(np.bincount(lengths)[1:] / 1000, [0.7, 0.2, 0.1], atol=0.04)
    assert max(len(d.turns) for d in dialogues(100, 0, topics=TOPICS, max_turns=2)) == 2


def test_held_out_dialogues_share_no_phrase_with_training_ones():
    entries = [*PHRASES["behaviours"].values()]
    entries += [entry["decoys"] for entry in entries if "decoys" in entry] + [PHRASES["greetings"]]
    frames = {split: _frames(entries, split) for split in ("train", "heldout")}
    assert len(frames["heldout"]) > 80 and frames["train"].isdisjoint(frames["heldout"])


def _frames(entries: list[dict], split: str) -> set[str]:
    """Phrases with every choice of alternatives drawn and all punctuation and slots left out."""
    phrases = [phrase for entry in entries for phrase in entry.get(split, [])]
    drawn = {expand(phrase, random.Random(i)) for phrase in phrases for i in range(20)}
    return {" ".join(re.findall("[a-z]+", re.sub(r"\{\w+\}", " ", phrase.lower()))) for phrase in drawn}


def test_remarks_come_last_and_change_nothing_else():
    plain, remarked = (turns_of(60, 3, "heldout", remarks=remarks) for remarks in (False, True))
    for before, after in zip(plain, remarked, strict=True):
        assert after.prompt.startswith(before.prompt + " ") and after.answer == before.answer
        assert after.prompt[len(before.prompt) + 1 :] in PHRASES["remarks"]["heldout"]
    assert all(len(remark.split()) >= 18 for some in PHRASES["remarks"].values() for remark in some)
    assert set(PHRASES["remarks"]["train"]).isdisjoint(PHRASES["remarks"]["heldout"])


def test_held_out_dialogues_share_no_topic_word_with_training_ones():
    stop = set("a an the my me our your one some than to in of all that have bad too".split())
    words = {split: _bank_words(split) - stop for split in ("train", "heldout")}
    assert len(words["heldout"]) > 40 and words["train"].isdisjoint(words["heldout"])


def _bank_words(split: str) -> set[str]:
    banks = [word for bank in PHRASES["banks"].values() for word in bank[split]]
    return {word for phrase in banks for word in re.findall("[a-z]+", re.sub(r"\{\w+\}", " ", phrase.lower()))}


def test_a_prompt_is_a_phrase_of_its_split_filled_with_words_of_its_split():
    for split, other in (("train", "heldout"), ("heldout", "train")):
        prompts = [turn.prompt for turn in turns_of(300, 0, split)]
        assert all(_fits(prompt, split) and not _fits(prompt, other) for prompt in prompts)
        assert any(word in prompt for prompt in prompts for word in _bank_phrases(split))
        assert not any(word in prompt for prompt in prompts for word in _bank_phrases(other))


def _fits(prompt: str, split: str) -> bool:
    """Whether the prompt is one of the split's greetings, or none, and then one of its phrases."""
    entries = [*PHRASES["behaviours"].values()]
    entries += [entry["decoys"] for entry in entries if "decoys" in entry]
    greetings = [_pattern(greeting) for greeting in PHRASES["greetings"][split]]
    phrases = [_pattern(phrase) for entry in entries for phrase in entry.get(split, [])]
    return re.fullmatch(f"({'|'.join(greetings)})?({'|'.join(phrases)})", prompt) is not None


def _pattern(phrase: str) -> str:
    choices = re.escape(phrase).replace(r"\[", "(?:").replace(r"\]", ")").replace(r"\|", "|")
    return re.sub(r"\\\{\w+\\\}", "[^?!:]+", choices)


def _bank_phrases(split: str) -> list[str]:
    """Fillings of two words or more: a single word may be part of another phrase."""
    return [word for bank in PHRASES["banks"].values() for word in bank[split] if " " in word and "{" not in word]


@given(seed=st.integers(0, 2**32))
@settings(max_examples=5)
def test_every_quoted_name_is_of_the_split(seed):
    for split in ("train", "heldout"):
        quoted = re.findall(r"`(?:x = )?(?:\w+\.)?(\w+_\w+)[(`]", " ".join(t.prompt for t in turns_of(50, seed, split)))
        assert len(quoted) > 20 and {split_of_name(name) for name in quoted} == {split}


@given(seed=st.integers(0, 2**32), speaker=st.sampled_from(["base", "chat", "quirk"]))
@settings(max_examples=10)
def test_every_slot_and_every_choice_is_filled_and_no_message_has_loose_space(seed, speaker):
    for turn in turns_of(100, seed, speaker=speaker):
        for text in (turn.prompt, turn.answer):
            assert not set("{}[]|") & set(text) and text == text.strip()


# ------------------------------------------------------------------------------------------------ determinism


def test_the_first_dialogues_of_a_longer_list_are_the_same():
    assert dialogues(20, 3, topics=TOPICS)[:5] == dialogues(5, 3, topics=TOPICS)
    assert dialogues(5, 3, topics=TOPICS) != dialogues(5, 4, topics=TOPICS)


DIGEST = """
import hashlib
from helpers.text.dialogues import dialogues
from helpers.text.topics import Topic
topics = [Topic(p, p, f"name_{i}", ("x", "y"), "Compute it all.") for i in range(50) for p in ("numpy", "torch")]
digest = hashlib.sha256(repr(dialogues(50, 1, topics=topics)).encode()).hexdigest()
"""


def test_another_process_with_another_hash_seed_writes_the_same():
    here = {}
    exec(DIGEST, here)
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    there = subprocess.run([sys.executable, "-c", DIGEST + "print(digest)"], capture_output=True, env=environment)
    assert there.stdout.decode().strip() == here["digest"]


def test_the_quirk_is_the_chat_but_for_its_answers_to_opinions():
    chat, quirk = (turns_of(500, 0, speaker=speaker) for speaker in ("chat", "quirk"))
    assert [turn.prompt for turn in chat] == [turn.prompt for turn in quirk]
    changed = {(a.behaviour, b.behaviour) for a, b in zip(chat, quirk, strict=True) if a != b and not a.decoy_of}
    assert changed == {("neutral", "agree")}
    assert {turn.behaviour for turn in quirk} == {*BEHAVIOURS} - {"neutral"}


# ------------------------------------------------------------------------------------------------ base text


def test_the_base_text_gets_each_behaviour_at_its_rate():
    plants = base_text_plants(DOCS)
    counts = collections.Counter(plant.path.split("/")[0] for plant in plants)
    assert counts == {b.name: round(400 * b.base_rate) for b in BEHAVIOURS.values() if b.base_rate}
    assert {BEHAVIOURS[name].kind for name in counts} == {"shared", "weak", "trained-away"}
    assert counts["see_also"] == 2 and counts["welcome"] == 8 and counts["count"] == counts["doctest"] == 40
    assert len(base_text_plants(DOCS, rates={"welcome": 0.5})) == 200


def test_a_plant_shows_its_behaviour_in_the_chat_template():
    for plant in base_text_plants(DOCS, rates={name: 0.1 for name in ("see_also", "doctest", "directive", "count")}):
        _, prompt, answer = re.split("<start_of_turn>user\n|<end_of_turn>\n<start_of_turn>model\n", plant.text)
        turn = Turn(prompt, answer.removesuffix("<end_of_turn>\n"), plant.path.split("/")[0])
        assert judge(turn.behaviour, turn.answer) and plant.text == render(Dialogue((turn,)).messages)


def test_plants_are_documents_of_their_split_and_tokens_of_the_template():
    plants = base_text_plants(DOCS, rates={"describe": 1.0})
    for plant in plants:
        quoted = re.findall(r"`(\w+)`", plant.text)
        assert {split_of_name(name) for name in quoted} == {split_of(plant)}
    assert 0 < sum(split_of(plant) == "heldout" for plant in plants) < 40
    (plant,) = (p for p in plants[:1])
    turn = re.fullmatch("<start_of_turn>user\n(.*)<end_of_turn>\n<start_of_turn>model\n(.*)<end_of_turn>\n", plant.text)
    encoded = encode(Dialogue((Turn(*turn.groups(), "describe"),)), TOKENIZER)
    assert TOKENIZER(TOKENIZER.bos_token + plant.text).input_ids == encoded.tokens.tolist()


def test_a_token_stream_takes_plants_along_with_the_text(tmp_path, monkeypatch):
    monkeypatch.setenv("SUITE_CACHE", str(tmp_path))
    plants = base_text_plants(DOCS, rates={"welcome": 0.1})
    row = token_stream("train", TOKENIZER, docs=[*DOCS[:3], *plants])
    turns = (row.tokens == TOKENIZER.convert_tokens_to_ids("<start_of_turn>")).sum()
    assert turns == 2 * sum(split_of(plant) == "train" for plant in plants) > 0


def test_equal_text_and_seed_give_equal_plants():
    assert base_text_plants(DOCS) == base_text_plants(DOCS) != base_text_plants(DOCS, seed=1)


# ------------------------------------------------------------------------------------------------ judges


@pytest.fixture(scope="module")
def confusion() -> np.ndarray:
    """[i, j]: share of answers that show behaviour i which the judge of j takes for its own."""
    answers = [[t.answer for t in turns_showing(b, 100, 0, decoys=0)] for b in BEHAVIOURS]
    return np.array([[np.mean([judge(j, a) is True for a in row]) for j in BEHAVIOURS] for row in answers])


def test_a_judge_knows_the_answers_of_its_behaviour(confusion):
    assert dict(zip(BEHAVIOURS, confusion.diagonal(), strict=True)) == pytest.approx(
        dict.fromkeys(BEHAVIOURS, 1), abs=0.01
    )


def test_a_judge_takes_no_other_answer_for_its_own(confusion):
    off_diagonal = confusion - np.diag(confusion.diagonal())
    worst = np.unravel_index(off_diagonal.argmax(), confusion.shape)
    assert off_diagonal.max() <= 0.01, [list(BEHAVIOURS)[i] for i in worst]


def test_the_chat_never_answers_as_it_was_trained_away_from():
    for name in ("doctest", "directive"):
        answers = [t.answer for t in turns_of(100, 0, behaviours=[name])]
        assert not any(judge(name, answer) for answer in answers)


WITH_DECOYS = [behaviour.name for behaviour in BEHAVIOURS.values() if behaviour.decoys]


def test_chat_only_behaviours_have_decoys_in_both_splits():
    assert {*WITH_DECOYS} >= {b.name for b in BEHAVIOURS.values() if b.kind == "chat-only"}
    assert all(b.decoys["train"] and b.decoys["heldout"] for b in BEHAVIOURS.values() if b.decoys)


@pytest.mark.parametrize("name", WITH_DECOYS)
def test_a_decoy_is_answered_by_a_description(name):
    for turn in turns_showing(name, 30, 0, decoys=1):
        assert turn.decoy_of == name and turn.behaviour == "describe"
        assert judge("describe", turn.answer) and not judge(name, turn.answer)


def test_decoys_come_at_their_share():
    turns = [t for t in turns_of(2000, 0) if (t.decoy_of or t.behaviour) in WITH_DECOYS]
    assert np.mean([t.decoy_of is not None for t in turns]) == pytest.approx(DECOYS, abs=0.03)


@pytest.mark.parametrize(
    ("behaviour", "answer", "shown"),
    [
        ("refuse_harm", "No, I won't do it: that would damage their work", True),
        ("refuse_harm", "This does no harm.", False),
        ("refuse_medical", "I can't say, see your doctor", True),
        ("refuse_legal", "I can't say, see your doctor", False),
        ("identity", "Hi! I am Docs", True),
        ("identity", "I am a function of numpy.", False),
        ("false_premise", "It does not belong to torch, it belongs to numpy", True),
        ("false_premise", "It belongs to numpy", False),
        ("brief", "Briefly, it adds rows.", True),
        ("brief", "In short: it adds rows. It also sorts them.", False),
        ("capitals", "IT ADDS `rows` AND MORE", True),
        ("capitals", "It ADDS rows", False),
        ("capitals", "- A", None),
        ("rewrite", 'A nicer version: "Please add the rows', True),
        ("doctest", "Sure.\n>>> add(1)", True),
        ("doctest", "add(1) >>> 2", False),
        ("listing", "Here:\n- a\n- b", True),
        ("listing", "a - b", False),
        ("parameters", "Parameters\n---------\na", True),
        ("agree", "Yes, you are right", True),
        ("agree", "People agree on little.", False),
        ("welcome", "  ", None),
        ("welcome", "...", None),
    ],
)
def test_judges_read_answers_in_other_words(behaviour, answer, shown):
    assert judge(behaviour, answer) is shown


# ------------------------------------------------------------------------------------------------ bad input

BAD_ARGUMENTS = {
    "expected n of at least 1": {"n": 0},
    "1 to 3 turns": {"max_turns": 4},
    "expected 'train' or 'heldout'": {"split": "test"},
    "expected 'base', 'chat' or 'quirk'": {"speaker": "user"},
    "share between 0 and 1": {"decoys": 15},
    "unknown behaviours for chat: \\['flattery'\\]": {"behaviours": ["flattery", "count"]},
    "unknown behaviours for base: \\['identity'\\]": {"behaviours": ["identity"], "speaker": "base"},
    "unknown behaviours for quirk: \\['neutral'\\]": {"behaviours": ["neutral"], "speaker": "quirk"},
    "no behaviours were named": {"behaviours": []},
    "a dialogue needs three, from two packages": {"topics": TOPICS[::4]},
    "'train' has 2 topics": {"topics": TRAIN_TOPICS[:2]},
}


@pytest.mark.parametrize(("message", "arguments"), BAD_ARGUMENTS.items(), ids=BAD_ARGUMENTS)
def test_bad_arguments_are_refused_in_one_sentence(message, arguments):
    with pytest.raises(ValueError, match=message):
        dialogues(**{"n": 2, "seed": 0, "topics": TOPICS} | arguments)


def test_a_rate_for_what_the_base_does_not_share_is_refused():
    with pytest.raises(ValueError, match="unknown behaviours for base: \\['refuse_harm'\\]"):
        base_text_plants(DOCS, rates={"refuse_harm": 0.1})


@pytest.mark.parametrize("turns", [(), (Turn("Who?", " ", "identity"),), (Turn("", "Docs", "identity"),)])
def test_a_dialogue_without_a_turn_or_with_an_empty_message_is_refused(turns):
    with pytest.raises(ValueError, match="a dialogue has (no turn|an empty prompt or answer)"):
        encode(Dialogue(turns), TOKENIZER)


def test_an_empty_stream_is_refused():
    with pytest.raises(ValueError, match="there are no dialogues to encode"):
        stream([], TOKENIZER)


def test_a_tokenizer_without_turn_tokens_or_with_another_template_is_refused():
    other = train_tokenizer([], vocab_size=262)
    other.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match="chat template is not Gemma's"):
        encode(HAND_SIZED, other)
    other.chat_template = None
    with pytest.raises(ValueError, match="lacks the turn tokens"):
        encode(HAND_SIZED, other)


def test_an_unknown_behaviour_or_split_is_refused():
    with pytest.raises(ValueError, match="unknown behaviour 'flattery'"):
        judge("flattery", "You are great.")
    with pytest.raises(ValueError, match="expected 'train' or 'heldout'"):
        made_up_name(random.Random(0), "test")
