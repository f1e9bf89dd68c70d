"""The train and the test images of a data set, of which tasks are made."""

from pathlib import Path
from typing import Any

import numpy as np

from ..config.text import get_logger
from .locate import AnyDataset, LocatedDataset, locate_dataset
from .readable import leave_out_unreadable
from .source import ImageSource, StreamError
from .task import Task, hold_out, split_of


logger = get_logger(__name__)

MOST_NAMED = 5  # classes


class TrainTest:
    """The train source and the optional test source of a data set, with the limits on images per task."""

    def __init__(
        self,
        train: ImageSource,
        test: ImageSource | None,
        train_rows: np.ndarray | None,
        test_rows: np.ndarray | None,
        max_train: int | None,
        max_test: int | None,
        dataset: AnyDataset,
    ):
        self.train, self.test = train, test
        self.train_rows, self.test_rows = train_rows, test_rows
        self.max_train, self.max_test = max_train, max_test
        self.stream_name = dataset.rstrip("/").split("/")[-1] if isinstance(dataset, str) else "stream"
        self.hub_id = dataset if isinstance(dataset, str) and not Path(dataset).exists() else None

    @classmethod
    def open(
        cls,
        dataset: AnyDataset,
        name: str | None = None,
        revision: str | None = None,
        streaming: bool = False,
        train_split: str | None = None,
        test_split: str | None = None,
        test_size: float = 0.2,
        split_seed: int = 0,
        image_column: str | None = None,
        label_column: str | None = None,
        domain_column: str | None = None,
        max_train_samples_per_task: int | None = None,
        max_test_samples_per_task: int | None = None,
        max_bad_images: int | float | None = None,
    ) -> "TrainTest":
        """Opens the splits; options as for [`TaskStream.domain_incremental`].

        Args:
            max_bad_images (`int` or `float`, *optional*): Open every image first, and leave out up to this many, or
                this share, that cannot be decoded, of both splits together. Default: images are not opened.
        """
        columns = {"image_column": image_column, "label_column": label_column, "domain_column": domain_column}
        located = locate_dataset(dataset, name, revision, [split for split in (train_split, test_split) if split])
        train_split = train_split or "train"
        limits = (max_train_samples_per_task, max_test_samples_per_task)
        train = located.source(train_split, streaming, **columns)
        test: ImageSource | None = None
        if test_split is not None:
            test = located.source(test_split, streaming, **columns)
        else:
            test = _find_test(located, train, streaming, columns)
        if max_bad_images is not None and not train.streaming:
            leave_out_unreadable([train] if test is None else [train, test], max_bad_images)
        if test is None and train.streaming and test_size:
            raise StreamError(
                f"Data set {located.name!r} has no labelled test split, and a stream cannot be split; name "
                f"one of {located.splits} with test_split, or disable testing with test_size=0."
            )
        if test is None:
            if not test_size:
                return cls(train, None, None, None, *limits, dataset)
            train_rows, test_rows = hold_out(train.values(train.label_column), test_size, split_seed)
            _tell_of_single_images(train, train_rows, test_rows)
            if not len(test_rows):
                return cls(train, None, None, None, *limits, dataset)
            return cls(train, train, train_rows, test_rows, *limits, dataset)
        sources = cls(train, test, None, None, *limits, dataset)
        if train_split != test_split:
            sources.check_test_classes()
        return sources

    def check_test_classes(self) -> None:
        """Rejects test classes without training images, which usually mean that the labels do not match."""
        assert self.test is not None
        if self.test.streaming:
            return
        known = set(self.train.present())
        values = self.test.values(self.test.label_column)
        for value, position in self.test.labels_of(self.test.class_names).items():
            name = self.test.class_names[position]
            if name not in known and value in values:
                row = int(np.flatnonzero(values == value)[0])
                raise StreamError(
                    f"{self.test.title}, row {row}: class {name!r} has no image in {self.train.title}, so it cannot "
                    f"be learnt (classes there: {sorted(known)[:5]}). Check label_column and test_split, or filter "
                    "the test split."
                )

    def split_test_rows(self, classes: list[str], domains: list[str], num_tasks: int) -> list[np.ndarray]:
        """Splits the test images of `domains` evenly across the tasks, stratified by class."""
        test: Any = self.test
        if test is None:
            raise StreamError(f"{self.train.title}: test_domains needs test images; leave out test_size=0.")
        labels = test.values(test.label_column)
        inside = np.isin(test.values(test.domain_column), list(test.domains_of(domains)))
        shards: list[list[np.ndarray]] = [[] for _ in range(num_tasks)]
        for value in test.labels_of(classes, some=True):
            rows = np.flatnonzero(inside & (labels == value))
            for i, shard in enumerate(shards):
                shard.append(rows[i::num_tasks])
        return [np.concatenate(shard) for shard in shards]

    def task(
        self,
        index: int,
        classes: list[str],
        domain: str | None = None,
        test_domains: list[str] | None = None,
        test_rows: np.ndarray | None = None,
    ) -> Task:
        own = [domain] if domain is not None else None
        if domain is not None:
            classes = self._present(classes, domain)
        train, test = split_of(self.train, classes, own, self.train_rows, self.max_train, seed=index), None
        test_rows = self.test_rows if test_rows is None else test_rows
        if self.test is not None and (self.test is not self.train or self._held_out(classes)):
            domains = test_domains or own
            test = split_of(self.test, classes, domains, test_rows, self.max_test, seed=index, every_class=False)
        return Task(f"task-{index:03d}", tuple(classes), train, test, domain)

    def _held_out(self, classes: list[str]) -> bool:
        """Whether there are test images of any of these classes; a single image of a class is learnt."""
        values = self.train.values(self.train.label_column)
        values = values if self.test_rows is None else values[self.test_rows]
        return bool(np.isin(values, list(self.train.labels_of(classes))).any())

    def _present(self, classes: list[str], domain: str) -> list[str]:
        """The classes that have training images in a domain."""
        train: Any = self.train
        if train.streaming and train.reopen is None:
            return classes
        inside = np.isin(train.values(train.domain_column), list(train.domains_of([domain])))
        if self.train_rows is not None:
            inside &= np.isin(np.arange(len(inside)), self.train_rows)
        there = set(train.values(train.label_column)[inside].tolist())
        labels = train.labels_of(classes)
        absent = [classes[position] for value, position in labels.items() if value not in there]
        if absent and len(absent) < len(classes):
            logger.warning(
                "%s, domain %s has no image of %s: left out of its task.", train.title, domain, ", ".join(absent[:5])
            )
            return [name for name in classes if name not in absent]
        return classes


def _find_test(located: LocatedDataset, train: ImageSource, streaming: bool, columns: dict) -> ImageSource | None:
    """The first candidate test split that has labels; competitions withhold them."""
    for split in located.test_splits:
        test = located.source(split, streaming, **{**columns, "label_column": train.label_column})
        if test.has_labels():
            return test
        logger.warning("%s has no labels, so it is not tested on; set test_split to another one.", test.title)
    return None


def _tell_of_single_images(source: ImageSource, train_rows: np.ndarray, test_rows: np.ndarray) -> None:
    """Says which classes have no image to measure with."""
    values = source.values(source.label_column)
    single = set(values[train_rows].tolist()) - set(values[test_rows].tolist())
    if not single:
        return
    numbers = source.labels_of(source.class_names)
    names = [source.class_names[number] for value, number in sorted(numbers.items()) if value in single]
    listed = ", ".join(names[:MOST_NAMED]) + ", ..." * (len(names) > MOST_NAMED)
    logger.warning("%s: %s: a single image each, which is learnt; none is left to measure with.", source.title, listed)
