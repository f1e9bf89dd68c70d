"""Plots of accuracy matrices, routing confusion, comparisons and throughput."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ..config.text import percent, printable


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_COLUMNS = 4
MOST_LINES = 20  # of a legend, in one column
GREYS = ("-", "--", ":", "-.")  # styles of the lines that others are compared with


def plot_report(
    accuracy_matrix: Sequence[Sequence[float]],
    routing_confusion: Sequence[Sequence[int]],
    titles: Sequence[str],
    experts: Sequence[str],
    path: str | Path | BinaryIO,
    name: str = "",
) -> None:
    """Plots the accuracy matrix and, beside it, the routing confusion.

    Args:
        accuracy_matrix (array of shape `(T, T)`): Accuracies in [0, 1]; NaN where not measured.
        routing_confusion (array of shape `(T, E)` or empty): Images of each task (row) sent to each expert.
        titles (sequence of `str`): Titles of the tasks.
        experts (sequence of `str`): Titles of the experts.
        path (`str`, `Path` or binary file): PNG file to write.
        name (`str`, *optional*): Name of the method.

    Example:

    ```py
    >>> from hf_clpeft.reports.plots import plot_report

    >>> titles = ["cats", "dogs"]
    >>> plot_report([[0.9, float("nan")], [0.7, 0.8]], [[9, 1], [0, 10]], titles, titles, "plot.png")

    ```
    """
    from matplotlib.figure import Figure

    confusion = np.asarray(routing_confusion, dtype=float)
    panels = 2 if confusion.size else 1
    side = min(4 + 0.35 * len(titles), 14)
    figure = Figure(figsize=(panels * side + 0.5, side), layout="constrained", dpi=120)
    axes = np.atleast_1d(figure.subplots(1, panels))
    after = [f"after {title}" for title in titles]
    draw_matrix(axes[0], np.asarray(accuracy_matrix), after, titles, "accuracy on each task", "Blues")
    if panels == 2:
        share = confusion / np.where(confusion.sum(axis=1), confusion.sum(axis=1), np.nan)[:, None]
        draw_matrix(axes[1], share, titles, experts, "share of selections, by expert", "Oranges")
        axes[1].set_ylabel("images of")
        axes[1].set_xlabel("expert")
    figure.suptitle(_literal(name))
    _save(figure, path)


def plot_comparison(reports: Sequence, path: str | Path) -> None:
    """Plots the accuracy matrices of several methods on one stream side by side, four in a row.

    Args:
        reports (sequence of [`StreamReport`]): Runs on the same stream.
        path (`str` or `Path`): PNG file to write.

    Example:

    ```py
    >>> from hf_clpeft.reports.plots import plot_comparison
    >>> from hf_clpeft import StreamReport

    >>> report = StreamReport("s_lora", "pets", {})
    >>> report.add_task("task-000", "cats")
    >>> report.add_task("task-001", "dogs")
    >>> report.accuracy_matrix = [[0.9, float("nan")], [0.7, 0.8]]
    >>> plot_comparison([report, report], "comparison.png")

    ```
    """
    from matplotlib.figure import Figure

    side = min(3.5 + 0.35 * len(reports[0].tasks), 12)
    columns = min(len(reports), MOST_COLUMNS)
    lines = -(-len(reports) // columns)
    figure = Figure(figsize=(columns * side, lines * side), layout="constrained", dpi=120 if lines == 1 else 70)
    axes = np.atleast_1d(figure.subplots(lines, columns, sharey=True)).flatten()
    after = [f"after {title}" for title in reports[0].titles]
    for axis in axes[len(reports) :]:
        axis.set_axis_off()
    for axis, report in zip(axes, reports, strict=False):
        title = f"{report.method}: {percent(report.summary()['average_accuracy'])} at the end"
        draw_matrix(axis, np.asarray(report.accuracy_matrix), after, report.titles, title, "Blues")
    figure.suptitle(_literal(f"accuracy on each task of {reports[0].stream}"))
    _save(figure, path)


def plot_series(
    panels: dict[str, dict[str, tuple[Sequence[float], np.ndarray]]],
    path: str | Path,
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
) -> None:
    """Plots percentages as lines, one per method with the standard deviation over runs, one panel per benchmark.

    Args:
        panels (`dict`): Title to lines; name of a line to x values, of length `n`, and y values of shape `(runs, n)`
            in [0, 1]. A line known at its last x only, or at 0 of a logarithmic axis, becomes a horizontal baseline.
        path (`str` or `Path`): PNG file to write.
        xlabel (`str`), ylabel (`str`): Labels of the axes.
        log_x (`bool`, *optional*, defaults to `False`): Use a logarithmic x axis.

    Example:

    ```py
    >>> import numpy as np
    >>> from hf_clpeft.reports.plots import plot_series

    >>> lines = {"s_lora": ([1, 2], np.array([[0.9, 0.8], [0.9, 0.7]]))}
    >>> plot_series({"digits": lines}, "curves.png", "tasks learnt", "accuracy")

    ```
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    drawn: dict[str, Any] = {}
    columns = -(-len(names) // MOST_LINES) or 1
    figure = Figure(figsize=(5 * len(panels) + 2 * columns, 4.2), layout="constrained", dpi=120)
    axes = np.atleast_1d(figure.subplots(1, len(panels)))
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for name, (x, values) in lines.items():
            style: dict[str, Any] = {
                "color": f"C{names.index(name) % 10}",
                "linestyle": ("-", "--", ":")[names.index(name) // 10 % 3],
            }
            mean, spread = 100 * values.mean(axis=0), 100 * values.std(axis=0)
            at_zero = log_x and not any(x)
            if at_zero or (len(x) > 1 and np.isfinite(mean).sum() == 1):
                drawn[name] = axis.axhline(mean[-1], linewidth=1, **style)
                continue
            style |= {"marker": "os^Dv"[names.index(name) // 10 % 5], "markersize": 4}
            drawn[name] = axis.errorbar(x, mean, spread if len(values) > 1 else None, **style)
        axis.set(title=_label(title), xlabel=xlabel, ylabel=f"{ylabel}, %")
        axis.spines[["top", "right"]].set_visible(False)
        if log_x:
            axis.set_xscale("log")
            low, high = axis.get_xlim()
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.xaxis.set_minor_locator(NullLocator())
        elif not any(isinstance(place, str) for x, _ in lines.values() for place in x):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    labels = [_literal(name) for name in drawn]
    figure.legend(list(drawn.values()), labels, loc="outside right upper", fontsize=8, ncols=columns)
    _save(figure, path)


def plot_grid(
    panels: dict[str, dict[str, tuple[Sequence[float], np.ndarray]]],
    families: Mapping[str, Sequence[str]],
    references: Sequence[str],
    path: str | Path,
    xlabel: str,
    ylabel: str,
) -> None:
    """Plots percentages as lines with the standard deviation over runs: a column per benchmark, a row per family.

    Args:
        panels (`dict`): Title of a column to its lines, as [`plot_series`] takes them.
        families (mapping of `str` to sequences of `str`): Title of a row to the names of its lines.
        references (sequence of `str`): Lines that are drawn in all rows, thin and grey.
        path (`str` or `Path`): PNG file to write.
        xlabel (`str`), ylabel (`str`): Labels of the axes.

    Example:

    ```py
    >>> import numpy as np
    >>> from hf_clpeft.reports.plots import plot_grid

    >>> lines = {name: ([1, 2], np.array([[0.9, 0.8], [0.9, 0.7]])) for name in ("s_lora", "slda", "ncm")}
    >>> families = {"experts": ["s_lora"], "closed form": ["slda", "ncm"]}
    >>> plot_grid({"digits": lines}, families, ["ncm"], "curves.png", "tasks learnt", "accuracy")

    ```
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = {title: [name for name in names if name not in references] for title, names in families.items()}
    rows = {title: names for title, names in rows.items() if names} or {"": []}
    size = (2.4 * len(panels) + 1.7, 1.9 * len(rows) + 0.8)
    figure = Figure(figsize=size, layout="constrained", dpi=120)
    axes = figure.subplots(len(rows), len(panels), sharex="col", sharey="col", squeeze=False)
    grey: dict[str, Any] = {}
    for line, (family, names) in zip(axes, rows.items(), strict=True):
        drawn: dict[str, Any] = {}
        for axis, lines in zip(line, panels.values(), strict=True):
            for name in (name for name in references if name in lines):
                style = {"color": "0.6", "linewidth": 1, "linestyle": GREYS[references.index(name) % len(GREYS)]}
                grey[name] = _draw_line(axis, *lines[name], style)
            for name in (name for name in names if name in lines):
                place = names.index(name)
                style = {"color": f"C{place % 10}", "linewidth": 1.3, "marker": "os^Dv"[place % 5], "markersize": 3}
                drawn[name] = _draw_line(axis, *lines[name], style)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
            axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        if drawn:
            line[-1].legend(
                list(drawn.values()),
                [_literal(name) for name in drawn],
                loc="center left",
                bbox_to_anchor=(1.02, 0.5),
                title=_literal(family),
                fontsize=8,
                title_fontproperties={"weight": "bold", "size": 9},
                frameon=False,
                alignment="left",
            )
    for axis, title in zip(axes[0], panels, strict=True):
        axis.set_title(_label(title), fontsize=10)
        axis.set_ylim(top=min(101, axis.get_ylim()[1]))  # bands may go beyond; the rows below share it
    figure.supxlabel(xlabel, fontsize=9)
    figure.supylabel(f"{ylabel}, %", fontsize=9)
    if grey:
        labels = [_literal(name) for name in grey]
        figure.legend(list(grey.values()), labels, loc="outside lower left", ncols=4, fontsize=8, frameon=False)
    _save(figure, path)


def _draw_line(axis: "Axes", x: Sequence[float], values: np.ndarray, style: dict[str, Any]) -> Any:
    """A line with a band of the standard deviation; horizontal if only its end is known."""
    mean = 100 * values.mean(axis=0)
    if len(x) > 1 and np.isfinite(mean).sum() == 1:
        return axis.axhline(mean[-1], **style)
    if len(values) > 1:
        spread = 100 * values.std(axis=0, ddof=1)
        axis.fill_between(x, mean - spread, mean + spread, color=style["color"], alpha=0.12, linewidth=0)
    return axis.plot(x, mean, **style)[0]


def plot_dots(
    panels: dict[str, dict[str, Sequence[float]]],
    families: Mapping[str, Sequence[str]],
    references: Sequence[str],
    path: str | Path,
    xlabel: str,
) -> None:
    """Plots percentages as dots with the standard deviation over runs: a line per method, a panel per benchmark.

    Args:
        panels (`dict`): Title to dots; name of a dot to its values in [0, 1], one per run.
        families (mapping of `str` to sequences of `str`): Heading to the methods below it.
        references (sequence of `str`): Methods from whose dots a thin grey line goes up and down.
        path (`str` or `Path`): PNG file to write.
        xlabel (`str`): Label of the x axis.

    Example:

    ```py
    >>> from hf_clpeft.reports.plots import plot_dots

    >>> dots = {"s_lora": [0.97, 0.98], "ncm": [0.95, 0.95]}
    >>> plot_dots({"digits": dots}, {"experts": ["s_lora"], "closed form": ["ncm"]}, ["ncm"], "dots.png", "accuracy")

    ```
    """
    from matplotlib.figure import Figure

    known = {name for dots in panels.values() for name in dots}
    shown = {family: [name for name in names if name in known] for family, names in families.items()}
    labels = [(text, family) for family, names in shown.items() if names for text in (None, *names)]
    figure = Figure(figsize=(1.8 * len(panels) + 2, 0.19 * len(labels) + 0.9), layout="constrained", dpi=150)
    (axes,) = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axis, (title, dots) in zip(axes, panels.items(), strict=True):
        for name in (name for name in references if name in dots):
            axis.axvline(100 * np.mean(dots[name]), color="0.75", linewidth=1, zorder=0)
        for place, (text, family) in enumerate(labels):
            if text is None:
                axis.axhspan(place - 0.5, place + 0.5, color="0.95", linewidth=0, zorder=0)
            elif values := dots.get(text):
                colour = f"C{list(families).index(family) % 10}"
                mean, spread = 100 * np.mean(values), 100 * np.std(values, ddof=1) if len(values) > 1 else None
                axis.errorbar(mean, place, xerr=spread, fmt="o", color=colour, markersize=4, linewidth=1.2)
        axis.set_title(_label(title), fontsize=10)
        axis.grid(axis="x", color="0.92")
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8)
        axis.tick_params(axis="y", length=0)
        axis.spines[:].set_visible(False)
    axes[0].set_yticks(range(len(labels)), [_literal(text or family) for text, family in labels])
    axes[0].set_ylim(len(labels) - 0.5, -0.5)
    for tick, (text, _) in zip(axes[0].get_yticklabels(), labels, strict=True):
        tick.set_fontweight("bold" if text is None else "normal")
    figure.supxlabel(f"{xlabel}, %", fontsize=9)
    _save(figure, path)


def plot_bars(panels: dict[str, dict[str, Sequence[float]]], path: str | Path, ylabel: str) -> None:
    """Plots percentages as bars, one per method with the standard deviation over runs, one panel per benchmark.

    Args:
        panels (`dict`): Title to bars; name of a bar to its values in [0, 1], one per run.
        path (`str` or `Path`): PNG file to write.
        ylabel (`str`): Label of the y axis.

    Example:

    ```py
    >>> from hf_clpeft.reports.plots import plot_bars

    >>> plot_bars({"digits": {"s_lora": [0.97, 0.98]}}, "routing.png", "routing accuracy")

    ```
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(panels), 4.2), layout="constrained", dpi=120)
    for axis, (title, bars) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        heights = [100 * np.mean(values) for values in bars.values()]
        spread = [100 * np.std(values) for values in bars.values()]
        drawn = axis.bar(range(len(bars)), heights, yerr=spread if any(spread) else None, color="#f59e0b")
        axis.bar_label(drawn, fmt="%.1f", fontsize=8)
        axis.set_xticks(range(len(bars)), [_label(name) for name in bars], rotation=45, ha="right")
        axis.set(title=_label(title), ylabel=f"{ylabel}, %", ylim=(0, 105))
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_throughput(rows: Sequence[dict], path: str | Path) -> None:
    """Plots the time of a batch against the number of experts, relative to the first system, one panel per setting.

    Args:
        rows (sequence of `dict`): Rows of `recipes/throughput.py`.
        path (`str` or `Path`): PNG file to write.

    Example:

    ```py
    >>> from hf_clpeft.reports.plots import plot_throughput

    >>> setting = {"mode": "predict", "technique": "lora", "size": 1, "batch_size": 8, "dtype": "float32"}
    >>> row = {**setting, "compile": "off", "system": "backbone", "num_experts": 10, "x_base": 1.0}
    >>> plot_throughput([row, {**row, "num_experts": 100}], "throughput.png")

    ```
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    names = ("mode", "technique", "size", "batch_size", "dtype", "compile")
    panels = list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))
    figure = Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained", dpi=120)
    for axis, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        inside = [row for row in rows if tuple(row[name] for name in names) == panel]
        for system in dict.fromkeys(row["system"] for row in inside):
            points = [(row["num_experts"], row["x_base"]) for row in inside if row["system"] == system]
            axis.plot(*zip(*points, strict=True), marker="o", label=system)
        mode, technique, size, batch_size, dtype, compiled = panel
        unit = "rank" if technique == "lora" else "tokens"
        title = f"{mode}, {technique} ({unit} {size}), batch {batch_size}\n{dtype}, compile {compiled}"
        cost = f"time relative to: {inside[0]['system']}"
        axis.set(xscale="log", yscale="log", xlabel="experts", ylabel=cost, title=title)
        axis.yaxis.set_major_formatter("{x:g}x")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_formatter("")
        axis.legend(fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def draw_matrix(
    axis: "Axes", values: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str, cmap: str
) -> None:
    """Draws a labelled heat map of values in [0, 1], of shape `(rows, columns)`; NaN leaves a cell empty.

    Of a model that has unlearnt all of its tasks, there are no rows.
    """
    if values.size:
        axis.imshow(values, cmap=cmap, vmin=0, vmax=1)
    axis.set_xticks(range(len(columns)), [_label(text) for text in columns], rotation=45, ha="right")
    axis.set_yticks(range(len(rows)), [_label(text) for text in rows])
    axis.set_title(_literal(title), fontsize=11)
    axis.spines[:].set_visible(False)
    if values.size <= 400:
        for (i, j), value in np.ndenumerate(values):
            if not np.isnan(value):
                colour = "white" if value > 0.6 else "black"
                axis.text(j, i, percent(value, 0, ""), ha="center", va="center", color=colour)


def _label(text: str) -> str:
    """Untrusted text as a short tick label or title."""
    return _literal(text if len(text) <= 24 else text[:23] + "…")


def _literal(text: str) -> str:
    """Text with control characters and the `$` of mathtext escaped."""
    return printable(text).replace("$", r"\$")


def _save(figure: "Figure", path: str | Path | BinaryIO) -> None:
    """Writes a picture; signs that no font has are boxes in it, which is not worth a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from ")
        figure.savefig(path)
