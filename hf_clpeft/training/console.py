"""Terminal output of a run: a status line, a table after every task, and one at the end."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ..config.text import percent, printable
from ..reports.report import StreamReport
from ..reports.tables import print_table
from .progress import progress_bar


@contextmanager
def waiting(text: str, shows: bool) -> Iterator[None]:
    """Shows a status line during a step without measurable progress."""
    with progress_bar(desc=text, bar_format="{desc} ...", leave=False, disable=not shows):
        yield


def print_task(report: StreamReport) -> None:
    """Prints accuracy and costs of the last task, and the averages over all tasks."""
    last, measured, summary = len(report.tasks) - 1, report.measured(), report.summary()
    matrix, seconds = np.array(report.accuracy_matrix), report.seconds[-1]
    rows = []
    if last in measured:
        own = [matrix[last, last], math.nan, math.nan]
        if report.oracle_accuracy:
            own[2] = report.oracle_accuracy[last]
        if report.oracle_accuracy and report.routing_confusion:
            sent = report.routing_confusion[last]
            own[1] = sent[last] / max(1, sum(sent))
        rows.append(["this task", *(percent(value, unit="") for value in own)])
    if len(measured) > 1:
        names = ("average_accuracy", "routing_accuracy", "oracle_accuracy")
        rows.append([f"all {len(measured)} tasks", *(percent(summary.get(name, math.nan), unit="") for name in names)])
    cost = [f"{name.replace('_', ' ')} {value:.1f} s" for name, value in seconds.items() if value >= 0.05]
    sizes = f"expert {report.expert_parameters[-1]:,} and head {report.head_parameters[-1]:,} parameters"
    print_table(
        f"{report.tasks[-1]} ({report.titles[-1]}) is learnt",
        ["", "accuracy", "routing", "oracle"],
        rows,
        ", ".join([sizes, f"{report.stored_bytes[-1] / 1000:,.0f} kB", *cost]) + "\n",
    )


def print_reports(reports: list[StreamReport], *closing: str) -> None:
    """Prints a table with one row per report, and closing lines, on the main process."""
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    measures = {
        "average_accuracy": "average",
        "average_incremental_accuracy": "incremental",
        "forgetting": "forgetting",
        "routing_accuracy": "routing",
        "oracle_accuracy": "oracle",
    }
    summaries = [report.summary() for report in reports]
    print_table(
        f"{reports[0].stream}: accuracy after {len(reports[0].tasks)} tasks, routed per image",
        ["method", *measures.values(), "expert", "sec"],
        [
            [
                report.method,
                *(percent(summary.get(name, math.nan), unit="") for name in measures),
                f"{max(report.expert_parameters):,}",
                f"{sum(sum(parts.values()) for parts in report.seconds):.0f}",
            ]
            for report, summary in zip(reports, summaries, strict=True)
        ],
    )
    for line in closing:
        print(printable(line), flush=True)
