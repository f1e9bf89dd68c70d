"""What a run has measured so far, and the files that say so."""

import csv
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from .. import metrics
from ..plots import plot_report


METRICS_NAME = "metrics.json"
MATRIX_NAME = "accuracy_matrix.csv"
PLOT_NAME = "accuracy_and_routing.png"


@dataclass
class StreamReport:
    """Everything measured while learning a stream; grows by one row with every task.

    Args:
        method (`str`): Name of the method.
        stream (`str`): Name of the stream.
        environment (`dict`): Backbone, seed, versions and device: what it takes to repeat the numbers.
        tasks (`list[str]`): Names of the tasks learnt.
        titles (`list[str]`): Their domains or classes, for people.
        accuracy_matrix (`list[list[float]]`): `A[i][j]`: accuracy on task j after task i; NaN where not measured.
        oracle_accuracy (`list[float]`): Accuracy on each task if every image went to its own expert, after the last.
        experts (`list[str]`): Titles of all tasks of the model, those it had learnt before among them; or the experts
            of its pool.
        routing_confusion (`list[list[int]]`): Images of task j (row) sent to each of `experts`, after the last task.
            From a pool every image selects several: the selection histogram of each task.
        expert_parameters (`list[int]`): Trained parameters of each task's expert.
        head_parameters (`list[int]`): Trained parameters of each task's head rows.
        stored_bytes (`list[int]`): Bytes that each task added to the model: expert, head rows, prototypes.
        train_images_per_second (`list[float]`): Training throughput of each task.
        seconds (`list[dict[str, float]]`): Wall-clock time of each task by part.
        untrained_accuracy (`list[float]`): Expected accuracy of an untrained classifier on each task, 1 / classes.
        test_forwards_per_image (`float`): Forward passes per test image so far, for all evaluations together.

    Example:

    ```py
    >>> from hf_clpeft.training import StreamReport

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
    tasks: list[str] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)
    accuracy_matrix: list[list[float]] = field(default_factory=list)
    oracle_accuracy: list[float] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)
    routing_confusion: list[list[int]] = field(default_factory=list)
    expert_parameters: list[int] = field(default_factory=list)
    head_parameters: list[int] = field(default_factory=list)
    stored_bytes: list[int] = field(default_factory=list)
    train_images_per_second: list[float] = field(default_factory=list)
    seconds: list[dict[str, float]] = field(default_factory=list)
    untrained_accuracy: list[float] = field(default_factory=list)
    test_forwards_per_image: float = 0.0

    def add_task(self, name: str, title: str) -> None:
        """Opens a row and a column of the accuracy matrix."""
        self.tasks.append(name)
        self.titles.append(title)
        for row in self.accuracy_matrix:
            row.append(math.nan)
        self.accuracy_matrix.append([math.nan] * len(self.tasks))

    def summary(self) -> dict[str, float]:
        """The formulas of [`hf_clpeft.metrics`], with routing and oracle-routed accuracy where experts are routed."""
        evaluated_before = not math.isnan(np.diagonal(self.accuracy_matrix, offset=1).sum()) and len(self.tasks) > 1
        summary = metrics.summarize(self.accuracy_matrix, self.untrained_accuracy if evaluated_before else None)
        if self.oracle_accuracy:
            summary["routing_accuracy"] = metrics.routing_accuracy(self.routing_confusion)
            summary["oracle_accuracy"] = float(np.mean(self.oracle_accuracy))
        return summary

    def to_dict(self) -> dict:
        """Plain `dict` with the summary, ready for JSON: NaN becomes `None`."""
        values = {"summary": self.summary(), **asdict(self)}
        return json.loads(json.dumps(values), parse_constant=lambda constant: None)

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
