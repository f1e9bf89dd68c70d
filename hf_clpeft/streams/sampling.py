"""Samples of the rows of a task that contain every class."""

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np


def sample_rows(labels: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Indices of a random sample of rows with at least one of each class, sorted.

    Args:
        labels (array of shape `(rows,)`): Label of every row.
        most (`int`): Size of the sample, at least the number of classes.
        seed (`int`): Seed of the sample.

    Example:

    ```py
    >>> import numpy as np
    >>> from hf_clpeft.streams.sampling import sample_rows

    >>> labels = np.array([0] * 100 + [1])
    >>> labels[sample_rows(labels, most=3, seed=0)].tolist()
    [0, 0, 1]

    ```
    """
    rng = np.random.default_rng(seed)
    drawn = rng.choice(len(labels), most, replace=False)
    for value in np.setdiff1d(labels, labels[drawn]):
        values, counts = np.unique(labels[drawn], return_counts=True)
        replaced = np.flatnonzero(labels[drawn] == values[counts.argmax()])[-1]
        drawn[replaced] = rng.choice(np.flatnonzero(labels == value))
    return np.sort(drawn)


def first_of_each(labels: Iterable, wanted: Collection, most: int) -> tuple[list[int], set]:
    """Indices of the first rows of a stream, with at least one of each class; and the set of labels found.

    Args:
        labels (iterable): Labels in stream order; consumed only as far as needed.
        wanted (collection): Labels to look for.
        most (`int`): Number of rows, at least the number of classes.

    Example:

    ```py
    >>> from hf_clpeft.streams.sampling import first_of_each

    >>> first_of_each("aaaabaaa", "ab", most=3)[0]
    [0, 1, 4]

    ```
    """
    indices: list[int] = []
    firsts: dict[Any, int] = {}
    for index, label in enumerate(labels):
        firsts.setdefault(label, index)
        if len(indices) < most:
            indices.append(index)
        elif len(firsts) == len(wanted):
            break
    kept = set(firsts.values())
    others = [index for index in indices if index not in kept]
    return sorted([*kept, *others[: most - len(kept)]]), set(firsts)


class IndexFilter:
    """A picklable filter by row index, so that `datasets` can fingerprint it."""

    def __init__(self, indices: Iterable[int]):
        self.indices = set(indices)

    def __call__(self, row: dict, index: int) -> bool:
        return index in self.indices
