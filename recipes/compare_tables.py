"""The CSV of `compare.py`, and what becomes of its rows: a Markdown table and plots."""

import csv
import json
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from hf_clpeft import StreamReport
from hf_clpeft.reports.plots import plot_bars, plot_comparison, plot_dots, plot_grid, plot_series


MEASURES = {
    "average_accuracy": "average",
    "average_incremental_accuracy": "incremental",
    "forgetting": "forgetting",
    "routing_accuracy": "routing",
    "oracle_accuracy": "oracle-routed",
}
PERCENT = 100
COSTS = {  # title: column of the CSV, digits behind the point
    "forwards an image": ("forwards_per_image", 1),
    "trained parameters": ("trained_parameters", 0),
    "stored kB a task": ("stored_bytes", 0),
    "images seen": ("images_seen", 0),
    "training seconds": ("train_seconds", 0),
    "seconds": ("seconds", 0),
}
PAIRS = (("l2l", "l2p"), ("s_lora", "s_prompts"), ("s_lora_pp", "s_prompts_pp"))  # LoRA, prompts


def key_of(row: dict) -> tuple[str, str, int]:
    return row["benchmark"], row["method"], int(row["seed"])


def read_rows(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(rows: Iterable[dict], path: Path) -> None:
    """Writes the CSV as a whole, so that a killed process leaves the one before."""
    rows = sorted(rows, key=key_of)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with open(part, "w", newline="", encoding="utf-8") as file:
        names = dict.fromkeys(name for row in rows for name in row)  # rows of before have fewer columns
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


def values_of(rows: list[dict], measure: str) -> list[float]:
    return [float(row[measure]) for row in rows if row.get(measure, "") != ""]


def grouped(rows: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """Rows by benchmark and method, in their order."""
    groups: dict[str, dict[str, list[dict]]] = {}
    for row in rows:
        groups.setdefault(row["benchmark"], {}).setdefault(row["method"], []).append(row)
    return groups


def families_of(config: dict, methods: Iterable[str]) -> dict[str, list[str]]:
    """Methods of a table by family, as its file has them; those that it names in none come last. Empty without any."""
    families, methods = config.get("families", {}), list(dict.fromkeys(methods))
    named = {name for names in families.values() for name in names}
    groups = {title: [name for name in names if name in methods] for title, names in families.items()}
    groups["others"] = [*groups.get("others", []), *(name for name in methods if name not in named)]
    return {title: names for title, names in groups.items() if names} if families else {}


def spread(values: list[float], scale: float = PERCENT, digits: int = 1) -> str:
    """Mean ± standard deviation; the mean alone of a single value, or of costs that are all equal."""
    if not values:
        return "–"
    mean = f"{scale * statistics.mean(values):,.{digits}f}"
    same = len(values) == 1 or (scale != PERCENT and len(set(values)) == 1)
    return mean if same else f"{mean} ± {scale * statistics.stdev(values):,.{digits}f}"


def make_table(
    rows: list[dict],
    wanted: Sequence[tuple[str, str, int]] = (),
    command: str = "",
    families: Mapping[str, list[str]] = MappingProxyType({}),
) -> str:
    """Average accuracy of all methods on all benchmarks, what LoRA gains over prompts, and each benchmark in full.

    Args:
        rows (`list[dict]`): Rows of the CSV.
        wanted (sequence of `(str, str, int)`, *optional*): Benchmark, method and seed of every cell that there should
            be; those without a row are listed below the first table.
        command (`str`, *optional*): What measures a cell, but for its names.
        families (mapping of `str` to lists of `str`, *optional*): Methods that stand together, by a common name.
    """
    groups = grouped(rows)
    measured = {(row["benchmark"], row["method"], int(row["seed"])) for row in rows}
    benchmarks = dict.fromkeys([*(benchmark for benchmark, _, _ in wanted), *groups])
    methods = list(dict.fromkeys([*(method for _, method, _ in wanted), *(row["method"] for row in rows)]))
    heads = {names[0]: title for title, names in families.items()}
    methods.sort(key=[name for names in families.values() for name in names].index if families else lambda name: 0)
    lines = ["Average accuracy after the last task, in %, mean ± standard deviation over seeds.", ""]
    columns = ["family"] * bool(families) + ["method", *benchmarks]
    lines += [*circumstances(rows), "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for method in methods:
        cells = [spread(values_of(groups.get(name, {}).get(method, []), "average_accuracy")) for name in benchmarks]
        family = [heads.get(method, "")] * bool(families)
        lines.append("| " + " | ".join([*family, method, *cells]) + " |")
    lines += missing_lines([cell for cell in wanted if cell not in measured], command)
    lines += pair_lines(groups)
    for benchmark, of in groups.items():
        first, tasks = next(iter(of.values()))[0], num_tasks(of)
        lines += ["", f"## {benchmark}", "", f"{first['train_images']} training images in {tasks} tasks.", ""]
        lines += ["| method | " + " | ".join([*MEASURES.values(), *COSTS]) + " |"]
        lines += ["|---|" + "---|" * (len(MEASURES) + len(COSTS))]
        for method in methods:
            found = of.get(method, [])
            cells = [spread(values_of(found, measure)) for measure in MEASURES]
            for column, digits in COSTS.values():
                scale = 1 / (1000 * num_tasks({method: found})) if found and column == "stored_bytes" else 1
                cells.append(spread(values_of(found, column), scale, digits))
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def circumstances(rows: list[dict]) -> list[str]:
    """What the rows were measured with, a line for each combination."""
    lines: dict[str, set[int]] = {}
    for row in rows:
        versions = ", ".join(f"{name} {version}" for name, version in json.loads(row["versions"]).items())
        where = f"{row['backbone']} (weights {row['weight_hash'][:12]}) at {row['image_size']} px, {row['device']}"
        lines.setdefault(f"{where}; {versions}", set()).add(int(row["seed"]))
    return [
        text for line, seeds in lines.items() for text in (f"{line}; seeds {', '.join(map(str, sorted(seeds)))}.", "")
    ]


def missing_lines(missing: list[tuple[str, str, int]], command: str) -> list[str]:
    """How many cells are not measured, and the commands that measure them: as few as name no other cell."""
    if not missing:
        return []
    methods: dict[tuple[str, int], tuple[str, ...]] = {}
    for benchmark, method, seed in missing:
        methods[benchmark, seed] = (*methods.get((benchmark, seed), ()), method)
    seeds: dict[tuple[str, tuple[str, ...]], tuple[int, ...]] = {}
    for (benchmark, seed), names in methods.items():
        seeds[benchmark, names] = (*seeds.get((benchmark, names), ()), seed)
    benchmarks: dict[tuple[tuple[str, ...], tuple[int, ...]], list[str]] = {}
    for (benchmark, names), numbers in seeds.items():
        benchmarks.setdefault((names, numbers), []).append(benchmark)
    runs = f"{len(missing)} run" + "s" * (len(missing) > 1)
    lines = ["", f"Not measured yet: {runs}. With your own paths in place of capitals:", "", "```sh"]
    for (names, numbers), where in benchmarks.items():
        chosen = ["--methods", *names, "--benchmarks", *where, "--seeds", *map(str, numbers)]
        lines.append(f"{command} {shlex.join(chosen)}")
    return [*lines, "```"]


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
    curves, points, bars, ends = {}, {}, {}, {}
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
) -> dict[str, tuple[list[float], np.ndarray]]:
    """Average accuracies of the methods of each family, of shape `(seeds, methods)`, along a column of the CSV."""
    lines = {}
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
