"""The CSV of a comparison: a row for each run."""

import csv
import json
import statistics
from collections.abc import Iterable
from pathlib import Path


MEASURES = {
    "average_accuracy": "average",
    "average_incremental_accuracy": "incremental",
    "forgetting": "forgetting",
    "routing_accuracy": "routing",
    "oracle_accuracy": "oracle-routed",
}
PERCENT = 100


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


def spread(values: list[float], scale: float = PERCENT, digits: int = 1) -> str:
    """Mean ± standard deviation; the mean alone of a single value, or of costs that are all equal."""
    if not values:
        return "–"
    mean = f"{scale * statistics.mean(values):,.{digits}f}"
    same = len(values) == 1 or (scale != PERCENT and len(set(values)) == 1)
    return mean if same else f"{mean} ± {scale * statistics.stdev(values):,.{digits}f}"


def num_tasks(of: dict[str, list[dict]]) -> int:
    """Tasks of a benchmark; what learnt it as one has fewer."""
    return max(len(json.loads(row["accuracy_matrix"])) for found in of.values() for row in found)
