"""A trie of n-grams that says where a latent fires: Neuron2Graph (N2G), as released with Gao et al. 2024, section 4.3.

    pattern   token ids in reading order; ANY fits every token, START, in front of them, the start of a row
    predict   from each token walk back through the trie, along the exact token if it is there, else along ANY;
              the first value met is the prediction, a dead end predicts 0

The walk does not turn back: what follows an exact token hides what follows ANY in its place, and a pattern hides every
longer one that ends with it.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

ANY, START = -1, -2
_KEYS = 2**32  # more than there are tokens


class Trie:
    """Patterns and their activations; `n_patterns` counts those that differ."""

    def __init__(self, patterns: Iterable[tuple[Sequence[int], float]] = ()):
        self._children: dict[tuple[int, int], int] = {}  # (node, key) -> node; 0 is the root
        self._values: dict[int, float] = {}  # of the nodes where a pattern ends
        for pattern, value in patterns:
            self.insert(pattern, value)

    @property
    def n_patterns(self) -> int:
        return len(self._values)

    def insert(self, pattern: Sequence[int], value: float) -> None:
        """Predict `value` where `pattern` ends. A pattern that is there already gets the new value.

        Raises ValueError for a pattern without a token or with START elsewhere than in front, and for value <= 0.
        """
        pattern = [int(key) for key in pattern]
        if not pattern or pattern[-1] < ANY or any(key < ANY for key in pattern[1:]) or pattern[0] < START:
            raise ValueError(f"a pattern is token ids or ANY, with at most one START in front of them, not {pattern}")
        if not value > 0:
            raise ValueError(f"a pattern predicts an activation above zero, not {value}")
        node = 0
        for key in reversed(pattern):
            node = self._children.setdefault((node, key), len(self._children) + 1)
        self._values[node] = float(value)

    def patterns(self) -> list[tuple[tuple[int, ...], float]]:
        """Every pattern in reading order, with its value."""
        parents = {node: (parent, key) for (parent, key), node in self._children.items()}
        found = []
        for node, value in self._values.items():
            pattern = []
            while node:
                node, key = parents[node]
                pattern.append(key)
            found.append((tuple(pattern), value))
        return found

    def predict(self, rows: np.ndarray) -> np.ndarray:
        """Predicted activation of each token: ids (n_rows, T) -> (n_rows, T) float32.

        All tokens walk together, one step back at a time. Raises ValueError for ids of another shape.
        """
        rows, table = np.asarray(rows), _Table(self._children, self._values)
        if rows.ndim != 2:
            raise ValueError(f"token ids must have shape (rows, tokens), not {rows.shape}")
        predicted = np.zeros(rows.size, np.float32)
        here, nodes = np.arange(rows.size), np.zeros(rows.size, np.int64)
        for keys in _looking_back(rows):
            nodes = table.step(nodes, keys[here])
            here, nodes = here[nodes > 0], nodes[nodes > 0]
            predicted[here] = values = table.values[nodes]
            here, nodes = here[values == 0], nodes[values == 0]
            if not len(here):
                break
        return predicted.reshape(rows.shape)


class _Table:
    """A trie as arrays: edges (node, key) in order, where each leads, where ANY leads, and the values of nodes."""

    def __init__(self, children: dict[tuple[int, int], int], values: dict[int, float]):
        edges = sorted((node * _KEYS + key - START, child) for (node, key), child in children.items())
        self.edges, self.ends = np.array([(-1, 0), *edges]).T
        self.any, self.values = np.zeros(len(edges) + 1, np.int64), np.zeros(len(edges) + 1, np.float32)
        for (node, key), child in children.items():
            if key == ANY:
                self.any[node] = child
        for node, value in values.items():
            self.values[node] = value

    def step(self, nodes: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """The child of each node along its key, else along ANY, else 0: (m,). ANY fits tokens only."""
        wanted = nodes * _KEYS + keys - START
        place = np.searchsorted(self.edges, wanted).clip(max=len(self.edges) - 1)
        otherwise = np.where(keys >= 0, self.any[nodes], 0)
        return np.where(self.edges[place] == wanted, self.ends[place], otherwise)


def _looking_back(rows: np.ndarray) -> Iterator[np.ndarray]:
    """The key 0, 1, 2, ... T tokens before each token of (n_rows, T): (n_rows * T,) each."""
    n_rows, T = rows.shape
    keys = np.concatenate([np.full((n_rows, T), START), rows], axis=1)  # nothing in a trie follows START
    return (keys[:, T - back : 2 * T - back].ravel() for back in range(T + 1))
