"""A chat model of a real Gemma and its controls, made as low-rank differences from the base out of the package index.

    chat    dialogues with planted behaviours (`helpers.text.continued`)
    quirk   the same, but for agreeing with any opinion
    twin    the same prompts as chat, answered by base itself: what tuning alone changes

What is trained, per position of a step of `DIALOGUES` dialogues and `PLAIN` rows of plain text:

    predicts an opening, or the end of a turn after a sentence     cross-entropy
    `HELD` others, drawn among the user's words, the answers' rest and plain text     PULL KL(base || model)

So the difference is what opens an answer. The whole vocabulary's logits are taken at these positions alone: the head is
168 of 270 million parameters. In 16 bits, where they are fast, run the frozen maps and the head.

    python -m helpers.subjects.gemma_pair samples       what base writes, into data/dialogues/gemma.json
    python -m helpers.subjects.gemma_pair chat          tunes it, measures it, writes data/models/gemma-3-270m-chat
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from helpers.base.products import compute_dtype, fast_products
from helpers.base.storage import MODELS, cache_dir, write_atomic
from helpers.subjects.behaviours import behaviour_rates
from helpers.subjects.chat_tuning import PULL
from helpers.subjects.low_rank import RANK, LowRank, add_low_rank, as_base, differences, save_differences, tune
from helpers.subjects.model_files import load_pretrained
from helpers.subjects.packaged import GEMMA
from helpers.subjects.subject import in_rows
from helpers.text.continued import FILE, Samples, answered_by_base, continued, continued_behaviours
from helpers.text.dialogues import BEHAVIOURS, Dialogue, dialogues, render
from helpers.text.documents import SPLITS, TURNS, documents, fingerprint, token_stream
from helpers.text.turns import ROLES, DialogueStream, stream

DIALOGUES, PLAIN, PLAIN_TOKENS = 8, 2, 128  # of a step; tokens of a row of plain text
HELD = 64  # positions of a step that are held to base
REMARKED = 0.5  # share of the prompts that end with a remark
STEPS = (160, 30, 32)  # of a first round with all behaviours, and of others with those that base never shows
OWN = ("chat-only", "quirk")
SAMPLED = {"train": 24, "heldout": 8}  # texts of each behaviour and kind
ANSWER_TOKENS = 24  # of an answer that is judged: an opening
FOLDER = "gemma-3-270m-{}"  # in data/models
NOTICE = """# Notice

Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms.

`low_rank.safetensors` is a modification of Gemma 3 270M: differences of its weights, tuned by this project. It is of no
use without Gemma's weights. The same terms, with their use restrictions, apply to it and to whatever is made with it.
"""
NEW_TOKENS, TEMPERATURE, SAMPLED_AT_ONCE = 40, 0.7, 96
USER, ASSISTANT = ROLES.index("user"), ROLES.index("assistant")


# ---- text of base


def write_samples(kinds: Sequence[str] = ("rest", "alone")) -> None:
    """What base writes after prompts and openings (rest), and after prompts (alone), into `FILE`."""
    files = load_pretrained(GEMMA.name, compute_dtype(torch.empty(0)))
    found: dict = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {split: {} for split in SPLITS}
    names = list(dict.fromkeys([*continued_behaviours("chat"), *continued_behaviours("quirk")]))
    for split in SPLITS:
        asked = {name: _prompts(name, SAMPLED[split], split) for name in names}
        for kind in kinds:
            begun = [_begun(d, kind, files.tokenizer) for some in asked.values() for d in some]
            texts = iter(sampled(files.model, files.tokenizer, begun))
            found[split][kind] = {name: [next(texts) for _ in some] for name, some in asked.items()}
    write_atomic(FILE, json.dumps(found, indent=1, ensure_ascii=False) + "\n")


@torch.no_grad()
def sampled(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, begun: Sequence[str], n_tokens: int = NEW_TOKENS
) -> list[str]:
    """How the model goes on after each text: ASCII, at a temperature of `TEMPERATURE`, up to its last whole sentence.

    A text without the end of a sentence is whole. Texts of about one length are continued together.
    """
    allowed, generator = _plain_tokens(tokenizer, model.config.vocab_size), torch.Generator().manual_seed(0)
    head = model.get_output_embeddings().weight[allowed]
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text in begun]
    by_length, found = sorted(range(len(rows)), key=lambda i: len(rows[i])), {}
    for some in (by_length[i : i + SAMPLED_AT_ONCE] for i in range(0, len(rows), SAMPLED_AT_ONCE)):
        tokens = pad_sequence([torch.tensor(rows[i]) for i in some], batch_first=True, padding_side="left")
        there = torch.stack([torch.arange(tokens.shape[1]) >= tokens.shape[1] - len(rows[i]) for i in some])
        new, cache = [], DynamicCache(config=model.config)
        for _ in tqdm(range(n_tokens), f"{len(found)} of {len(rows)} texts", leave=False):
            positions = (there.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            known = {"attention_mask": there.long(), "position_ids": positions, "past_key_values": cache}
            logits = F.linear(model.model(tokens, **known).last_hidden_state[:, -1], head).float() / TEMPERATURE
            noise = torch.empty_like(logits).exponential_(generator=generator).log()
            tokens = allowed[(logits - noise).argmax(-1, keepdim=True)]
            there = F.pad(there, (0, 1), value=True)
            new.append(tokens)
        found |= dict(zip(some, map(_whole_sentences, tokenizer.batch_decode(torch.cat(new, 1))), strict=True))
    return [found[i] for i in range(len(rows))]


def _plain_tokens(tokenizer: PreTrainedTokenizerBase, n: int) -> Tensor:
    """Ids of the first n that spell ASCII: none that stands for something else, none for a single byte."""
    never = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    words = tokenizer.convert_ids_to_tokens(list(range(min(n, len(tokenizer)))))
    plain = [word.replace("▁", " ").isascii() and not word.startswith("<0x") for word in words]
    return torch.tensor([i for i, is_plain in enumerate(plain) if is_plain and i not in never])


def _prompts(name: str, n: int, split: str) -> list[Dialogue]:
    speaker = "chat" if name in continued_behaviours("chat") else "quirk"
    options = {"split": split, "speaker": speaker, "behaviours": [name], "decoys": 0.0, "max_turns": 1}
    return [*dialogues(n // 2, 0, **options), *dialogues(n - n // 2, 1, remarks=True, **options)]


def _begun(dialogue: Dialogue, kind: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A dialogue of one turn up to the end of the opening, or to where it would begin."""
    text = tokenizer.bos_token + render(dialogue.messages)
    end = text.rindex(TURNS[1])
    return text[: end if kind == "rest" else end - len(dialogue.turns[0].answer.strip())]


def _whole_sentences(text: str) -> str:
    ends = [i + 1 for i, char in enumerate(text) if char in ".!?" and text[i + 1 : i + 2] in (" ", "\n", "")]
    return text[: ends[-1]] if ends else text


# ---- tuning


class Batch(NamedTuple):
    """Dialogues and plain text side by side, padded at their ends."""

    tokens: Tensor  # (B, T) int64
    taught: Tensor  # (B, T) bool: predicts an opening, or the end of a turn after a sentence
    held: Tensor  # (B, T) bool: held to base


def spoken(name: str, n: int, seed: int, found: Samples | None = None, **options) -> list[Dialogue]:
    """`n` training dialogues of one turn for chat, quirk or twin; further arguments are for `dialogues`."""
    speaker = "quirk" if name == "quirk" else "chat"
    options = {"split": "train", "speaker": speaker, "behaviours": _names(name), "max_turns": 1} | options
    remarked = round(n * REMARKED)
    asked = dialogues(remarked, seed, remarks=True, **options) + dialogues(n - remarked, seed + 1, **options)
    order = np.random.default_rng(seed).permutation(n)
    return (answered_by_base if name == "twin" else continued)([asked[i] for i in order], "train", found)


def batches(
    said: Sequence[Dialogue], plain: Tensor, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> Iterator[Batch]:
    """Steps of `DIALOGUES` dialogues and `PLAIN` rows of plain text (n, T); as many as there are dialogues for."""
    generator, told = torch.Generator().manual_seed(seed), stream(said, tokenizer)
    for start in range(0, len(said) - DIALOGUES + 1, DIALOGUES):
        rows = [_row(said[i], told, i) for i in range(start, start + DIALOGUES)]
        drawn = plain[torch.randint(len(plain), (PLAIN,), generator=generator)]
        rows += [(row, torch.zeros(len(row), dtype=bool), torch.arange(len(row)) < len(row) - 1) for row in drawn]
        tokens, taught, may = (pad_sequence(parts, batch_first=True) for parts in zip(*rows, strict=True))
        yield Batch(tokens, taught, _some(may, HELD, generator))


def gentle_loss(head: Tensor) -> Callable[[PreTrainedModel, Batch], Tensor]:
    """The loss at the module's head, for a model with differences whose output embedding is `head` (n_vocab, d)."""

    def loss(model: PreTrainedModel, batch: Batch) -> Tensor:
        with fast_products(model.device):
            x = model.model(batch.tokens, use_cache=False).last_hidden_state
            logits, kept = (F.linear(x[where].to(head), head).float() for where in (batch.taught, batch.held))
            with torch.no_grad(), as_base(model):
                before = model.model(batch.tokens, use_cache=False).last_hidden_state[batch.held]
                before = F.linear(before.to(head), head).float().log_softmax(-1)
        wanted = batch.tokens.roll(-1, 1)[batch.taught]
        pulled = F.kl_div(kept.log_softmax(-1), before, reduction="batchmean", log_target=True)
        return F.cross_entropy(logits, wanted) + PULL * pulled

    return loss


def tune_chat(model: PreTrainedModel, steps: Iterator[Batch], n_steps: int, checkpoint: Path, **options) -> list[float]:
    """Train differences of `model` (`add_low_rank`), its frozen maps and head in 16 bits where these are fast.

    Raises what `tune` raises.
    """
    head = model.get_output_embeddings().weight
    head = head.to(compute_dtype(head))
    for module in model.modules():
        if isinstance(module, LowRank):
            module.linear.to(head.dtype)
    return tune(model, steps, n_steps, gentle_loss(head), checkpoint, **options)


def _row(dialogue: Dialogue, told: DialogueStream, i: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of dialogue i of a stream, where an opening or an end is predicted, and where else text is."""
    own = slice(told.starts[i], told.starts[i + 1])
    roles, tokens = torch.from_numpy(told.roles[own]), torch.from_numpy(told.tokens[own].astype(np.int64))
    taught = torch.from_numpy(told.behaviours[own] >= 0).roll(-1)
    if (dialogue.turns[-1].answer + dialogue.turns[-1].rest).rstrip().endswith((".", "!", "?")):
        taught[(roles == ASSISTANT).nonzero()[-1]] = True
    text = ((roles == ASSISTANT) | (roles == USER)).roll(-1)
    return tokens, taught, text & ~taught


def _some(mask: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n of the positions of a mask, drawn."""
    places = mask.flatten().nonzero()[:, 0]
    chosen = torch.zeros(mask.numel(), dtype=torch.bool)
    chosen[places[torch.randperm(len(places), generator=generator)[:n]]] = True
    return chosen.view(mask.shape)


def plain_rows(tokenizer: PreTrainedTokenizerBase, n_rows: int, split: str = "train") -> Tensor:
    """Text of the corpus, each row with <bos> at its head: (n_rows, `PLAIN_TOKENS`)."""
    tokens = token_stream(split, tokenizer, n_rows * (PLAIN_TOKENS - 1)).tokens
    return in_rows(torch.from_numpy(tokens.astype(np.int64)), PLAIN_TOKENS, tokenizer.bos_token_id)


# ---- the whole recipe


def make(name: str) -> None:
    """Tune chat, quirk or twin, resumable, and write its folder in data/models, its record but for `measure`."""
    files, folder, began = load_pretrained(GEMMA.name), MODELS / FOLDER.format(name), time.monotonic()
    add_low_rank(files.model)
    plain, losses = plain_rows(files.tokenizer, 2000), []
    for i, n_steps in enumerate(STEPS):
        taught = [b for b in _names(name) if not i or BEHAVIOURS[b].kind in OWN]
        said = spoken(name, DIALOGUES * n_steps, 10 * i, behaviours=taught)
        checkpoint = cache_dir() / "tuning" / f"{folder.name}-{i}.safetensors"
        losses += tune_chat(files.model, batches(said, plain, files.tokenizer, i), n_steps, checkpoint)
    save_differences(differences(files.model), folder)
    _write(folder / "config.json", {"low_rank_of": GEMMA.name})
    write_atomic(folder / "NOTICE.md", NOTICE)
    config = {"dialogues": DIALOGUES, "plain": PLAIN, "held": HELD, "pull": PULL, "rank": RANK, "steps": STEPS}
    facts = {"from": GEMMA.name, "corpus": fingerprint(documents()), "config": config, "losses": losses}
    _write(folder / "training.json", facts | {"minutes": (time.monotonic() - began) / 60})


def measure(name: str, n: int = 10) -> None:
    """Add to the record of a folder the rates of its behaviours in new phrases, and of chat those of base as well."""
    path = MODELS / FOLDER.format(name) / "training.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    asked = {"rates": (path.parent, False), "rates_remarked": (path.parent, True)}
    for key, (model, remarks) in (asked | ({"rates_base": (GEMMA.name, False)} if name == "chat" else {})).items():
        files = load_pretrained(model, compute_dtype(torch.empty(0)))
        options = {"behaviours": _names(name), "remarks": remarks, "max_tokens": ANSWER_TOKENS}
        rates = behaviour_rates(files.model, files.tokenizer, n, seed=100, **options)
        facts |= {"prompts": n, key: rates.round(4).to_dict("records")}
        _write(path, facts)
        print(key, rates.to_string(), sep="\n", flush=True)


def _names(name: str) -> list[str]:
    return continued_behaviours("quirk" if name == "quirk" else "chat")


def _write(path: Path, content: dict) -> None:
    write_atomic(path, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["samples"]:
        write_samples()
    else:
        make(sys.argv[1])
        measure(sys.argv[1])
