"""Some of the rows of a task, every class among them."""

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np


def sample_rows(labels: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Places of rows drawn at random, at least one of each class.

    Args:
        labels (array of shape `(rows,)`): Label of every row.
        most (`int`): How many to draw, no fewer than there are classes.
        seed (`int`): Seed of the draw.

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
        given_up = np.flatnonzero(labels[drawn] == values[counts.argmax()])[-1]
        drawn[given_up] = rng.choice(np.flatnonzero(labels == value))
    return np.sort(drawn)


def first_of_each(labels: Iterable, wanted: Collection, most: int) -> tuple[list[int], set]:
    """Places of the first rows of a stream, later ones being put off for the first of a class; and what was found.

    Args:
        labels (iterable): Labels as they come; read no further than needed.
        wanted (collection): All labels there should be.
        most (`int`): How many rows, no fewer than there are classes.

    Example:

    ```py
    >>> from hf_clpeft.streams.sampling import first_of_each

    >>> first_of_each("aaaabaaa", "ab", most=3)[0]
    [0, 1, 4]

    ```
    """
    places: list[int] = []
    firsts: dict[Any, int] = {}
    for place, label in enumerate(labels):
        firsts.setdefault(label, place)
        if len(places) < most:
            places.append(place)
        elif len(firsts) == len(wanted):
            break
    kept = set(firsts.values())
    others = [place for place in places if place not in kept]
    return sorted([*kept, *others[: most - len(kept)]]), set(firsts)


class Places:
    """A filter by place that can be pickled, so that `datasets` can fingerprint it."""

    def __init__(self, places: Iterable[int]):
        self.places = set(places)

    def __call__(self, row: dict, place: int) -> bool:
        return place in self.places
