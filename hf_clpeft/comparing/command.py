"""The program of a comparison: reads its options, runs what is missing, writes table and plots."""

import shlex
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from ..config.errors import ConfigError, OptionError
from ..training.parsing import OptionParser
from ..training.recipe import command_line, without
from .drawing import draw
from .plan import CompareArguments, config_of, folder_of, plan, read_config
from .rows import key_of, read_rows
from .runs import check_complete, run_all
from .tables import families_of, make_table


def compare(argv: list[str] | None = None, program: str = "python recipes/compare.py", about: str = "") -> Path:
    """Runs a comparison, and prints its table.

    Args:
        argv (`list[str]`, *optional*): Command line: a data set, or `--config` with a YAML file; and the other options
            of [`CompareArguments`]. Default: `sys.argv[1:]`.
        program (`str`, *optional*): How it is called, for help and hints.
        about (`str`, *optional*): What the help says about it.

    Returns:
        `Path`: The CSV. A Markdown table and plots are beside it.

    Raises:
        [`OptionError`]: An option does not exist, or a value is not allowed.
        [`HfClpeftError`]: A run failed; the others are in the CSV.

    Example:

    ```py
    >>> from hf_clpeft.comparing import compare

    >>> small = '{"num_tasks": 2, "max_train_samples_per_task": 32, "max_test_samples_per_task": 12}'
    >>> path = compare(["digits", "--methods", "ncm", "slda", "--num_workers", "1", "--options", small])
    2 runs, of which 0 stand in out/digits/results.csv already
    ...
    >>> path.with_suffix(".md").is_file()
    True

    ```
    """
    parser = OptionParser(
        (CompareArguments,), prog=program, description=about, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("data", metavar="DATA", nargs="?", help="Name of a benchmark, folder, or id of a data set.")
    args, rest = parser.read(argv)
    if (rest.data is None) == (args.config is None):
        raise OptionError("Give a data set, or a file by --config: one of the two. See --help.")
    config = read_config(args.config) if args.config is not None else config_of(rest.data, args)
    if rest.data is not None and args.output_dir is None:
        args.output_dir = str(Path("out", next(iter(config["benchmarks"]))))
    results, runs = Path(args.results or folder_of(args) / "results.csv"), plan(args, config)
    if args.table_only:
        known = {key_of(row): row for row in read_rows(results)}
        rows = [known[run.key] for run in runs if run.key in known]
        if not rows:
            raise ConfigError(f"--table_only: {results} has no row of these runs.")
    else:
        rows = run_all(runs, results, args.num_workers)
        if not rows:
            check_complete(rows, runs)
    families = families_of(config, [run.method for run in runs])
    table = make_table(rows, [run.key for run in runs], command_for(args, program, rest.data), families)
    results.with_suffix(".md").write_text(table, encoding="utf-8")
    shown = [row for row in rows if row["method"] not in config.get("undrawn", ())]
    paths = draw(shown, results.with_suffix(""), families, config.get("references", ()), config.get("along", ""))
    print(table)
    print(f"results: {results}    table: {results.with_suffix('.md')}    pictures: {paths[0]}, ...")
    again = command_line("--seeds") if argv is None else f"{program} {shlex.join(without('--seeds', argv))}"
    print(f"next, another seed: {again} --seeds {max(int(row['seed']) for row in rows) + 1}")
    if not args.table_only:
        check_complete(rows, runs)
    return results


def command_for(args: CompareArguments, program: str, data: str | None = None) -> str:
    """The command that measures cells, but for their names. Paths that are absolute here stand in capitals."""
    words = [program, *([] if data is None else ["DATA" if Path(data).is_absolute() else shlex.quote(data)])]
    for name in ("config", "output_dir", "results", "backbone", "data_root"):
        value = getattr(args, name)
        if value is not None:
            words += [f"--{name}", name.upper() if Path(value).is_absolute() else shlex.quote(value)]
    return " ".join(words)
