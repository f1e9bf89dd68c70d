"""The plots of a comparison."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ..reports.plots import plot_bars, plot_comparison, plot_dots, plot_grid, plot_series
from ..reports.report import StreamReport
from .rows import grouped, num_tasks, values_of


def curve_of(row: dict, tasks: int) -> np.ndarray:
    """Mean accuracy over the tasks seen so far, after each task; NaN where not measured."""
    matrix = np.array(json.loads(row["accuracy_matrix"]), dtype=float)
    means = [values[: i + 1].mean() for i, values in enumerate(matrix)]
    return np.array([np.nan] * (tasks - len(means)) + means)  # what learnt all tasks as one is there at the end


def draw(
    rows: list[dict],
    stem: Path,
    families: Mapping[str, list[str]] = MappingProxyType({}),
    references: Sequence[str] = (),
    along: str = "",
) -> list[Path]:
    """All plots of a table: with families, a row of panels for each, and in all panels those methods that others are
    compared with; and, each family as a line, accuracy `along` a column of the CSV. Gives their paths.
    """
    groups = grouped(rows)
    curves, points, bars, ends = (dict[str, dict[str, Any]]() for _ in range(4))
    for benchmark, of in groups.items():
        curves[benchmark], points[benchmark], bars[benchmark], ends[benchmark] = {}, {}, {}, {}
        for method, found in of.items():
            values = np.array([curve_of(row, num_tasks(of)) for row in found])
            curves[benchmark][method] = (np.arange(1, values.shape[1] + 1), values)
            ends[benchmark][method] = accuracy = values_of(found, "average_accuracy")
            parameters = statistics.mean(values_of(found, "trained_parameters"))
            points[benchmark][method] = (np.array([parameters]), np.array(accuracy)[:, None])
            if routing := values_of(found, "routing_accuracy"):
                bars[benchmark][method] = routing
    paths = [stem.with_name(f"{stem.name}_curves.png")]
    if families:
        plot_grid(curves, families, references, paths[0], "tasks learnt", "accuracy on the tasks so far")
        paths.append(stem.with_name(f"{stem.name}_accuracy.png"))
        plot_dots(ends, families, references, paths[-1], "average accuracy after the last task")
        if along:
            paths.append(stem.with_name(f"{stem.name}_{along}.png"))
            lines = {benchmark: lines_of(of, families, along) for benchmark, of in groups.items()}
            plot_series(lines, paths[-1], along.replace("_", " "), "average accuracy")
    else:
        plot_series(curves, paths[0], "tasks learnt", "accuracy on the tasks so far")
        paths.append(stem.with_name(f"{stem.name}_parameters.png"))
        plot_series(points, paths[-1], "trained parameters, without the head", "average accuracy", log_x=True)
    if any(bars.values()):
        paths.append(stem.with_name(f"{stem.name}_routing.png"))
        if families:
            plot_dots(bars, families, (), paths[-1], "images that reach the expert of their own task")
        else:
            plot_bars(bars, paths[-1], "routing accuracy")
    for benchmark, of in groups.items() if not families else ():
        paths.append(stem.with_name(f"{stem.name}_matrix_{benchmark}.png"))
        # What learnt all tasks as one has no matrix to draw.
        continual = [found[0] for found in of.values() if not np.isnan(curve_of(found[0], num_tasks(of))).any()]
        plot_comparison([report_of(row) for row in continual], paths[-1])
    return paths


def lines_of(
    of: dict[str, list[dict]], families: Mapping[str, list[str]], column: str
) -> dict[str, tuple[Sequence[float], np.ndarray]]:
    """Average accuracies of the methods of each family, of shape `(seeds, methods)`, along a column of the CSV."""
    lines = dict[str, tuple[Sequence[float], np.ndarray]]()
    for title, names in families.items():
        found = [of[name] for name in names if len(of.get(name, [])) == max(map(len, of.values()))]
        found.sort(key=lambda rows: statistics.mean(values_of(rows, column)))
        if found:
            accuracies = np.array([values_of(rows, "average_accuracy") for rows in found]).T
            lines[title] = [statistics.mean(values_of(rows, column)) for rows in found], accuracies
    return lines


def report_of(row: dict) -> StreamReport:
    """As much of a run's report as its accuracy matrix says."""
    report = StreamReport(row["method"], row["benchmark"], {})
    matrix = np.array(json.loads(row["accuracy_matrix"]), dtype=float)
    for i in range(len(matrix)):
        report.add_task(f"task-{i:03d}", f"task {i + 1}")
    report.accuracy_matrix = matrix.tolist()
    return report
