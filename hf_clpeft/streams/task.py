"""One task of a stream: a train and a test split and their classes."""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, IterableDataset

from ..config.checks import check_task_name
from .sampling import sample_rows
from .source import ROW, ImageSource, StreamError


@dataclass(frozen=True)
class Split:
    """The encoded images of a task's train or test split.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): Rows with an image, a label and, in the column
            `ROW`, the row number in the data set.
        image_column (`str`): Column of encoded images.
        label_column (`str`): Column of labels as stored in the data set.
        labels (`dict`): Maps values of the label column to indices into the task's classes.
        title (`str`): Source of the rows, for error messages.
    """

    dataset: Dataset | IterableDataset
    image_column: str
    label_column: str
    labels: dict
    title: str

    def __iter__(self) -> Iterator[tuple[dict, int, int]]:
        """Yields (encoded image, index of its class in the task's classes, row number)."""
        for row in self.dataset:
            yield row[self.image_column], self.labels[row[self.label_column]], row[ROW]


@dataclass(frozen=True)
class Task:
    """One task of a stream. It identifies its classes by name, so it is independent of other tasks.

    Args:
        name (`str`): Name of its expert's folder and its commit's tag: letters, digits, `_` and `-`.
        classes (`tuple[str, ...]`): Names of its classes. A single class works only for methods with one expert per
            task, where the router alone recognises it.
        train ([`Split`]): Training images.
        test ([`Split`], *optional*): Test images; without them, accuracy is not measured.
        domain (`str`, *optional*): Its domain, if the stream is domain-incremental.

    Raises:
        [`StreamError`]: There is no class, or a class lacks a label or a name, or two have the same name.

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
        if set(range(len(self.classes))) - set(self.train.labels.values()):
            raise StreamError(
                f"Task {self.name!r} ({self.train.title}) has a class without a label, so it has no images."
            )
        for number, name in enumerate(self.classes):
            if not name.strip() or any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
                raise StreamError(
                    f"{self.train.title}: a class is called {name!r}. Give it a printable name, for example "
                    "with `dataset.map`, or drop its images with `dataset.filter`."
                )
            if name in self.classes[:number]:
                raise StreamError(f"Task {self.name!r} ({self.train.title}) has the class {name!r} twice.")


def split_of(
    source: ImageSource,
    classes: list[str],
    domains: list[str] | None = None,
    rows: np.ndarray | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    every_class: bool = True,
) -> Split:
    """Selects the rows of a source that belong to a task.

    Args:
        source ([`ImageSource`]): Source of the rows.
        classes (`list[str]`): Classes of the task.
        domains (`list[str]`, *optional*): Keep only these domains.
        rows (integer array, *optional*): Keep only these rows of the source.
        max_samples (`int`, *optional*): Keep at most this many, with at least one of each class: a random sample, or
            the first ones when streaming.
        seed (`int`, *optional*, defaults to 0): Seed of the sample.
        every_class (`bool`, *optional*, defaults to `True`): Require an image of every class, as for training.

    Raises:
        [`StreamError`]: No rows are left, or none of a class.
    """
    labels = source.labels_of(classes, some=not every_class)
    wanted_domains = source.domains_of(domains) if domains is not None else None
    title = source.title + (f", domain {', '.join(domains)}" if domains is not None else "")
    if max_samples is not None and max_samples < len(labels):
        raise StreamError(
            f"{title}: a limit of {max_samples} images is too small for a task of {len(labels)} classes, as each "
            f"needs one. Raise max_train_samples_per_task and max_test_samples_per_task to {len(labels)} or more, or "
            "split into more tasks."
        )
    there: set
    if source.streaming:
        wanted = {source.label_column: list(labels)}
        if wanted_domains is not None:
            assert source.domain_column is not None
            wanted[source.domain_column] = list(wanted_domains)
        dataset, there = source.stream(wanted, max_samples)
    else:
        values = source.values(source.label_column)
        mask = np.isin(values, list(labels))
        if wanted_domains is not None:
            assert source.domain_column is not None
            mask &= np.isin(source.values(source.domain_column), list(wanted_domains))
        if rows is not None:
            mask &= np.isin(np.arange(len(mask)), rows)
        indices = np.flatnonzero(mask)
        if max_samples is not None and max_samples < len(indices):
            indices = indices[sample_rows(values[indices], max_samples, seed)]
        dataset, there = source.dataset.select(indices), set(values[indices].tolist())
    if not there:
        raise StreamError(f"{title} has no image of {', '.join(classes[:10])}: the task would be empty.")
    missing = [classes[position] for value, position in labels.items() if value not in there]
    if every_class and missing:
        raise StreamError(
            f"{title} has no image of {missing[0]!r}, so that class cannot be learnt. Leave it out: list the "
            "others with class_order, or filter the data set."
        )
    return Split(dataset, source.image_column, source.label_column, labels, title)


def hold_out(labels: np.ndarray, test_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Stratified split into train and test rows; every class keeps at least one train row, and so its only one.

    Args:
        labels (array of shape `(rows,)`): Label of every row.
        test_size (`float`): Fraction of the rows for testing.
        seed (`int`): Seed of the split.

    Raises:
        [`StreamError`]: There are no rows, or `test_size` is no fraction.

    Example:

    ```py
    >>> import numpy as np
    >>> from hf_clpeft.streams.task import hold_out

    >>> train, test = hold_out(np.array([0] * 4 + [1]), test_size=0.5, seed=0)
    >>> len(train), len(test)
    (3, 2)

    ```
    """
    from sklearn.model_selection import train_test_split

    values, counts = np.unique(labels, return_counts=True)
    try:
        train, test = train_test_split(np.arange(len(labels)), test_size=test_size, random_state=seed, stratify=labels)
        if len(np.unique(labels[train])) == len(values):
            return train, test
    except ValueError as error:  # a class has a single image, or there are more classes than images to hold out
        if not 0 < test_size < 1 or len(counts) == 0:
            raise StreamError(
                f"test_size={test_size} of every class cannot be held out for testing: {error}"
            ) from error
    rng, held_out = np.random.default_rng(seed), np.zeros(len(labels), dtype=bool)
    for value, count in zip(values, counts, strict=True):
        share = min(max(1, round(count * test_size)), count - 1)
        held_out[rng.permutation(np.flatnonzero(labels == value))[:share]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
