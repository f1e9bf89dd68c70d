"""The metrics of a run, and their files."""

import csv
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import metrics
from ..config.checks import LARGEST_INTEGER, MOST, check_types
from ..config.errors import ConfigError
from ..config.model import TaskConfig
from .plots import plot_report


METRICS_NAME = "metrics.json"
MATRIX_NAME = "accuracy_matrix.csv"
PLOT_NAME = "accuracy_and_routing.png"
REPORT_FILES = (METRICS_NAME, MATRIX_NAME, PLOT_NAME)


MARGINS = (0.05, 0.2)
ROUNDING = 1e-5  # of sums of confidences
COSTS = (  # fields of StreamReport with one value per task
    "expert_parameters",
    "head_parameters",
    "stored_bytes",
    "train_images_per_second",
    "seconds",
    "untrained_accuracy",
)


def margin_bins(distances: np.ndarray) -> np.ndarray:
    """How clear each route is: 0 for a close call, 1 for a fairly clear one, 2 for a clear one.

    A route is a close call if the nearest expert is less than 5 % nearer than the next one, and clear from 20 % on.

    Args:
        distances (array of shape `(images, experts)`): From a router, of two experts or more.

    Returns:
        Integer array of shape `(images,)`; −1 where distances are not positive, so that no share can be said.

    Example:

    ```py
    >>> import numpy as np
    >>> from hf_clpeft.reports.report import margin_bins

    >>> margin_bins(np.array([[1.0, 0.99], [0.9, 1.0], [0.5, 1.0], [0.0, 0.0]])).tolist()
    [0, 1, 2, -1]

    ```
    """
    nearest, second = np.partition(distances, 1, axis=1)[:, :2].T
    margins = 1 - nearest / np.where(second > 0, second, 1)
    return np.where(second > 0, np.digitize(margins, MARGINS), -1)


@dataclass
class StreamReport:
    """Metrics and costs of a model's training; grows by one row with every task.

    It is saved with the model and continued when the model learns further tasks. Accuracy on tasks whose data is no
    longer available is NaN.

    Args:
        method (`str`): Name of the method.
        stream (`str`): Name of the stream.
        environment (`dict`): Backbone, seed, versions and device, to reproduce the numbers.
        dataset (`str`, *optional*): The stream's data set on the Hub.
        tasks (`list[str]`): Names of the tasks learnt.
        titles (`list[str]`): Their domains or classes, for display.
        accuracy_matrix (`list[list[float]]`): `A[i][j]`: accuracy on task j after task i; NaN where not measured.
        oracle_accuracy (`list[float]`): Accuracy on each task with oracle routing, after the last task; empty if tasks
            do not have their own experts.
        experts (`list[str]`): Titles of the tasks, or names of the experts of a pool.
        routing_confusion (`list[list[int]]`): Number of images of task j (row) routed to each of `experts` (column),
            after the last task; for a pool, the selection histogram of each task. Zeros where not measured.
        reliability (`list[list[float]]`): Of 15 bins of confidence, the number of test images of all measured tasks,
            the sum of their confidences, and the number of those that were right, after the last task.
        route_margins (`list[list[int]]`): Of routes by how clear they are, in the bins of [`margin_bins`], the number
            of test images, and of those that came to their own task's expert, after the last task; empty if experts
            do not belong to tasks.
        expert_parameters (`list[float]`): Trained parameters of each task's expert.
        head_parameters (`list[float]`): Trained parameters of each task's head rows.
        stored_bytes (`list[float]`): Bytes added by each task: expert, head rows, prototypes.
        train_images_per_second (`list[float]`): Training throughput of each task.
        seconds (`list[dict[str, float]]`): Wall-clock time of each task by part.
        untrained_accuracy (`list[float]`): Chance level of each task, 1 / classes.
        test_forwards_per_image (`float`): Forward passes per test image, summed over all evaluations.
        computed (`dict[str, list[float]]`): Values of `compute_metrics` by name, of each task after the last one; NaN
            where not measured.
        temperature (`float`, *optional*): Temperature of calibrated scores, found on training images held out.

    Example:

    ```py
    >>> from hf_clpeft import StreamReport

    >>> report = StreamReport("s_lora", "pets", environment={})
    >>> report.add_task("task-000", "cats")
    >>> report.add_task("task-001", "dogs")
    >>> report.accuracy_matrix = [[0.9, float("nan")], [0.7, 0.8]]
    >>> report.summary()["average_accuracy"]
    0.75

    ```
    """

    method: str
    stream: str
    environment: dict
    dataset: str | None = None
    tasks: list[str] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)
    accuracy_matrix: list[list[float]] = field(default_factory=list)
    oracle_accuracy: list[float] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)
    routing_confusion: list[list[int]] = field(default_factory=list)
    reliability: list[list[float]] = field(default_factory=list)
    route_margins: list[list[int]] = field(default_factory=list)
    expert_parameters: list[float] = field(default_factory=list)
    head_parameters: list[float] = field(default_factory=list)
    stored_bytes: list[float] = field(default_factory=list)
    train_images_per_second: list[float] = field(default_factory=list)
    seconds: list[dict[str, float]] = field(default_factory=list)
    untrained_accuracy: list[float] = field(default_factory=list)
    test_forwards_per_image: float = 0.0
    temperature: float | None = None
    computed: dict[str, list[float]] = field(default_factory=dict)

    def add_task(self, name: str, title: str, **costs: Any) -> None:
        """Adds a row and a column to the accuracy matrix, and resets the routing metrics.

        Args:
            name (`str`): Name of the task.
            title (`str`): Its domain or classes.
            costs: Values of the fields in `COSTS`; default: NaN.
        """
        self.tasks.append(name)
        self.titles.append(title)
        for row in self.accuracy_matrix:
            row.append(math.nan)
        self.accuracy_matrix.append([math.nan] * len(self.tasks))
        for cost in COSTS:
            getattr(self, cost).append(costs.get(cost, {} if cost == "seconds" else math.nan))
        self.experts, self.routing_confusion, self.oracle_accuracy, self.reliability = [], [], [], []
        self.route_margins, self.temperature, self.computed = [], None, {}

    def catch_up(self, tasks: list[TaskConfig]) -> None:
        """Adds rows of NaN for those of a model's tasks that were learnt without a trainer."""
        unknown = [task for task in tasks if task.name not in self.tasks]
        for task in unknown:
            self.add_task(task.name, task.title)
        if unknown:  # the routing metrics are outdated
            self.experts, self.routing_confusion, self.oracle_accuracy = list(self.titles), [], []
            self.reliability, self.route_margins, self.temperature, self.computed = [], [], None, {}

    def remove_task(self, name: str) -> None:
        """Removes a task's row and column, and resets the metrics of the model with that task."""
        j = self.tasks.index(name)
        for values in (self.tasks, self.titles, *(getattr(self, cost) for cost in COSTS), self.accuracy_matrix):
            del values[j]
        for row in self.accuracy_matrix:
            del row[j]
        self.accuracy_matrix[-1:] = [[math.nan] * len(self.tasks)] * bool(self.tasks)
        self.experts, self.routing_confusion, self.oracle_accuracy = list(self.titles), [], []
        self.reliability, self.route_margins, self.temperature, self.computed = [], [], None, {}

    def measured(self) -> list[int]:
        """Indices of the tasks that were evaluated after the last one was learnt."""
        return [] if not self.tasks else np.flatnonzero(~np.isnan(self.accuracy_matrix[-1])).tolist()

    def summary(self) -> dict[str, float]:
        """Metrics of [`hf_clpeft.metrics`] over the measured tasks, with routing and oracle-routed accuracy."""
        measured = self.measured()
        if not measured:
            return {}
        matrix = np.array(self.accuracy_matrix)[np.ix_(measured, measured)]
        evaluated_before = not math.isnan(np.diagonal(matrix, offset=1).sum()) and len(measured) > 1
        untrained = [self.untrained_accuracy[j] for j in measured]
        summary = metrics.summarize(matrix, untrained if evaluated_before else None)
        if self.oracle_accuracy and self.routing_confusion:
            summary["routing_accuracy"] = metrics.routing_accuracy(self.routing_confusion)
        if self.oracle_accuracy:
            summary["oracle_accuracy"] = float(np.mean([self.oracle_accuracy[j] for j in measured]))
        if self.reliability:
            summary["calibration_error"] = metrics.calibration_error(self.reliability)
        # What trains on all tasks at once is measured once, and has never forgotten anything.
        return {name: value for name, value in summary.items() if not math.isnan(value)}

    def means(self) -> dict[str, float]:
        """Means of `computed` over the measured tasks."""
        return {
            name: float(np.nanmean(values)) for name, values in self.computed.items() if not np.isnan(values).all()
        }

    def to_dict(self) -> dict:
        """Plain `dict` with the summary, ready for JSON: NaN becomes `None`."""
        values = {"summary": self.summary(), **asdict(self)}
        return json.loads(json.dumps(values), parse_constant=lambda constant: None)

    @classmethod
    def from_dict(cls, values: dict, tasks: list[TaskConfig]) -> "StreamReport":
        """Inverse of [`~StreamReport.to_dict`].

        Args:
            values (`dict`): Content of a `metrics.json`.
            tasks (`list[TaskConfig]`): The tasks of the model.

        Raises:
            [`ConfigError`]: It has other tasks, unknown fields, lists of a wrong shape, or impossible numbers.
        """
        try:
            values = {name: _with_nan(value) for name, value in values.items() if name != "summary"}
            if isinstance(values.get("computed"), dict):
                values["computed"] = {name: _with_nan(of_tasks) for name, of_tasks in values["computed"].items()}
            report = cls(**values)
            if report.tasks != [task.name for task in tasks]:
                raise ConfigError(f"it is about the tasks {report.tasks}, but the model has learnt others.")
            check_types(report)
            report._check_shapes()
            report._check_numbers()
            report.summary()
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{METRICS_NAME} cannot be used: {error}") from error
        return report

    def _check_shapes(self) -> None:
        """Raises [`ConfigError`] unless all lists have the lengths that those who show them rely on."""
        count = len(self.tasks)
        of_tasks = {name: getattr(self, name) for name in (*COSTS, "accuracy_matrix", "titles")}
        of_tasks |= {name: getattr(self, name) for name in ("oracle_accuracy", "routing_confusion")}
        of_tasks |= {f"computed[{name!r:.40}]": values for name, values in self.computed.items()}
        for name, values in of_tasks.items():
            optional = name in ("oracle_accuracy", "routing_confusion")
            if len(values) != count and (values or not optional):
                raise ConfigError(f"its {name} has {len(values)} entries for {count} tasks.")
        for name, rows, wanted in (
            ("accuracy_matrix", self.accuracy_matrix, count),
            ("routing_confusion", self.routing_confusion, len(self.experts)),
            ("route_margins", self.route_margins, 2),
            ("reliability", self.reliability, 3),
        ):
            lengths = {len(row) for row in rows} - {wanted}
            if lengths:
                raise ConfigError(f"its {name} has a row of {lengths.pop()} numbers; each must have {wanted}.")
        for name, number in (("route_margins", len(MARGINS) + 1), ("reliability", metrics.continual.BINS)):
            if len(getattr(self, name)) not in (0, number):
                raise ConfigError(f"its {name} has {len(getattr(self, name))} rows; it must have {number}.")

    def _check_numbers(self) -> None:
        """Raises [`ConfigError`] on numbers that nothing measured can come to."""
        shares = [*self.accuracy_matrix, self.oracle_accuracy, self.untrained_accuracy]
        costs = [getattr(self, name) for name in COSTS if name not in ("seconds", "untrained_accuracy")]
        costs += [[*of_task.values()] for of_task in self.seconds] + [[self.test_forwards_per_image]]
        for what, rows, least, most in (
            ("an accuracy", shares, 0, 1),
            ("a cost", costs, -LARGEST_INTEGER, LARGEST_INTEGER),  # a task may even save bytes
        ):
            for value in (value for row in rows for value in row):
                if not (math.isnan(value) or least <= value <= most):
                    raise ConfigError(f"{what} is {value}; it must be from {least:,} to {most:,}.")
        for name in ("routing_confusion", "route_margins", "reliability"):
            for value in (value for row in getattr(self, name) for value in row):
                if not 0 <= value <= MOST:
                    raise ConfigError(f"its {name} counts {value} pictures; that must be from 0 to {MOST:,}.")
        for name in ("route_margins", "reliability"):
            for total, *parts in getattr(self, name):
                if max(parts) > total + ROUNDING * (total + 1):
                    raise ConfigError(f"its {name} counts more pictures as right than there are: {max(parts)}.")
        if self.temperature is not None and not 0 < self.temperature <= MOST:
            raise ConfigError(f"its temperature is {self.temperature}; it must be above 0, and {MOST:,} at most.")

    def save(self, folder: str | Path) -> None:
        """Writes `metrics.json`, `accuracy_matrix.csv` and `accuracy_and_routing.png`."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        Path(folder, METRICS_NAME).write_text(text + "\n", encoding="utf-8")
        with open(Path(folder, MATRIX_NAME), "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["after", *self.tasks])
            for name, row in zip(self.tasks, self.accuracy_matrix, strict=True):
                writer.writerow([name, *("" if math.isnan(value) else f"{value:.6f}" for value in row)])
        path = Path(folder, PLOT_NAME)
        plot_report(self.accuracy_matrix, self.routing_confusion, self.titles, self.experts, path, self.method)


def _with_nan(value: Any) -> Any:
    """Replaces `None`, as read from JSON, by NaN in nested lists."""
    if isinstance(value, list):
        return [math.nan if item is None else _with_nan(item) for item in value]
    return value
