"""Concatenates splits, without copying images of the same data set."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from .source import ROW, StreamError
from .task import Split


IMAGE, LABEL = "image", "label"  # column names if those of the splits differ
NAMED = 3  # titles listed in an error message


def join_splits(splits: Sequence[Split], classes: Sequence[Sequence[str]], every: Sequence[str]) -> Split:
    """Concatenates splits of several tasks, of one or several data sets.

    Args:
        splits (sequence of [`Split`]): The splits.
        classes (sequence of sequences of `str`): Classes of the task of each split.
        every (sequence of `str`): All classes, in the order of the new task.

    Raises:
        [`StreamError`]: A split is streamed, without random access.

    Example:

    ```py
    >>> from hf_clpeft import load_benchmark
    >>> from hf_clpeft.streams.joining import join_splits

    >>> first, second, *_ = load_benchmark("digits")
    >>> both = join_splits([first.test, second.test], [first.classes, second.classes], ["0", "1", "2", "3"])
    >>> len(both.dataset) == len(first.test.dataset) + len(second.test.dataset)
    True

    ```
    """
    for split in splits:
        if not isinstance(split.dataset, Dataset):
            raise StreamError(f"{split.title} is streamed, and streams cannot be joined. Leave out streaming.")
    titles = list(dict.fromkeys(split.title for split in splits))
    title = "; ".join(titles[:NAMED]) + ("; ..." if len(titles) > NAMED else "")
    number_of = {name: number for number, name in enumerate(every)}
    labels: dict[Any, set[int]] = {}
    for split, names in zip(splits, classes, strict=True):
        for value, position in split.labels.items():
            labels.setdefault(value, set()).add(number_of[names[position]])
    first = splits[0]
    columns = {(split.image_column, split.label_column, repr(split.dataset.features)) for split in splits}
    if len(columns) == 1 and all(len(numbers) == 1 for numbers in labels.values()):
        one = {value: min(numbers) for value, numbers in labels.items()}
        rows = concatenate_datasets([split.dataset for split in splits])
        return Split(rows, first.image_column, first.label_column, one, title)
    # Labels or columns are inconsistent, so rows are relabelled, which copies the encoded images.
    parts = [
        _relabel(split, [number_of[name] for name in names]) for split, names in zip(splits, classes, strict=True)
    ]
    return Split(concatenate_datasets(parts), IMAGE, LABEL, {number: number for number in range(len(every))}, title)


def _relabel(split: Split, numbers: list[int]) -> Dataset:
    """The rows of a split with new class indices as labels."""
    values = split.dataset[split.label_column][:]
    rows = split.dataset.select_columns([split.image_column, ROW])
    if split.image_column != IMAGE:
        rows = rows.rename_column(split.image_column, IMAGE)
    return rows.add_column(LABEL, np.array([numbers[split.labels[value]] for value in values], dtype=np.int64))
