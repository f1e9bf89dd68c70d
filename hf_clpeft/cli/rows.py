"""Writes rows as soon as each is known: for people, for spreadsheets, and for pipes."""

import csv
import json
import sys
from collections.abc import Iterable
from enum import StrEnum

from ..config.text import csv_text, printable, printable_json


class Format(StrEnum):
    """How rows are printed."""

    table, csv, jsonl, json = "table", "csv", "jsonl", "json"


def write_rows(rows: Iterable[dict], form: Format, widths: dict[str, int], example: dict | None = None) -> None:
    """Prints rows one by one, so that nothing is kept.

    Args:
        rows (iterable of `dict`): With the same keys; a mapping in a cell gets columns of its own in a CSV.
        form ([`Format`]): How.
        widths (`dict[str, int]`): Columns of the table and their widths in characters; the last one may be exceeded.
        example (`dict`, *optional*): A row that has the columns of a CSV, for when there is none.
    """
    if form is Format.csv:
        return _csv(rows, example)
    {Format.table: _table, Format.jsonl: _jsonl, Format.json: _json}[form](rows, widths)


def _table(rows: Iterable[dict], widths: dict[str, int]) -> None:
    def line(cells: list[str]) -> None:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths.values(), strict=True)]
        print("  ".join(padded).rstrip(), flush=True)

    line(list(widths))
    for row in rows:
        cells = [row[name] for name in widths]
        line([f"{c:.3f}" if isinstance(c, float) else "–" if c is None else printable(c) for c in cells])


def _csv(rows: Iterable[dict], example: dict | None) -> None:
    def begin(row: dict) -> csv.DictWriter:
        writer = csv.DictWriter(sys.stdout, dict(_cells(row)), lineterminator="\n", restval="")
        writer.writeheader()
        return writer

    writer = None
    for row in rows:
        writer = writer or begin(row)
        writer.writerow(dict(_cells(row)))
        sys.stdout.flush()
    if writer is None and example is not None:
        begin(example)


def _cells(row: dict) -> Iterable[tuple[str, object]]:
    """Cells of a CSV: `classes: {"cat": 0.9}` becomes `classes 1: cat` and `classes 1 value: 0.9`."""
    for name, value in row.items():
        if isinstance(value, dict):
            for place, (key, number) in enumerate(value.items(), start=1):
                yield f"{name} {place}", csv_text(key)
                yield f"{name} {place} value", number
        else:
            yield name, csv_text(value) if isinstance(value, str) else value


def _jsonl(rows: Iterable[dict], widths: dict[str, int]) -> None:
    for row in rows:
        print(printable_json(json.dumps(row, ensure_ascii=False)), flush=True)


def _json(rows: Iterable[dict], widths: dict[str, int]) -> None:
    before = "["
    for row in rows:
        print(before)
        print(printable_json(json.dumps(row, indent=2, ensure_ascii=False)), end="", flush=True)
        before = ","
    print("[]" if before == "[" else "\n]")
