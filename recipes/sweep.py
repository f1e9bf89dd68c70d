"""Sweeps one or two options of some methods: a YAML file in; a CSV, a Markdown table and plots out.

    python recipes/sweep.py --config recipes/configs/sweeps/k.yaml

The file is one of `recipes/compare.py` with `series` in place of `methods`: what is varied stands under `vary` of a
series, several options in step. `experts_from` names the series itself, whose first point then gives its experts to
the others; an earlier one, whose points give theirs one by one; or a method that stands in the output folder. `x` is
the option, or the column of the CSV, on the horizontal axis of the plots; `measures` is what they show, a plot each.

All else is as in `recipes/compare.py`: parallel with `--num_workers`, and what the CSV has is not run again.
"""

from pathlib import Path

import numpy as np

from hf_clpeft.comparing import CompareArguments, make_table, plan, run_all
from hf_clpeft.comparing.plan import check_keys, folder_of, read_yaml
from hf_clpeft.comparing.rows import values_of
from hf_clpeft.comparing.runs import check_complete
from hf_clpeft.config.errors import OptionError, errors_in_one_line
from hf_clpeft.reports.plots import plot_series
from hf_clpeft.training.parsing import OptionParser
from hf_clpeft.training.recipe import command_line


def read_sweep(path: str) -> dict:
    """The YAML file as one for a comparison: every point of a series a method of its own."""
    config = read_yaml(Path(path))
    check_keys(path, config, {"benchmarks", "series", "x"}, {"seeds", "methods", "options", "imports", "measures"})
    methods = {}
    for points in points_of(config).values():
        methods.update(points)
    kept = {name: config[name] for name in ("seeds", "benchmarks", "options", "imports") if name in config}
    return {**kept, "methods": methods}


def points_of(config: dict) -> dict[str, dict[str, dict]]:
    """Name and options of every point of every series, in its order."""
    series: dict[str, dict[str, dict]] = {}
    for name, entry in config["series"].items():
        entry = {"method": name, **(entry or {})}
        vary, giver = entry.pop("vary", {}), entry.pop("experts_from", None)
        if not isinstance(vary, dict) or len({len(v) if isinstance(v, list) else 0 for v in vary.values()} or {1}) > 1:
            raise OptionError(f"{name}: vary={vary!r} must be lists of as many values each, by name of the option.")
        series[name] = {}
        for number, values in enumerate(zip(*vary.values(), strict=True) if vary else [()]):
            label = ", ".join([name, *(f"{option} {value}" for option, value in zip(vary, values[:1], strict=False))])
            series[name][label] = {**entry, **dict(zip(vary, values, strict=True))}
            if giver == name:
                source = next(iter(series[name]))
            elif giver not in series:
                source = giver
            else:
                twin = list(series[giver])[number]  # the point at the same place, or who gave that one its experts
                source = series[giver][twin].get("experts_from", twin)
            if giver is not None and source != label:
                series[name][label]["experts_from"] = source
    return series


def draw(rows: list[dict], config: dict, stem: Path) -> list[Path]:
    """A plot for every measure. Gives their paths."""
    paths = []
    for measure in config.get("measures", ["average_accuracy"]):
        panels = {
            benchmark: {
                name: line
                for name, points in points_of(config).items()
                if (
                    line := line_of(
                        [row for row in rows if row["benchmark"] == benchmark], points, config["x"], measure
                    )
                )
            }
            for benchmark in config["benchmarks"]
        }
        paths.append(stem.with_name(f"{stem.name}_{measure}.png"))
        places = [place for lines in panels.values() for line in lines.values() for place in line[0]]
        far = not any(isinstance(place, str) for place in places) and max(places) >= 20 * min(places)
        plot_series(panels, paths[-1], config["x"].replace("_", " "), measure.replace("_", " "), log_x=far)
    return paths


def line_of(rows: list[dict], points: dict[str, dict], x: str, measure: str) -> tuple[list, np.ndarray] | None:
    """Places and values of a series, the latter of shape `(seeds, points)`; `None` if it has none."""
    places, columns = [], []
    for label, options in points.items():
        found = [row for row in rows if row["method"] == label]
        values = values_of(found, measure)
        if values:
            places.append(options[x] if x in options else float(found[0][x]))
            columns.append(values)
    if any(isinstance(place, str | list) for place in places):
        places = [str(place) for place in places]
    return (places, np.array(columns).T) if places else None


def main():
    (args,) = OptionParser((CompareArguments,)).read()
    results, config = Path(args.results or folder_of(args) / "results.csv"), read_yaml(Path(args.config))
    runs = plan(args, read_sweep(args.config))
    rows = run_all(runs, results, args.num_workers)
    check_complete(rows, runs)
    table = make_table(rows)
    results.with_suffix(".md").write_text(table, encoding="utf-8")
    paths = draw(rows, config, results.with_suffix(""))
    print(table)
    print(f"results: {results}    table: {results.with_suffix('.md')}    pictures: {', '.join(map(str, paths))}")
    print(f"next, another seed: {command_line('--seeds')} --seeds {max(int(row['seed']) for row in rows) + 1}")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
