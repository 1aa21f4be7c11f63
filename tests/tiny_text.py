"""Small topics and documents that dialogues are made about, and names for roles in hand-written rows."""

from helpers.base.storage import MODELS
from helpers.text.documents import Document, load_tokenizer
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
