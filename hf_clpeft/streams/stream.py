"""Task streams: the ordered tasks that a model learns one after another."""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, overload

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

from ..config.text import get_logger
from .drift import DriftDetector
from .joining import join_splits
from .locate import AnyDataset
from .source import StreamError
from .task import Task
from .train_test import TrainTest


logger = get_logger(__name__)


class TaskStream(Sequence[Task]):
    """The ordered tasks of a stream.

    Args:
        tasks (iterable of [`Task`]): The tasks, in training order.
        name (`str`, *optional*, defaults to `"stream"`): Name for tables and model cards.
        dataset (`str`, *optional*): Hub id of the data set, for model cards.

    Raises:
        [`StreamError`]: There is no task, or two have the same name.

    Example:

    ```py
    >>> from hf_clpeft import TaskStream
    >>> from hf_clpeft.streams.digits import load_digits_dataset

    >>> stream = TaskStream.class_incremental(load_digits_dataset(), num_tasks=5)
    >>> len(stream), stream[4].classes
    (5, ('8', '9'))
    >>> stream.classes[:3]
    ['0', '1', '2']

    ```
    """

    def __init__(self, tasks: Iterable[Task], name: str = "stream", dataset: str | None = None):
        self.tasks = list(tasks)
        self.name = name
        self.dataset = dataset
        names = [task.name for task in self.tasks]
        if not names:
            raise StreamError("A stream needs at least one task.")
        if len(set(names)) < len(names):
            raise StreamError(f"Two tasks of a stream have the same name: {names}.")

    def __len__(self) -> int:
        return len(self.tasks)

    @overload
    def __getitem__(self, index: int) -> Task: ...

    @overload
    def __getitem__(self, index: slice) -> "TaskStream": ...

    def __getitem__(self, index: int | slice) -> "Task | TaskStream":
        if isinstance(index, slice):
            return TaskStream(self.tasks[index], self.name, self.dataset)
        return self.tasks[index]

    @property
    def classes(self) -> list[str]:
        """Names of all classes in order of appearance."""
        return list(dict.fromkeys(name for task in self.tasks for name in task.classes))

    @property
    def scenario(self) -> str:
        """`"class"` when tasks bring new classes, `"domain"` when they bring new domains."""
        return "domain" if self.tasks[0].domain is not None else "class"

    def joined(self) -> "TaskStream":
        """Joins all tasks into one, for joint training: the upper bound of continual learning.

        Returns:
            [`TaskStream`]: A stream of a single task, with all classes, training images and test images.

        Raises:
            [`StreamError`]: The images are streamed.

        Example:

        ```py
        >>> from hf_clpeft import load_benchmark

        >>> stream = load_benchmark("digits").joined()
        >>> len(stream), len(stream.classes), len(stream[0].train.dataset)
        (1, 10, 1437)

        ```
        """
        classes, tested = self.classes, [task for task in self if task.test is not None]
        train = join_splits([task.train for task in self], [task.classes for task in self], classes)
        test = None
        if tested:
            test = join_splits([task.test for task in tested if task.test], [task.classes for task in tested], classes)
        return TaskStream([Task("all-tasks", tuple(classes), train, test)], f"{self.name}, joined", self.dataset)

    @classmethod
    def class_incremental(
        cls,
        dataset: AnyDataset,
        num_tasks: int = 5,
        seed: int | None = None,
        class_order: list[str] | None = None,
        **options: Any,
    ) -> "TaskStream":
        """Splits a data set by class: every task brings new classes.

        Args:
            dataset (`str`, `Path`, `Dataset` or `DatasetDict`): Hub id, local folder (Parquet or ImageFolder) or
                loaded data set.
            num_tasks (`int`, *optional*, defaults to 5): Number of tasks; if the classes do not divide evenly, the
                first tasks get one more.
            seed (`int`, *optional*): Shuffles the class order with `numpy.random.RandomState(seed).permutation`, the
                convention of the class-incremental literature (1993 is its usual seed). `None` keeps it.
            class_order (`list[str]`, *optional*): Names of the classes in training order.
            options: `name`, `revision`, `streaming`, `train_split`, `test_split`, `test_size`, `image_column`,
                `label_column`, `max_train_samples_per_task`, `max_test_samples_per_task`, `split_seed`; see
                [`TaskStream.domain_incremental`].

        Raises:
            [`StreamError`]: The data cannot be split like this.
        """
        sources = TrainTest.open(dataset, **options)
        classes = sources.train.present() if class_order is None else list(class_order)
        _warn_of_similar_classes(classes, sources.train.title)
        twice = next((name for name, count in Counter(classes).items() if count > 1), None)
        if twice is not None:
            raise StreamError(f"class_order names the class {twice!r} twice.")
        if seed is not None:
            classes = [classes[i] for i in np.random.RandomState(seed).permutation(len(classes))]
        if not 1 <= num_tasks <= len(classes):
            raise StreamError(
                f"{sources.train.title}: {len(classes)} classes cannot make num_tasks={num_tasks} tasks; choose 1 to "
                f"{len(classes)}." + (" Check label_column." if len(classes) < 2 else "")
            )
        groups = np.array_split(np.arange(len(classes)), num_tasks)
        tasks = (sources.task(i, [classes[c] for c in group]) for i, group in enumerate(groups))
        return cls(tasks, sources.stream_name, sources.hub_id)

    @staticmethod
    def from_batches(
        batches: Iterable[dict[str, list]],
        features_of: Callable[[list], np.ndarray],
        detector: DriftDetector | None = None,
        test_size: float = 0.2,
        name: str = "stream",
    ) -> "BorderlessStream":
        """Finds task boundaries in a stream of images by change-point detection.

        Args:
            batches (iterable of `dict`): Batches with `image`, a list of `PIL.Image.Image`, and `label`, a list of
                class names.
            features_of (callable): Computes query features `(images, hidden_size)` of a list of images, for example
                [`Backbone.features`].
            detector ([`DriftDetector`], *optional*): Detects the boundaries, at a given rate of false alarms.
            test_size (`float`, *optional*, defaults to 0.2): Fraction of each task's images held out for testing.
            name (`str`, *optional*, defaults to `"stream"`): Name for tables and model cards.

        Returns:
            [`BorderlessStream`]: Can be iterated over once, for example by [`ContinualTrainer.learn_stream`].
        """
        return BorderlessStream(batches, features_of, detector or DriftDetector(), test_size, name)

    @classmethod
    def domain_incremental(
        cls,
        dataset: AnyDataset,
        domain_column: str = "domain",
        domains: list[str] | None = None,
        test_domains: list[str] | None = None,
        **options: Any,
    ) -> "TaskStream":
        """Splits a data set by domain: every task brings the same classes in a new domain.

        Args:
            dataset (`str`, `Path`, `Dataset` or `DatasetDict`): Hub id, local folder (Parquet or ImageFolder) or
                loaded data set.
            domain_column (`str`, *optional*, defaults to `"domain"`): Column of domains.
            domains (`list[str]`, *optional*): Domains in training order. Default: all, in the order of the data
                set.
            test_domains (`list[str]`, *optional*): Test on these domains instead of each task's own. Their images are
                split evenly across the tasks, so each is tested once; routing accuracy is then meaningless.
            options:
                - `name` (`str`): configuration of the data set; `revision` (`str`): commit of its repo
                - `streaming` (`bool`): stream rows instead of downloading the data set
                - `train_split`, `test_split` (`str`): names of the splits; default: `train`, and the first one called
                  `test`, `validation`, `dev` or the like with labels. Without one, `test_size` (`float`, default
                  0.2) of every class is held out of train with `split_seed` (`int`, default 0); with 0, nothing is
                  held out, and accuracy is not measured
                - `image_column`, `label_column` (`str`): detected by common names and types if left out
                - `max_train_samples_per_task`, `max_test_samples_per_task` (`int`): maximum number of images per
                  task, with at least one of every class

        Raises:
            [`StreamError`]: The data cannot be split like this.

        Example:

        ```py
        >>> from hf_clpeft import TaskStream
        >>> from hf_clpeft.streams.digits import load_digits_dataset

        >>> stream = TaskStream.domain_incremental(load_digits_dataset(domains=True))
        >>> [task.domain for task in stream]
        ['scanned', 'inverted', 'rotated', 'textured']

        ```
        """
        sources = TrainTest.open(dataset, domain_column=domain_column, **options)
        domains = sources.train.domain_names if domains is None else list(domains)
        classes = sources.train.present()
        _warn_of_similar_classes(classes, sources.train.title)
        shares: Sequence[np.ndarray | None] = [None] * len(domains)
        if test_domains is not None:
            shares = sources.split_test_rows(classes, test_domains, len(domains))
        return cls(
            (
                sources.task(i, classes, domain, test_domains, test_rows)
                for i, (domain, test_rows) in enumerate(zip(domains, shares, strict=True))
            ),
            sources.stream_name,
            sources.hub_id,
        )


class BorderlessStream:
    """Tasks detected online in a stream of images; see [`TaskStream.from_batches`].

    A task is yielded when the next one is detected or the images end. Until then its images are held in memory.

    Example:

    ```py
    >>> import numpy as np
    >>> from PIL import Image
    >>> from hf_clpeft import TaskStream

    >>> dark, light = ([Image.new("L", (8, 8), value) for value in pair] * 100 for pair in ((20, 30), (200, 210)))
    >>> def features_of(images):
    ...     values = np.array([[np.asarray(image).mean() / 255] for image in images])
    ...     return np.hstack([values, 1 - values])
    >>> batches = [{"image": dark + light, "label": ["a", "b"] * 200}]
    >>> [len(task.train.dataset) for task in TaskStream.from_batches(batches, features_of, test_size=0)]
    [200, 200]

    ```
    """

    dataset = None

    def __init__(
        self,
        batches: Iterable[dict[str, list]],
        features_of: Callable[[list], np.ndarray],
        detector: DriftDetector,
        test_size: float,
        name: str,
    ):
        if not 0 <= test_size < 1:
            raise StreamError(f"test_size={test_size} must be a fraction from 0 to below 1, such as 0.2.")
        self.batches, self.features_of, self.detector = batches, features_of, detector
        self.test_size, self.name = test_size, name

    def __iter__(self) -> Iterator[Task]:
        count = 0
        images: list = []
        labels: list[str] = []
        features: list[np.ndarray] = []
        for batch in self.batches:
            images += batch["image"]
            labels += map(str, batch["label"])
            pending = list(self.features_of(batch["image"]))
            while pending:
                drift = self.detector.update(np.stack(pending))
                if drift is None:
                    features += pending
                    break
                boundary = len(features) + drift.after - drift.since
                yield self._task(count, images[:boundary], labels[:boundary])
                pending = [*features, *pending][boundary:]
                count, images, labels, features = count + 1, images[boundary:], labels[boundary:], []
                self.detector.reset()
        yield self._task(count, images, labels)

    def _task(self, count: int, images: list, labels: list[str]) -> Task:
        names = list(dict.fromkeys(labels))
        columns = Features({"image": Image(), "label": ClassLabel(names=names)})
        numbers = [names.index(label) for label in labels]
        rows = Dataset.from_dict({"image": images, "label": numbers}, columns)
        # Holds out images of each class at regular intervals, never the first, as `test_size` is below 1: a single
        # image on the wrong side of a boundary stays in the train split.
        held_out = np.zeros(len(rows), dtype=bool)
        seen: Counter[int] = Counter()
        for i, number in enumerate(numbers):
            seen[number] += 1
            held_out[i] = int(seen[number] * self.test_size) > int((seen[number] - 1) * self.test_size)
        splits = DatasetDict(train=rows.select(np.flatnonzero(~held_out)))
        if held_out.any():
            splits["test"] = rows.select(np.flatnonzero(held_out))
        return load_task(splits, f"task-{count:03d}", test_size=0)


def load_task(dataset: AnyDataset, name: str, domain: str | None = None, **options: Any) -> Task:
    """Loads a whole data set as one task, for streams whose tasks are not known in advance.

    Args:
        dataset (`str`, `Path`, `Dataset` or `DatasetDict`): Hub id, local folder (Parquet or ImageFolder) or loaded
            data set.
        name (`str`): Name of the task.
        domain (`str`, *optional*): Its domain, for domain-incremental learning.
        options: As for [`TaskStream.domain_incremental`].

    Returns:
        [`Task`]

    Example:

    ```py
    >>> from datasets import Dataset, DatasetDict
    >>> from PIL import Image
    >>> from hf_clpeft import load_task

    >>> rows = Dataset.from_dict({"image": [Image.new("RGB", (8, 8))] * 4, "label": ["cat", "dog"] * 2})
    >>> load_task(DatasetDict(train=rows, test=rows), name="pets").classes
    ('cat', 'dog')

    ```
    """
    (task,) = TaskStream.class_incremental(dataset, num_tasks=1, **options)
    return replace(task, name=name, domain=domain)


def _warn_of_similar_classes(classes: Sequence[str], title: str) -> None:
    """Warns about class names that differ only in case, spaces or Unicode form."""
    seen: dict[str, str] = {}
    for name in classes:
        other = seen.setdefault(unicodedata.normalize("NFKC", name).casefold().strip(), name)
        if other != name:
            logger.warning(
                "%s: the classes %r and %r differ only in case or spaces, and are learnt as two. If they are "
                "one, merge them with `dataset.map` or by moving the images.",
                title,
                other,
                name,
            )
