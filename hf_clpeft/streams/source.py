"""One split of an image data set: detects its columns, numbers its rows and checks its labels."""

import re
from collections.abc import Callable, Iterable
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, LargeList, List, Value

from ..config.errors import HfClpeftError
from .sampling import IndexFilter, first_of_each


IMAGE_NAMES = ("image", "images", "img", "picture", "photo", "url", "image_url")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")
LABEL_TYPES = re.compile("(large_)?string(_view)?|bool|u?int(8|16|32|64)|float(16|32|64)|null")
ROW = "hf_clpeft row"  # column of row numbers, under a name that no data set uses
PEEK_ROWS = 100  # rows of a stream that are checked for labels


class StreamError(HfClpeftError, ValueError):
    """Data that cannot be used for a task. The message names the data set, the split and, if known, the row.

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

    Images stay encoded; the column `ROW` keeps row numbers for error messages.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): The split.
        name (`str`): Name of the data set for error messages.
        split (`str`): Name of the split for error messages.
        image_column (`str`, *optional*): Column of type `datasets.Image`. Detected if there is exactly one.
        label_column (`str`, *optional*): Column of class labels. Detected by common names or the type `ClassLabel`.
        domain_column (`str`, *optional*): Column of domains, only for domain-incremental streams.
        reopen (callable, *optional*): Streams the same split with only some `columns` or the rows that pass
            `filters`; for Parquet files only.

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
        self.image_column = self._find_image_column(features, image_column, dataset)
        self.label_column = self._find_label_column(features, label_column)
        self.domain_column = domain_column
        if domain_column is not None and domain_column not in features:
            raise StreamError(f"{self.title} has no column {domain_column!r}; its columns are {list(features)}.")
        for option, column in (("label_column", self.label_column), ("domain_column", domain_column)):
            if column is not None:
                self._check_type(option, column, features)
        self.reopen = reopen
        self.dataset = self._prepare(dataset)
        self._label_feature = features[self.label_column]
        self._domain_feature = features[domain_column] if domain_column else None
        self._raw: dict[str, list] = {}
        self._values: dict[str, np.ndarray] = {}
        self._check_first_image()

    @cached_property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the data set."""
        return self._names(self.label_column, self._label_feature)

    @cached_property
    def domain_names(self) -> list[str]:
        """Names of the domains, in the order of the data set."""
        return self._names(self.domain_column, self._domain_feature) if self.domain_column else []

    def _prepare(
        self, dataset: Dataset | IterableDataset, rows: np.ndarray | None = None
    ) -> Dataset | IterableDataset:
        """Keeps the columns needed, with encoded images and row numbers: `rows`, or consecutive ones."""
        columns = [self.image_column, self.label_column] + ([self.domain_column] if self.domain_column else [])
        if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
            raise StreamError(
                f"{self.title} has a lazy transform, which would be ignored: apply it with `dataset.map`, or drop it "
                "with `dataset.reset_format()`."
            )
        if isinstance(dataset, IterableDataset) and dataset.features:
            dataset = dataset.decode(False)  # streams from the Hub decode in threads, even after a cast
        dataset = dataset.select_columns(list(dict.fromkeys(columns))).with_format(None)
        dataset = dataset.cast_column(self.image_column, Image(decode=False))
        if self.streaming:
            return dataset.map(_number_row, with_indices=True, fn_kwargs={"rows": rows})
        return dataset.add_column(ROW, np.arange(len(dataset)))

    def stream(self, wanted: dict[str, list], most: int | None = None) -> tuple[IterableDataset, set]:
        """Filters a streaming source by column values; returns the rows and the set of labels found.

        In Parquet files, row groups are skipped by their statistics. Other formats are scanned row by row; without
        `most`, the scan stops at the first match, and all labels are assumed to be present.

        Args:
            wanted (`dict[str, list]`): Accepted values by column.
            most (`int`, *optional*): Take only this many of the first rows, with at least one of each label.
        """
        rows: Iterable
        if self.reopen is None:
            dataset = self.dataset.filter(_ValueFilter({column: set(values) for column, values in wanted.items()}))
            rows = (row[self.label_column] for row in dataset.select_columns([self.label_column]))
        else:
            mask = np.logical_and.reduce([np.isin(self.values(column), values) for column, values in wanted.items()])
            filters = [(column, "in", values) for column, values in wanted.items()]
            dataset = self._prepare(self.reopen(filters=filters), np.flatnonzero(mask))
            rows = self.values(self.label_column)[mask].tolist()
        labels = wanted[self.label_column]
        if self.reopen is None and most is None:
            return dataset, set(labels) if any(True for _ in rows) else set()
        indices, there = first_of_each(rows, labels, len(labels) if most is None else most)
        if most is not None:
            dataset = dataset.filter(IndexFilter(indices), with_indices=True).take(len(indices))
        return dataset, there

    def _find_image_column(self, features: Features, column: str | None, dataset: Dataset | IterableDataset) -> str:
        images = [name for name, feature in features.items() if isinstance(feature, Image)]
        if column is None and len(images) == 1:
            return images[0]
        if column is not None and column in images:
            return column
        if column is None and not images:
            column = next((name for name in features if name.lower() in IMAGE_NAMES), None)
        if column is not None and column in features:
            hint = f"Cast it with `dataset.cast_column({column!r}, datasets.Image())`."
            if not isinstance(features[column], Value):
                hint = "One image per row is needed: create such a column with `dataset.map`, and set image_column."
            hint = _hint_for_text(_first(dataset, column), column) or hint
            raise StreamError(f"{self.title}: column {column!r} is {features[column]}, not images. {hint}")
        wanted = f"no column {column!r}" if column else f"{len(images)} image columns"
        raise StreamError(f"{self.title} has {wanted}; set image_column to one of {images or list(features)}.")

    def _find_label_column(self, features: Features, column: str | None) -> str:
        if column is None:
            typed = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
            column = next((name for name in LABEL_NAMES if name in features), typed[0] if len(typed) == 1 else None)
        if column is None or column not in features:
            wanted = f"no column {column!r}" if column else "no column that is unambiguously the label"
            raise StreamError(f"{self.title} has {wanted}; set label_column to one of {list(features)}.")
        return column

    def _check_type(self, option: str, column: str, features: Features) -> None:
        feature: Any = features[column]
        if isinstance(feature, ClassLabel) or (isinstance(feature, Value) and LABEL_TYPES.fullmatch(feature.dtype)):
            return
        problem, hint = f"is {feature}", "convert it to names or numbers with `dataset.map`"
        if isinstance(feature, dict):
            problem = f"is a struct of {list(feature)}"
            hint = f"flatten it with `dataset.flatten()` and set {option} to '{column}.{next(iter(feature), '')}'"
        elif isinstance(feature, List | LargeList | list):
            problem, hint = "holds a list in every row", "keep one value of each list with `dataset.map`"
        others = [name for name in features if name not in (column, self.image_column)]
        raise StreamError(
            f"{self.title}: {option} {column!r} {problem}, not one name or number per image. Set {option} to "
            f"another column{f' of {others}' if others else ''}, or {hint}."
        )

    def _check_first_image(self) -> None:
        """Rejects text columns cast to `Image` that hold URLs or base64 data rather than paths."""
        first = _first(self.dataset, self.image_column) if self.reopen is None else None
        if isinstance(first, dict) and first.get("bytes") is None and isinstance(first.get("path"), str):
            problem = _hint_for_text(first["path"], self.image_column)
            if problem:
                raise StreamError(f"{self.title}, row 0: column {self.image_column!r} holds no image. {problem}")

    def leave_out(self, positions: Iterable[int]) -> None:
        """Leaves rows out of a source that is not streamed; the others keep their numbers."""
        kept = np.setdiff1d(np.arange(len(self.dataset)), list(positions))
        if len(kept) < len(self.dataset):
            names = self.class_names  # as they were
            self.dataset, self._raw, self._values = self.dataset.select(kept), {}, {}
            self.class_names = names

    def has_labels(self) -> bool:
        """Whether any row (of a stream: any of the first rows) has a label; test labels are often withheld."""
        if self.streaming and self.reopen is None:
            rows = islice(self.dataset.select_columns([self.label_column]), PEEK_ROWS)
            return any(not _is_missing(row[self.label_column]) for row in rows)
        return any(not _is_missing(value) for value in self._read(self.label_column))

    def _read(self, column: str) -> list:
        if column not in self._raw:
            dataset = self.dataset if self.reopen is None else self.reopen(columns=[column])
            rows = dataset.select_columns([column])
            self._raw[column] = [row[column] for row in rows] if self.streaming else rows[:][column]
        return self._raw[column]

    def values(self, column: str) -> np.ndarray:
        """All values of one column, in row order. A stream is read once per column, without decoding images."""
        if column not in self._values:
            values = self._read(column)
            missing = [i for i, value in enumerate(values) if _is_missing(value)]
            if missing:
                value = values[missing[0]]
                test = "is not None" if value is None else ">= 0" if value == -1 else f"== row[{column!r}]"
                raise StreamError(
                    f"{self.title}, row {missing[0]}: {column!r} is {value!r}, a missing label, as in "
                    f"{len(missing)} of {len(values)} rows. Every image needs one; drop unlabelled rows with "
                    f"`dataset.filter(lambda row: row[{column!r}] {test})`, or set label_column."
                )
            self._values[column] = np.asarray(values)
            del self._raw[column]
        return self._values[column]

    def _names(self, column: str, feature: Any) -> list[str]:
        if isinstance(feature, ClassLabel):
            return list(feature.names)
        values = self.values(column)
        if values.dtype.kind == "f" and (fractions := np.flatnonzero(values != np.floor(values))).size:
            raise StreamError(
                f"{self.title}, row {fractions[0]}: {column!r} is {values[fractions[0]]}, a fraction rather than a "
                "class or domain. Choose another column, or convert its values to names with `dataset.map`."
            )
        return [_name_of(value) for value in sorted(set(values.tolist()))]

    def _values_of(self, column: str, feature: Any, names: list[str]) -> dict:
        """Maps the values in the column to those of `names` that they stand for."""
        if isinstance(feature, ClassLabel):
            return {feature.str2int(name): name for name in names}
        wanted = set(names)
        return {value: _name_of(value) for value in set(self.values(column).tolist()) if _name_of(value) in wanted}

    def labels_of(self, classes: list[str], some: bool = False) -> dict:
        """Maps each value of the label column to the position of its class in `classes`.

        Args:
            classes (`list[str]`): Names of classes.
            some (`bool`, *optional*, defaults to `False`): Ignore classes that the data set does not have.
        """
        unknown = [name for name in classes if name not in self.class_names]
        if unknown and not some:
            raise StreamError(f"{self.title} has no class {unknown[0]!r}; its classes are {self.class_names[:20]}.")
        known = [name for name in classes if name not in unknown]
        values = self._values_of(self.label_column, self._label_feature, known)
        return {value: classes.index(name) for value, name in values.items()}

    def present(self) -> list[str]:
        """Classes that have images, in the order of the data set; of a stream other than Parquet, all."""
        if self.streaming and self.reopen is None:
            return self.class_names
        there = set(self.values(self.label_column).tolist())
        labels = self.labels_of(self.class_names)
        return [self.class_names[position] for value, position in sorted(labels.items()) if value in there]

    def domains_of(self, domains: list[str]) -> set:
        """Values of the domain column that stand for one of `domains`."""
        unknown = [name for name in domains if name not in self.domain_names]
        if unknown:
            raise StreamError(f"{self.title} has no domain {unknown[0]!r}; its domains are {self.domain_names}.")
        assert self.domain_column is not None
        return set(self._values_of(self.domain_column, self._domain_feature, domains))


def _number_row(row: dict, index: int, rows: np.ndarray | None) -> dict[str, int]:
    return {ROW: index if rows is None else int(rows[index])}


def _is_missing(value: Any) -> bool:
    """Whether a value is `None`, NaN, or -1, which marks a withheld label."""
    return value is None or value != value or (value == -1 and not isinstance(value, str))


def _name_of(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) else str(value)


def _first(dataset: Dataset | IterableDataset, column: str) -> Any:
    """The first value of a column, or `None`."""
    rows = dataset.select_columns([column])
    return next(iter(rows[:1][column] if isinstance(rows, Dataset) else (row[column] for row in rows)), None)


def _hint_for_text(value: Any, column: str) -> str:
    """How to convert text that is a URL or base64 data; empty if it may be a path."""
    if not isinstance(value, str):
        return ""
    if re.match(r"(https?|ftp|s3|gs)://", value):
        return (
            f"It holds URLs ({value[:60]!r}): download the images first, for example with `dataset.map(lambda "
            f"row: {{{column!r}: requests.get(row[{column!r}]).content}})`, then cast it to datasets.Image()."
        )
    if value.startswith("data:") or re.fullmatch(r"[A-Za-z0-9+/_\s-]{64,}={0,2}\s*", value):
        return (
            f"It holds images as base64 text ({value[:20]!r}...): decode them first, `dataset.map(lambda row: "
            f"{{{column!r}: base64.b64decode(row[{column!r}].split(',')[-1])}})`, then cast it to datasets.Image()."
        )
    return ""


class _ValueFilter:
    """A picklable filter by column values, so that `datasets` can fingerprint it."""

    def __init__(self, wanted: dict[str, set]):
        self.wanted = wanted

    def __call__(self, row: dict) -> bool:
        return all(row[column] in values for column, values in self.wanted.items())
