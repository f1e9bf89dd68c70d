"""One step of a stream: the images and classes that a model learns together."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, IterableDataset

from ..checks import check_task_name
from .source import ImageSource, StreamError


@dataclass(frozen=True)
class Split:
    """The encoded images of one side (train or test) of a task.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): Rows with the image, its label and `row`, the
            number of the row in the data set.
        image_column (`str`): Column of encoded images.
        label_column (`str`): Column of labels as the data set has them.
        labels (`dict`): Value in the label column to position in the task's classes.
        title (`str`): Where the rows come from, for errors.
    """

    dataset: Dataset | IterableDataset
    image_column: str
    label_column: str
    labels: dict
    title: str

    def __iter__(self) -> Iterator[tuple[dict, int, int]]:
        """Yields (encoded image, position of its class in the task's classes, row)."""
        for row in self.dataset:
            yield row[self.image_column], self.labels[row[self.label_column]], row["row"]


@dataclass(frozen=True)
class Task:
    """One step of a stream. A task stands for itself: it knows its classes by name, not by number.

    Args:
        name (`str`): Folder of its expert and tag of its commit: letters, digits, `_` and `-`.
        classes (`tuple[str, ...]`): Names of its classes. A single one can be learnt where every task has its own
            expert, which then recognises it by its route alone.
        train ([`Split`]): What is learnt.
        test ([`Split`], *optional*): What it is judged by; without, its accuracy is not measured.
        domain (`str`, *optional*): Its domain, if the stream is domain-incremental.

    Raises:
        [`StreamError`]: No class.

    Example:

    ```py
    >>> from hf_clpeft.streams import load_benchmark

    >>> task = load_benchmark("digits")[0]
    >>> task.name, task.classes
    ('task-000', ('0', '1'))

    ```
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split | None = None
    domain: str | None = None

    def __post_init__(self) -> None:
        check_task_name(self.name)
        if not self.classes:
            raise StreamError(f"Task {self.name!r} ({self.train.title}) has no class. Check label_column.")


def split_of(
    source: ImageSource,
    classes: list[str],
    domains: list[str] | None = None,
    rows: np.ndarray | None = None,
    max_samples: int | None = None,
    seed: int = 0,
) -> Split:
    """The rows of a source that belong to a task.

    Args:
        source ([`ImageSource`]): Where to take them from.
        classes (`list[str]`): Classes of the task.
        domains (`list[str]`, *optional*): Keep only these domains.
        rows (integer array, *optional*): Keep only these rows of the source.
        max_samples (`int`, *optional*): Keep at most so many, drawn with `seed`; the first ones when streaming.
        seed (`int`, *optional*, defaults to 0): Seed of the draw.

    Raises:
        [`StreamError`]: Nothing is left.
    """
    labels = source.labels_of(classes)
    wanted_domains = source.domains_of(domains) if domains is not None else None
    title = source.title + (f", domain {', '.join(domains)}" if domains is not None else "")
    found: int  # how many rows, or whether there are any
    if source.streaming:
        wanted = {source.label_column: list(labels)}
        if wanted_domains is not None:
            assert source.domain_column is not None
            wanted[source.domain_column] = list(wanted_domains)
        dataset, found = source.stream(wanted)
        dataset = dataset if max_samples is None else dataset.take(max_samples)
    else:
        mask = np.isin(source.values(source.label_column), list(labels))
        if wanted_domains is not None:
            assert source.domain_column is not None
            mask &= np.isin(source.values(source.domain_column), list(wanted_domains))
        if rows is not None:
            mask &= np.isin(np.arange(len(mask)), rows)
        indices = np.flatnonzero(mask)
        if max_samples is not None and max_samples < len(indices):
            indices = np.sort(np.random.default_rng(seed).choice(indices, max_samples, replace=False))
        dataset, found = source.dataset.select(indices), len(indices)
    if not found:
        raise StreamError(f"{title} has no image of {', '.join(classes[:10])}: the task would be empty.")
    return Split(dataset, source.image_column, source.label_column, labels, title)
