"""The Markdown table of a comparison."""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from .rows import MEASURES, grouped, num_tasks, spread, values_of


COSTS = {  # title: column of the CSV, digits behind the point
    "forwards an image": ("forwards_per_image", 1),
    "trained parameters": ("trained_parameters", 0),
    "stored kB a task": ("stored_bytes", 0),
    "images seen": ("images_seen", 0),
    "training seconds": ("train_seconds", 0),
    "seconds": ("seconds", 0),
}
PAIRS = (("l2l", "l2p"), ("s_lora", "s_prompts"), ("s_lora_pp", "s_prompts_pp"))  # LoRA, prompts


def families_of(config: dict, methods: Iterable[str]) -> dict[str, list[str]]:
    """Methods of a table by family, as its file has them; those that it names in none come last. Empty without any."""
    families, methods = config.get("families", {}), list(dict.fromkeys(methods))
    named = {name for names in families.values() for name in names}
    groups = {title: [name for name in names if name in methods] for title, names in families.items()}
    groups["others"] = [*groups.get("others", []), *(name for name in methods if name not in named)]
    return {title: names for title, names in groups.items() if names} if families else {}


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
        measures = dict(MEASURES)
        if any(values_of(found, "calibration_error") for found in of.values()):
            measures["calibration_error"] = "calibration error"
        lines += ["| method | " + " | ".join([*measures.values(), *COSTS]) + " |"]
        lines += ["|---|" + "---|" * (len(measures) + len(COSTS))]
        for method in methods:
            found = of.get(method, [])
            cells = [spread(values_of(found, measure)) for measure in measures]
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
