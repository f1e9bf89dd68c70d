"""What `compare.py` makes of the rows of its CSV: a Markdown table and plots."""

import json
import statistics
from pathlib import Path

import numpy as np

from hf_clpeft import StreamReport
from hf_clpeft.reports.plots import plot_bars, plot_comparison, plot_series


MEASURES = {
    "average_accuracy": "average",
    "average_incremental_accuracy": "incremental",
    "forgetting": "forgetting",
    "routing_accuracy": "routing",
    "oracle_accuracy": "oracle-routed",
}
PAIRS = (("l2l", "l2p"), ("s_lora", "s_prompts"), ("s_lora_pp", "s_prompts_pp"))  # LoRA, prompts


def values_of(rows: list[dict], measure: str) -> list[float]:
    return [float(row[measure]) for row in rows if row[measure] != ""]


def grouped(rows: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """Rows by benchmark and method, in their order."""
    groups: dict[str, dict[str, list[dict]]] = {}
    for row in rows:
        groups.setdefault(row["benchmark"], {}).setdefault(row["method"], []).append(row)
    return groups


def spread(values: list[float], scale: float = 100) -> str:
    """Mean ± standard deviation; the mean alone of a single value."""
    if not values:
        return "–"
    mean = f"{scale * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {scale * statistics.stdev(values):.1f}"


def make_table(rows: list[dict]) -> str:
    """Average accuracy of all methods on all benchmarks, what LoRA gains over prompts, and each benchmark in full."""
    groups = grouped(rows)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = ["Average accuracy after the last task, in %, mean ± standard deviation over seeds.", ""]
    lines += ["| method | " + " | ".join(groups) + " |", "|---|" + "---|" * len(groups)]
    for method in methods:
        cells = [spread(values_of(of.get(method, []), "average_accuracy")) for of in groups.values()]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines += pair_lines(groups)
    for benchmark, of in groups.items():
        seeds = ", ".join(sorted({str(row["seed"]) for found in of.values() for row in found}))
        first, tasks = next(iter(of.values()))[0], num_tasks(of)
        lines += ["", f"## {benchmark}", ""]
        lines.append(
            f"{first['train_images']} training images in {tasks} tasks, "
            f"{first['backbone']} (weights {first['weight_hash'][:12]}) at {first['image_size']} px, "
            f"{first['device']}, seeds {seeds}."
        )
        names = (*MEASURES.values(), "trained parameters", "stored kB", "images seen", "seconds")
        lines += ["", "| method | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
        for method, found in of.items():
            cells = [spread(values_of(found, measure)) for measure in MEASURES]
            cells += [f"{statistics.mean(values_of(found, 'trained_parameters')):,.0f}"]
            cells += [f"{statistics.mean(values_of(found, 'stored_bytes')) / 1000:,.0f}"]
            cells += [f"{statistics.mean(values_of(found, name)):,.0f}" for name in ("images_seen", "seconds")]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def pair_lines(groups: dict[str, dict[str, list[dict]]]) -> list[str]:
    lines = []
    for lora, prompts in PAIRS:
        cells = []
        for of in groups.values():
            ours, theirs = (
                {int(row["seed"]): float(row["average_accuracy"]) for row in of.get(name, [])}
                for name in (lora, prompts)
            )
            cells.append(spread([ours[seed] - theirs[seed] for seed in ours if seed in theirs]))
        if any(cell != "–" for cell in cells):
            lines.append(f"| {lora} − {prompts} | " + " | ".join(cells) + " |")
    if not lines:
        return []
    head = ["", "What LoRA gains over prompts, in points, seed by seed:", ""]
    return [*head, "| difference | " + " | ".join(groups) + " |", "|---|" + "---|" * len(groups), *lines]


def num_tasks(of: dict[str, list[dict]]) -> int:
    """Tasks of a benchmark; what learnt it as one has fewer."""
    return max(len(json.loads(row["accuracy_matrix"])) for found in of.values() for row in found)


def curve_of(row: dict, tasks: int) -> np.ndarray:
    """Mean accuracy over the tasks seen so far, after each task; NaN where not measured."""
    matrix = np.array(json.loads(row["accuracy_matrix"]), dtype=float)
    means = [values[: i + 1].mean() for i, values in enumerate(matrix)]
    return np.array([np.nan] * (tasks - len(means)) + means)  # what learnt all tasks as one is there at the end


def draw(rows: list[dict], stem: Path) -> list[Path]:
    """All plots of a table. Gives their paths."""
    groups = grouped(rows)
    curves, points, bars = {}, {}, {}
    for benchmark, of in groups.items():
        curves[benchmark], points[benchmark], bars[benchmark] = {}, {}, {}
        for method, found in of.items():
            values = np.array([curve_of(row, num_tasks(of)) for row in found])
            curves[benchmark][method] = (np.arange(1, values.shape[1] + 1), values)
            accuracy = np.array(values_of(found, "average_accuracy"))[:, None]
            parameters = statistics.mean(values_of(found, "trained_parameters"))
            points[benchmark][method] = (np.array([parameters]), accuracy)
            if routing := values_of(found, "routing_accuracy"):
                bars[benchmark][method] = routing
    paths = [stem.with_name(f"{stem.name}_{what}.png") for what in ("curves", "parameters", "routing")]
    plot_series(curves, paths[0], "tasks learnt", "accuracy on the tasks so far")
    plot_series(points, paths[1], "trained parameters, without the head", "average accuracy", log_x=True)
    if any(bars.values()):
        plot_bars(bars, paths[2], "routing accuracy")
    for benchmark, of in groups.items():
        paths.append(stem.with_name(f"{stem.name}_matrix_{benchmark}.png"))
        # What learnt all tasks as one has no matrix to draw.
        continual = [found[0] for found in of.values() if not np.isnan(curve_of(found[0], num_tasks(of))).any()]
        plot_comparison([report_of(row) for row in continual], paths[-1])
    return paths


def report_of(row: dict) -> StreamReport:
    """As much of a run's report as its accuracy matrix says."""
    report = StreamReport(row["method"], row["benchmark"], {})
    matrix = np.array(json.loads(row["accuracy_matrix"]), dtype=float)
    for i in range(len(matrix)):
        report.add_task(f"task-{i:03d}", f"task {i + 1}")
    report.accuracy_matrix = matrix.tolist()
    return report
