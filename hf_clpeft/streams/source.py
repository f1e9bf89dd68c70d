"""One split of an image data set, with its columns found, its rows numbered and its labels checked."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.packaged_modules.parquet.parquet import Parquet

from ..errors import HfClpeftError


LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")
TEST_SPLITS = ("test", "validation", "valid", "val")


class StreamError(HfClpeftError, ValueError):
    """Data that cannot become a task. The message names the data set, the split and, where there is one, the row.

    Example:

    ```py
    >>> from hf_clpeft import StreamError, load_benchmark

    >>> try:
    ...     load_benchmark("digits", num_tasks=11)
    ... except StreamError as error:
    ...     print(error)
    data set 'DatasetDict', split 'train': 10 classes cannot make num_tasks=11 tasks; choose 1 to 10.

    ```
    """


class ImageSource:
    """One split of an image data set.

    The images stay encoded; a column `row` remembers where each came from, so that a later error can name it.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): The split.
        name (`str`): What to call the data set in errors.
        split (`str`): What to call the split in errors.
        image_column (`str`, *optional*): Column of type `datasets.Image`. Found when there is exactly one.
        label_column (`str`, *optional*): Column of class labels. Found by its usual names or its type `ClassLabel`.
        domain_column (`str`, *optional*): Column of domains, only for domain-incremental streams.
        reopen (callable, *optional*): Opens the same split with only some `columns`, or only the rows that pass
            `filters`, so that the others are not read; where the files allow it.

    Raises:
        [`StreamError`]: A column cannot be found or has the wrong type, or a row has no label.

    Example:

    ```py
    >>> from datasets import Dataset
    >>> from PIL import Image
    >>> from hf_clpeft.streams import ImageSource

    >>> rows = {"image": [Image.new("RGB", (8, 8))] * 3, "label": ["cat", "dog", "cat"]}
    >>> source = ImageSource(Dataset.from_dict(rows), name="pets", split="train")
    >>> source.class_names
    ['cat', 'dog']

    ```
    """

    def __init__(
        self,
        dataset: Dataset | IterableDataset,
        name: str,
        split: str,
        image_column: str | None = None,
        label_column: str | None = None,
        domain_column: str | None = None,
        reopen: Callable[..., IterableDataset] | None = None,
    ):
        self.title = f"data set {name!r}, split {split!r}"
        self.streaming = isinstance(dataset, IterableDataset)
        features = dataset._resolve_features().features if self.streaming else dataset.features
        self.image_column = self._find_image_column(features, image_column)
        self.label_column = self._find_label_column(features, label_column)
        self.domain_column = domain_column
        if domain_column is not None and domain_column not in features:
            raise StreamError(f"{self.title} has no column {domain_column!r}; its columns are {list(features)}.")
        self.reopen = reopen
        self.dataset = self._narrow(dataset)
        self._label_feature = features[self.label_column]
        self._domain_feature = features[domain_column] if domain_column else None
        self._values: dict[str, np.ndarray] = {}
        self.class_names = self._names(self.label_column, self._label_feature)
        self.domain_names = self._names(domain_column, self._domain_feature) if domain_column else []

    def _narrow(self, dataset: Dataset | IterableDataset, rows: np.ndarray | None = None) -> Dataset | IterableDataset:
        """The columns that are needed, images encoded, rows numbered: one after the other unless it is told how."""
        columns = [self.image_column, self.label_column] + ([self.domain_column] if self.domain_column else [])
        if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
            raise StreamError(
                f"{self.title} has a transform, which would not be seen: apply it with `dataset.map`, or drop it with "
                "`dataset.reset_format()`."
            )
        if isinstance(dataset, IterableDataset) and dataset.features:
            dataset = dataset.decode(False)  # what comes from the Hub is decoded in threads, whatever it is cast to
        dataset = dataset.select_columns(list(dict.fromkeys(columns))).with_format(None)
        dataset = dataset.cast_column(self.image_column, Image(decode=False))
        if self.streaming:
            return dataset.map(_number_row, with_indices=True, fn_kwargs={"rows": rows})
        return dataset.add_column("row", np.arange(len(dataset)))

    def stream(self, wanted: dict[str, list]) -> tuple[IterableDataset, bool]:
        """Rows of a streaming source with one of the wanted values in each of some columns, and whether there are any.

        Parquet files are not read where their statistics say that they have none; of others, every row is looked at.

        Args:
            wanted (`dict[str, list]`): Values by column.
        """
        if self.reopen is None:
            dataset = self.dataset.filter(_Keep({column: set(values) for column, values in wanted.items()}))
            return dataset, any(True for _ in dataset)
        mask = np.logical_and.reduce([np.isin(self.values(column), values) for column, values in wanted.items()])
        filters = [(column, "in", values) for column, values in wanted.items()]
        return self._narrow(self.reopen(filters=filters), np.flatnonzero(mask)), bool(mask.any())

    def _find_image_column(self, features: Features, column: str | None) -> str:
        images = [name for name, feature in features.items() if isinstance(feature, Image)]
        if column is None and len(images) == 1:
            return images[0]
        if column is not None and column in images:
            return column
        if column in features:
            raise StreamError(
                f"{self.title}: column {column!r} is {features[column]}, not images. Cast it with "
                f"`dataset.cast_column({column!r}, datasets.Image())`."
            )
        wanted = f"no column {column!r}" if column else f"{len(images)} image columns"
        raise StreamError(f"{self.title} has {wanted}; set image_column to one of {images or list(features)}.")

    def _find_label_column(self, features: Features, column: str | None) -> str:
        if column is None:
            typed = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
            column = next((name for name in LABEL_NAMES if name in features), typed[0] if len(typed) == 1 else None)
        if column is None or column not in features:
            wanted = f"no column {column!r}" if column else "no column that is clearly the label"
            raise StreamError(f"{self.title} has {wanted}; set label_column to one of {list(features)}.")
        return column

    def values(self, column: str) -> np.ndarray:
        """All values of one column, in row order. A streaming source is read once for it, without decoding images."""
        if column not in self._values:
            dataset = self.dataset if self.reopen is None else self.reopen(columns=[column])
            rows = dataset.select_columns([column])
            values = [row[column] for row in rows] if self.streaming else rows[:][column]
            missing = next((i for i, value in enumerate(values) if value is None or value == -1), None)
            if missing is not None:
                raise StreamError(
                    f"{self.title}, row {missing}: {column!r} is {values[missing]!r}. Every image needs one; drop "
                    f"unlabelled rows with `dataset.filter(lambda row: row[{column!r}] is not None)`."
                )
            self._values[column] = np.asarray(values)
        return self._values[column]

    def _names(self, column: str, feature: Any) -> list[str]:
        if isinstance(feature, ClassLabel):
            return list(feature.names)
        return [str(value) for value in sorted(set(self.values(column).tolist()))]

    def _codes(self, column: str, feature: Any, names: list[str]) -> dict:
        """Value in the column for each of the names: what a filter compares with."""
        if isinstance(feature, ClassLabel):
            return {feature.str2int(name): name for name in names}
        wanted = set(names)
        return {value: str(value) for value in set(self.values(column).tolist()) if str(value) in wanted}

    def labels_of(self, classes: list[str]) -> dict:
        """Maps each value of the label column to the position of its class in `classes`."""
        unknown = [name for name in classes if name not in self.class_names]
        if unknown:
            raise StreamError(f"{self.title} has no class {unknown[0]!r}; its classes are {self.class_names[:20]}.")
        codes = self._codes(self.label_column, self._label_feature, classes)
        return {value: classes.index(name) for value, name in codes.items()}

    def domains_of(self, domains: list[str]) -> set:
        """Values of the domain column that mean one of `domains`."""
        unknown = [name for name in domains if name not in self.domain_names]
        if unknown:
            raise StreamError(f"{self.title} has no domain {unknown[0]!r}; its domains are {self.domain_names}.")
        assert self.domain_column is not None
        return set(self._codes(self.domain_column, self._domain_feature, domains))


def _number_row(row: dict, index: int, rows: np.ndarray | None) -> dict[str, int]:
    return {"row": index if rows is None else int(rows[index])}


class _Keep:
    """A filter that can be pickled, so that `datasets` can fingerprint it."""

    def __init__(self, wanted: dict[str, set]):
        self.wanted = wanted

    def __call__(self, row: dict) -> bool:
        return all(row[column] in values for column, values in self.wanted.items())


def load_source(
    dataset: str | Path | DatasetDict | IterableDatasetDict,
    split: str,
    name: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    **columns: Any,
) -> ImageSource:
    """Opens one split of a data set: a Hub id, a folder of Parquet files, an ImageFolder, or one already loaded.

    Args:
        dataset (`str`, `Path`, `DatasetDict` or `IterableDatasetDict`): Hub id, folder, or loaded data set.
        split (`str`): Name of the split.
        name (`str`, *optional*): Configuration of the data set.
        revision (`str`, *optional*): Commit of the data set's repo.
        streaming (`bool`, *optional*, defaults to `False`): Read rows as they are needed.
        columns: `image_column`, `label_column`, `domain_column`.

    Returns:
        [`ImageSource`]

    Example:

    ```py
    >>> from datasets import Dataset, DatasetDict
    >>> from PIL import Image
    >>> from hf_clpeft.streams.source import load_source

    >>> rows = {"image": [Image.new("RGB", (8, 8))] * 2, "label": [0, 1]}
    >>> load_source(DatasetDict(train=Dataset.from_dict(rows)), "train").title
    "data set 'DatasetDict', split 'train'"

    ```
    """
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        if split not in dataset:
            raise StreamError(f"The data set has no split {split!r}; its splits are {list(dataset)}.")
        return ImageSource(dataset[split], type(dataset).__name__, split, **columns)
    if Path(dataset, "dataset_dict.json").is_file():
        return load_source(load_from_disk(dataset), split, **columns)
    open_split = partial(load_dataset, str(dataset), name, split=split, revision=revision, streaming=streaming)
    try:
        loaded = open_split()
        can_skip = streaming and isinstance(load_dataset_builder(str(dataset), name, revision=revision), Parquet)
    except ValueError as error:
        raise StreamError(f"Data set {str(dataset)!r}, split {split!r} cannot be loaded: {error}") from error
    if Path(dataset).is_dir() and set(loaded.features or ()) == {"image"}:
        loaded = _with_single_class(open_split, dataset)
    return ImageSource(loaded, str(dataset), split, **columns, reopen=open_split if can_skip else None)


def _with_single_class(
    open_split: Callable[..., Dataset | IterableDataset], folder: str | Path
) -> Dataset | IterableDataset:
    """A folder of pictures with one class folder, which `datasets` takes for no class."""
    loaded = open_split(drop_labels=False)
    (label,) = loaded.features["label"].names
    if label in (Path(folder).name, *TEST_SPLITS, "train"):
        raise StreamError(
            f"{folder} holds pictures, but no class: put those of each class into a folder with its name, "
            f"{Path(folder, 'robin', '1.jpg')}."
        )
    return loaded


def find_test_split(
    dataset: str | Path | DatasetDict | IterableDatasetDict, name: str | None = None, revision: str | None = None
) -> str | None:
    """Name of the split to test on, or `None` when the data set has only one.

    Example:

    ```py
    >>> from datasets import Dataset, DatasetDict
    >>> from hf_clpeft.streams.source import find_test_split

    >>> splits = DatasetDict(train=Dataset.from_dict({}), valid=Dataset.from_dict({}))
    >>> find_test_split(splits)
    'valid'

    ```
    """
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        splits = list(dataset)
    elif Path(dataset, "dataset_dict.json").is_file():
        splits = list(load_from_disk(dataset))
    else:
        try:
            splits = list(load_dataset_builder(str(dataset), name, revision=revision).info.splits or ())
            splits = splits or list(load_dataset(str(dataset), name, revision=revision, streaming=True))
        except FileNotFoundError as error:
            raise StreamError(f"{str(dataset)!r} is no folder with pictures, and none on the Hub: {error}") from error
    return next((split for split in TEST_SPLITS if split in splits), None)
