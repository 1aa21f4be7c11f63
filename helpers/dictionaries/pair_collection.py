"""Pairs of models, and the dictionaries that read them (notebooks 09 to 12), trained once and kept in the cache.

    chat           base against the chat model: what the fine-tune changed
    scaled         the same, each model's activations divided by their mean norm over sqrt(d_model)
    longer         base against itself trained on with plain text: what training on changes (embedded subject only)
    self           base against itself: nothing differs
    quirk          chat against itself trained on to agree with any opinion (embedded subject only)
    injected       activations of base, with planted directions on top: the truth is known
    injected-gpt2  the same on the GPT-2 of the first notebooks, which on Gemma 3 are of Gemma 3 as well: not there

All read half plain text and half dialogue, but for the last, which reads plain text. Dialogues are those of the chat
model, for the quirk its own. What one notebook has trained the next one loads. The reference collection sees more
tokens and seeds; what was measured on it is stored.

Crosscoders read both models. An autoencoder reads a view of the pair (`helpers.activations.views`), at equal terms:

    pairs.train("chat", pairs.cells("BatchTopK"))
    pairs.train("chat", pairs.cells("BatchTopK", kind=Cell), view="difference")

Answers are decided at few tokens (`turns.decisive`). A dictionary may read those more often than the others:

    pairs.train("chat", pairs.cells("BatchTopK"), often=OFTEN)
"""

import dataclasses
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from helpers.activations.injected import InjectedPair, Truth
from helpers.activations.stream import ActivationStream, Harvest, harvest_rows
from helpers.activations.views import ViewedStream, view_of
from helpers.base.storage import cache_dir
from helpers.dictionaries.sweeps import Cell, CrosscoderCell, Sweep, sweep
from helpers.subjects.behaviours import planted_behaviours
from helpers.subjects.pair import SubjectPair, half_and_half
from helpers.subjects.subject import Subject, in_rows, load_subject, subject_for, warn_if_other_corpus
from helpers.text.documents import TokenStream, text_for
from helpers.text.turns import TEMPLATE, DialogueStream, Encoded, decisive, dialogue_text_for, dialogues_of

PAIRS = ("chat", "scaled", "longer", "self", "quirk", "injected", "injected-gpt2")
TRAINED_ON = {"longer": "docs-gemma2-longer", "quirk": "docs-gemma2-quirk"}  # which no hub has
WHERE = ("decision", "answer")  # where behaviours are labelled
OFTEN = 10  # times that a token where an answer is decided is read for once of any other, where that is asked for
SCALE_ROWS = 64  # token rows that `scaled` measures norms on


@dataclasses.dataclass(frozen=True)
class PairPlan:
    """Which crosscoders there are by default, and what they read. Amounts are tokens."""

    n: int  # latents
    k: int  # of BatchTopK
    price: float  # of an L1 crosscoder's latent
    tokens: int  # a crosscoder reads
    text: int  # harvested, read again when it is used up
    heldout: int  # to measure on
    context: int = 128
    batch_size: int = 512
    lr: float = 3e-3  # at 1,024 latents, times 1/sqrt(n)


PLANS = {
    "smoke": PairPlan(64, 8, 0.05, 4_000, 6_000, 2_048, context=64, batch_size=256),
    "laptop": PairPlan(1024, 24, 0.05, 300_000, 220_000, 32_768),
    "reference": PairPlan(1024, 24, 0.05, 2_621_440, 800_000, 65_536, batch_size=128, lr=2e-3),  # 20,480 updates
    "long": PairPlan(1024, 24, 0.05, 1_000_000, 800_000, 32_768, batch_size=128, lr=2e-3),  # 7,812, for many of them
    "paper": PairPlan(73_728, 100, 0.041, 2 * 10**8, 10**8, 2 * 10**6, context=1024, batch_size=2048, lr=8.5e-4),
}


class Heldout(NamedTuple):
    """Activations of held-out tokens and what the tokens are: first plain text, then dialogue; or dialogues alone, each
    read from its own beginning."""

    x: torch.Tensor  # (tokens, 2, d_model)
    tokens: np.ndarray  # (tokens,) ids
    roles: np.ndarray  # (tokens,) indices into `turns.ROLES`, -1 for plain text
    behaviours: np.ndarray  # (tokens,) index of the behaviour that an answer's token belongs to, -1 for none
    decisions: np.ndarray  # (tokens,) the same at the last token before the answer
    dialogue: np.ndarray | None = None  # (tokens,) which dialogue, where there is nothing else

    def labels(self, where: str) -> np.ndarray:
        """Behaviours at the end of the "prompt", at the "decision" or over the "answer"; raises ValueError for another
        place."""
        labels = {"prompt": self.prompts, "decision": self.decisions, "answer": self.behaviours}
        if where not in labels:
            raise ValueError(f"behaviours are labelled at the {' and the '.join(labels)}, not at {where!r}")
        return labels[where]

    @property
    def prompts(self) -> np.ndarray:
        """(tokens,) the behaviour of the answer that follows, at the user's <end_of_turn>: the first of the template's
        tokens before an answer, as the decision is the last of them."""
        begins = self.template & ~np.r_[False, self.template[:-1]]
        first = np.maximum.accumulate(np.where(begins, np.arange(len(begins)), 0))
        decided, found = self.decisions >= 0, np.full_like(self.decisions, -1)
        found[first[decided]] = self.decisions[decided]
        return found

    @property
    def template(self) -> np.ndarray:
        """(tokens,) bool."""
        return self.roles == TEMPLATE

    @property
    def first(self) -> np.ndarray:
        """(tokens,) bool: every second dialogue, the half to choose on."""
        return self.dialogue % 2 == 0


class TrainedPairs:
    """The subjects, their activations, and crosscoders trained on them on demand.

    plan      name of one of `PLANS`: a notebook's scale, "reference" or "long"
    subject   a notebook's dial, "embedded" or "hub"
    seeds     of the dictionaries; the first is the data's as well
    """

    def __init__(self, plan: str, subject: str, seeds: Sequence[int]):
        if plan not in PLANS or not len(seeds):
            raise ValueError(f"plan {plan!r}, seeds {list(seeds)}: choose of {', '.join(PLANS)}, and give a seed")
        self.plan, self.subject, self.seeds = PLANS[plan], subject, list(seeds)
        remembered = (self._stream, self._heldout, self._planted, self._text, self._dialogue)
        self._streams, self.heldout, self._planted, self._text, self._dialogue = map(lru_cache(None), remembered)

    @property
    def settings(self) -> dict:
        """The plan, the seeds and the harvest, for a notebook's record."""
        harvest = self._harvest.described(self.base)
        return dataclasses.asdict(self.plan) | {"seeds": self.seeds, "harvest": harvest}

    @cached_property
    def base(self) -> Subject:
        return load_subject(subject_for(self.subject, "gemma2-base"), dtype=self._dtype)

    @cached_property
    def chat(self) -> Subject:
        return load_subject(subject_for(self.subject, "gemma2-chat"), dtype=self._dtype)

    @cached_property
    def pairs(self) -> list[str]:
        """The pairs that this subject has."""
        missing = {"embedded": (), "gemma": (*TRAINED_ON, "injected-gpt2")}.get(self.subject, TRAINED_ON)
        return [name for name in PAIRS if name not in missing]

    def pair(self, name: str) -> SubjectPair:
        """Raises ValueError for a pair that does not exist."""
        known = [pair for pair in self.pairs if not pair.startswith("injected")]
        if name not in known:
            raise ValueError(f"there is no pair of models {name!r}: choose of {', '.join(known)}")
        if name in TRAINED_ON:
            before = self.base if name == "longer" else self.chat
            return SubjectPair(before, load_subject(TRAINED_ON[name], dtype=self._dtype))
        pair = SubjectPair(self.base, self.base if name == "self" else self.chat)
        if name != "scaled":
            return pair
        rows = self._rows("train")
        return pair.scaled(rows[:: max(1, len(rows) // SCALE_ROWS)])

    def cells(
        self,
        method: str,
        sparsity: float | None = None,
        seeds: int | None = None,
        kind: type[Cell] = CrosscoderCell,
        **changes,
    ) -> list[Cell]:
        """A "ReLU" (with an L1 price) or "BatchTopK" for each seed; `changes` are of the kind of cell."""
        plan = self.plan
        usual = {"n_latents": plan.n, "sparsity": plan.price if method == "ReLU" else plan.k, "tokens": plan.tokens}
        given = usual | ({} if sparsity is None else {"sparsity": sparsity}) | changes
        lr = plan.lr * (1024 / given["n_latents"]) ** 0.5
        return [kind(method, seed=seed, **{"lr": lr} | given) for seed in self.seeds[:seeds]]

    def matched_k(self, l0: float) -> int:
        """The k with which BatchTopK is as sparse as an L1 crosscoder of this L0; the plan's where it is within 5 %."""
        reached = min(self.plan.n, max(1, round(l0)))
        return self.plan.k if abs(reached / self.plan.k - 1) < 0.05 else reached

    def stream(self, name: str, often: int = 1) -> ActivationStream | InjectedPair:
        """Shuffled training activations of a pair; its `batches` yield (batch, 2, d_model) or (batch, 2 d_model).

        Each comes once an epoch, but for those at which an answer is decided: they come `often`. Raises ValueError for
        less than once, and for a pair that reads no dialogue.
        """
        return self._streams(name, often)

    def train(self, name: str, cells: list[Cell], view: str | None = None, often: int = 1) -> Sweep:
        """Crosscoders of a pair, or autoencoders of a view of it, measured on its held-out tokens.

        What the cache holds is loaded. Raises ValueError for a view that does not exist, and what `stream` raises.
        """
        stream, x = self.stream(name, often), self.heldout(name).x
        if view is not None:
            stream, x = ViewedStream(stream, view), view_of(x, view)
        return sweep(cells, stream.batches, x, self.plan.tokens, self.folder)

    def truth(self, name: str) -> Truth:
        """What was planted at the held-out tokens of an injected pair."""
        return self._planted(name)[1]

    def dialogues(self, speaker: str = "chat", times: int = 1) -> list[Encoded]:
        """The held-out dialogues, or `times` as many, cut to the context that dictionaries read: to patch in."""
        return dialogues_of(self._dialogue("heldout", speaker, times), self.plan.context)

    def planted_behaviours(self, *kinds: str) -> list[str]:
        """Names of the behaviours of these kinds that the subject's chat models show in new phrases."""
        return planted_behaviours(*kinds, subject=self.subject)

    @property
    def folder(self) -> Path:
        return cache_dir() / "sweeps" / "pairs"

    def _stream(self, name: str, often: int) -> ActivationStream | InjectedPair:
        if often < 1 or (often > 1 and name == "injected-gpt2"):
            raise ValueError(
                f"{name} cannot read its decisions {often} times: take 1, or more for a pair with dialogue"
            )
        if name == "injected-gpt2":
            text = text_for(self.subject, "train", self._gpt2.tokenizer, self.plan.text)
            return InjectedPair(self._activations(self._gpt2, text.tokens), seed=self.seeds[0])
        subject, speaker = self.base if name == "injected" else self.pair(name), _speaker(name)
        times = None if often == 1 else self._times(speaker, often)
        activations = self._activations(subject, self._tokens("train", speaker), times)
        return InjectedPair(activations, seed=self.seeds[0]) if name == "injected" else activations

    def _heldout(self, name: str) -> Heldout:
        """Held-out activations of a pair, with labels but for the injected ones."""
        if name.startswith("injected"):
            x = self._planted(name)[0]
            return Heldout(x, *np.full((4, len(x)), -1))
        pair, rows = self.pair(name), self._rows("heldout", _speaker(name))
        parts = [harvest_rows(pair, some, self._harvest) for some in rows.split(self._harvest.rows)]
        kept = self._harvest.keeps(pair, rows)
        spoken = self._dialogue("heldout", _speaker(name))
        arrays = (spoken.roles, spoken.behaviours, spoken.decisions)
        labels = (array[kept].numpy() for array in (rows, *(self._beside_text(array, -1) for array in arrays)))
        return Heldout(torch.cat(parts).unflatten(1, (2, -1)), *labels)

    def _planted(self, name: str) -> tuple[torch.Tensor, Truth]:
        """Held-out activations of an injected pair (tokens, 2, d_model), and what was planted there."""
        if name == "injected":
            background = self.heldout("self").x[:, 0]
        else:
            text = text_for(self.subject, "heldout", self._gpt2.tokenizer, 2 * self.plan.heldout)
            background = self._activations(self._gpt2, text.tokens).take(self.plan.heldout)
        return self.stream(name).sample(background, seed=0)

    @cached_property
    def _gpt2(self) -> Subject:
        return load_subject(subject_for(self.subject))

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.subject == "hub" else torch.float32

    @property
    def _harvest(self) -> Harvest:
        return Harvest(context=self.plan.context, normalisation="none")

    def _activations(
        self, subject: Subject | SubjectPair, tokens: np.ndarray, times: torch.Tensor | None = None
    ) -> ActivationStream:
        options = {"batch_size": self.plan.batch_size, "seed": 0, "memory_limit_gb": 3, "cache": True, "times": times}
        return ActivationStream(subject, tokens, self._harvest, **options)

    def _text(self, split: str) -> TokenStream:
        text = text_for(self.subject, split, self.base.tokenizer, self._n(split))
        warn_if_other_corpus(self.base, text.corpus)
        return text

    def _dialogue(self, split: str, speaker: str, times: int = 1) -> DialogueStream:
        """In the template of the chat model; a base of the hub has none."""
        options = {"seed": self.seeds[0], "speaker": speaker}
        return dialogue_text_for(self.subject, split, self.chat.tokenizer, times * self._n(split), **options)

    def _n(self, split: str) -> int:
        return self.plan.text if split == "train" else self.plan.heldout

    def _rows(self, split: str, speaker: str = "chat") -> torch.Tensor:
        """(rows, context): the upper half plain text, the lower half dialogue."""
        return self.base.rows(self._tokens(split, speaker).astype(np.int64), self.plan.context)

    def _tokens(self, split: str, speaker: str) -> np.ndarray:
        spoken = self._dialogue(split, speaker).tokens
        own = self.plan.context - (self.base.head is not None)  # tokens of text in a row
        return half_and_half(self._text(split).tokens, spoken, own, self._n(split))

    def _times(self, speaker: str, often: int) -> torch.Tensor:
        """How often each token of the training rows is read, (rows, context)."""
        return self._beside_text(np.where(decisive(self._dialogue("train", speaker).roles), often, 1), 1, "train")

    def _beside_text(self, array: np.ndarray, fill: int, split: str = "heldout") -> torch.Tensor:
        """What is known of each token of dialogue, as rows: (rows, context); `fill` for plain text and heads."""
        spoken = torch.from_numpy(array[: self._tokens(split, "chat").size // 2])
        both = torch.cat([torch.full_like(spoken, fill), spoken])
        return in_rows(both, self.plan.context, None if self.base.head is None else fill)


def _speaker(name: str) -> str:
    """Whose dialogues a pair reads."""
    return "quirk" if name == "quirk" else "chat"
