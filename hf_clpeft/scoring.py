"""How good a model is on labelled images: per class and per task, with routing, calibration and rejection."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np

from .backbones.pictures import PictureError, open_image
from .config.errors import ConfigError
from .metrics import calibration_error
from .metrics.continual import reliability_table
from .model import ContinualModel
from .prediction import Prediction, check_options
from .streams import BENCHMARKS, StreamError, load_benchmark
from .streams.locate import AnyDataset, locate_dataset
from .streams.task import Split, split_of


@dataclass
class Score:
    """What was counted of some images.

    Args:
        images (`int`): How many there are.
        accuracy (`float`): Share whose likeliest class is right; NaN for classes that the model does not know.
        routing_accuracy (`float`): Share that came to the expert of a task of their class; NaN if experts do not
            belong to tasks.
        rejected (`float`): Share whose label `reject_rate` withholds; NaN if the model cannot reject.
        mistaken_for (`str`, *optional*): The most frequent wrong answer.
    """

    images: int
    accuracy: float
    routing_accuracy: float
    rejected: float
    mistaken_for: str | None = None


@dataclass
class Evaluation:
    """The result of [`evaluate`]. NaN stands for what cannot be measured.

    Args:
        total ([`Score`]): Of all images of classes that the model knows.
        calibration_error (`float`): Expected calibration error of their scores.
        reject_rate (`float`, *optional*): The rate asked for; `None` if the model cannot reject.
        tasks, classes (`dict[str, Score]`): By name of the task, and of the class.
        unknown (`dict[str, Score]`): By name of the class, images of classes that the model does not know.
    """

    total: Score
    calibration_error: float
    reject_rate: float | None
    tasks: dict[str, Score]
    classes: dict[str, Score]
    unknown: dict[str, Score]

    def to_dict(self) -> dict[str, Any]:
        """Plain `dict`, ready for JSON: NaN becomes `None`."""
        return _without_nan(asdict(self))


def evaluate(
    model: ContinualModel, images: Iterable[tuple[Any, str]], batch_size: int = 32, reject_rate: float = 0.05
) -> Evaluation:
    """Measures a model on labelled images, read batch by batch.

    Args:
        model ([`ContinualModel`]): The model.
        images (iterable of `(image, str)`): Images, as for [`ContinualModel.predict`], and the names of their classes.
        batch_size (`int`, *optional*, defaults to 32): Images per forward pass.
        reject_rate (`float`, *optional*, defaults to 0.05): As for [`ContinualModel.predict`]; of no effect if the
            model cannot reject.

    Returns:
        [`Evaluation`]

    Raises:
        [`ConfigError`]: The model knows none of the classes, or has learnt no task.
        [`PictureError`]: An image cannot be read.

    Example:

    ```py
    >>> from hf_clpeft import ContinualModel
    >>> from hf_clpeft.scoring import evaluate, labelled_images

    >>> model = ContinualModel.from_pretrained("hf-clpeft/s-lora-digits")
    >>> found = evaluate(model, labelled_images("digits"))
    >>> found.total.images, found.tasks["task-003"].accuracy > 0.9
    (360, True)

    ```
    """
    rejects = model.can_reject
    check_options(model.method, batch_size, reject_rate if rejects else None)
    rows, pairs = list[tuple[str, Prediction]](), iter(images)
    while batch := list(islice(pairs, batch_size)):
        found = model.predict([image for image, _ in batch], batch_size=batch_size)
        rows += [(label, prediction) for (_, label), prediction in zip(batch, found, strict=True)]
    return _judge(model, rows, reject_rate if rejects else None)


def _judge(model: ContinualModel, rows: list[tuple[str, Prediction]], reject_rate: float | None) -> Evaluation:
    method, config = model.method, model.config
    experts: dict[str, set[str]] = defaultdict(set)  # of the tasks of each class
    for position, task in enumerate(config.tasks):
        number = method.expert_of(position) if method.routes and method.independent else None
        for label in task.classes if number is not None else ():
            experts[label].add(model.bank.names[number])  # type: ignore[index]

    def score(some: list[tuple[str, Prediction]], known: bool = True) -> Score:
        right = [found.label == label for label, found in some]
        routed = [found.expert in experts[label] for label, found in some if label in experts]
        refused = [(found.typicality or 0) < (reject_rate or 0) for _, found in some]
        wrong = Counter(str(found.label) for label, found in some if found.label != label)
        return Score(
            len(some),
            _mean(right) if known else math.nan,
            _mean(routed) if known else math.nan,
            math.nan if reject_rate is None else _mean(refused),
            wrong.most_common(1)[0][0] if wrong else None,
        )

    by_class: dict[str, list[tuple[str, Prediction]]] = defaultdict(list)
    for label, found in rows:
        by_class[label].append((label, found))
    known = [label for label in config.classes if label in by_class]
    if not known:
        raise ConfigError(
            f"The model knows none of the classes of these images ({', '.join([*by_class][:5]) or 'there are none'}); "
            f"it knows {', '.join(config.classes[:5])}{', ...' * (len(config.classes) > 5)}"
        )
    seen = [row for label in known for row in by_class[label]]
    tasks = {task.name: [row for label in task.classes for row in by_class.get(label, [])] for task in config.tasks}
    confidence = np.array([found.score for _, found in seen])
    table = reliability_table(confidence, np.array([found.label == label for label, found in seen]))
    return Evaluation(
        score(seen),
        calibration_error(table),
        reject_rate,
        {name: score(some) for name, some in tasks.items() if some},
        {label: score(by_class[label]) for label in known},
        {label: score(some, known=False) for label, some in by_class.items() if label not in known},
    )


def labelled_images(
    dataset: AnyDataset,
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    bad: list[str] | None = None,
    **columns: Any,
) -> Iterator[tuple[Any, str]]:
    """Images of a data set with the names of their classes.

    Args:
        dataset (`str`, `Path`, `Dataset` or `DatasetDict`): Name of a benchmark, whose test images are taken; Hub id,
            folder of class folders, or loaded data set.
        split (`str`, *optional*): Default: the first test split that has labels; without one, all images.
        name (`str`, *optional*): Configuration of the data set.
        revision (`str`, *optional*): Commit of the data set's repo.
        bad (`list[str]`, *optional*): Collects what is wrong with images that cannot be read, and goes on; default:
            the first one raises an error.
        columns: `image_column`, `label_column`.

    Yields:
        `PIL.Image.Image` and `str`.

    Raises:
        [`StreamError`]: The data set cannot be loaded. It is raised at the call, before the first image.

    Example:

    ```py
    >>> from hf_clpeft.scoring import labelled_images

    >>> image, label = next(labelled_images("digits"))
    >>> image.size, label
    ((32, 32), '1')

    ```
    """
    parts: list[tuple[Split, tuple[str, ...]]]
    if isinstance(dataset, str) and dataset in BENCHMARKS:
        parts = [(task.test, task.classes) for task in load_benchmark(dataset) if task.test is not None]
    else:
        located = locate_dataset(dataset, name, revision, [split] if split else ())
        names = [*located.test_splits, *(each for each in located.splits if each not in located.test_splits)]
        sources = (located.source(each, **columns) for each in ([split] if split else names))
        source = next((each for each in sources if split or each.has_labels()), None)
        if source is None:
            raise StreamError(f"Data set {located.name!r} has no split with labels; its splits are {located.splits}.")
        classes = source.present()
        parts = [(split_of(source, classes), tuple(classes))]
    return _open(parts, bad)


def _open(parts: list[tuple[Split, tuple[str, ...]]], bad: list[str] | None) -> Iterator[tuple[Any, str]]:
    for part, classes in parts:
        for encoded, number, row in part:
            try:
                yield open_image(encoded), classes[number]
            except PictureError as error:
                if bad is None:
                    raise
                path = encoded.get("path") if isinstance(encoded, dict) else None
                bad.append(f"{path or f'{part.title}, row {row}'}: {error}")


def _mean(values: list[bool]) -> float:
    return sum(values) / len(values) if values else math.nan


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
