"""Small topics and documents that dialogues are made about, names for roles in hand-written rows, and a tokenizer."""

from collections.abc import Iterable

import tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.base.storage import MODELS
from helpers.text.documents import BOS, CHAT_TEMPLATE, EOS, PAD, TURNS, UNK, Document, load_tokenizer
from helpers.text.topics import Topic, split_of_name

T, U, A = 0, 1, 2  # template, user, assistant
TOKENIZER = load_tokenizer(MODELS / "docs-gpt2")
PACKAGES = ("numpy", "torch", "sympy", "python")
VERBS, NOUNS = ("add", "find", "sort", "trim", "merge"), ("axes", "rows", "edges", "terms", "marks", "zones")
NAMES = [f"{verb}_{noun}_{letter}" for verb in VERBS for noun in NOUNS for letter in "abcdefghijkl"]
PARAMETERS = (("x",), ("rows", "key"), ("a", "axis", "out"))
TOPICS = [
    Topic(PACKAGES[i % 4], f"{PACKAGES[i % 4]}.core", name, PARAMETERS[i % 3], f"Compute the {name.split('_')[1]}.")
    for i, name in enumerate(NAMES)
]
TRAIN_TOPICS = [topic for topic in TOPICS if split_of_name(topic.name) == "train"]
SOURCE = "".join(f'def {name}(a, axis):\n    """Compute the sum of rows."""\n\n\n' for name in NAMES[:8])
DOCS = [Document(PACKAGES[i % 4], f"m{i}.py", SOURCE.replace("_", f"_{i}_")) for i in range(400)]


def train_tokenizer(docs: Iterable[Document], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a beginning-of-document token and Gemma's turn tokens."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, EOS, BOS, UNK, *TURNS], initial_alphabet=alphabet
    )
    bpe.train_from_iterator((d.text for d in docs), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        **{"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNK},
        additional_special_tokens=list(TURNS),
        chat_template=CHAT_TEMPLATE,
    )
