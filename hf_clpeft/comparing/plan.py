"""What a comparison measures: a YAML file or a data set in, a list of runs out."""

import runpy
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from ..config import MethodOptions
from ..config.checks import MOST, check_ranges, check_types, fits
from ..config.errors import OptionError, refusing_options
from ..streams import BENCHMARKS, TaskStream
from ..training import ContinualTrainingArguments
from ..training.choices import choose_backbone, choose_batch_size, choose_epochs
from ..training.options import BackboneArguments, StreamArguments, options_of
from ..training.parsing import nearest, read_yaml as read_file
from ..training.plan import count as count_images


GROUPS = (StreamArguments, BackboneArguments, ContinualTrainingArguments)
RATES = ("learning_rate", "head_learning_rate")
FAMILIES = {"families": dict[str, list[str]], "references": list[str], "undrawn": list[str], "along": str}
METHODS_TO_COMPARE = ("slda_pp", "slda", "ncm", "s_lora")
MOST_TASKS = 5
COMMON = {f.name for group in GROUPS for f in fields(group)}


@dataclass
class CompareArguments:
    """Which comparison to run, and where its results go."""

    config: str | None = field(default=None, metadata={"help": "YAML file: seeds, benchmarks, methods, options."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for runs; default: out/<name of the file or of the data set>."}
    )
    results: str | None = field(
        default=None, metadata={"help": "CSV file; table and plots go beside it. Default: <output_dir>/results.csv."}
    )
    data_root: str | None = field(
        default=None, metadata={"help": "Folder of copies of data sets, named after the benchmarks or their Hub ids."}
    )
    backbone: str | None = field(default=None, metadata={"help": "Where the backbone is, if not where the file says."})
    methods: list[str] | None = field(default=None, metadata={"help": "Methods; of a file, only these."})
    benchmarks: list[str] | None = field(default=None, metadata={"help": "Only these benchmarks of the file."})
    seeds: list[int] | None = field(default=None, metadata={"help": "Seeds; other ones than the file's."})
    num_tasks: int | None = field(
        default=None,
        metadata={"help": "Of a data set that is no benchmark, tasks to split its classes into. Default: up to 5."},
    )
    options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": 'Options of the recipes for all runs, in JSON, such as {"num_train_epochs": 2}.'},
    )
    table_only: bool = field(
        default=False, metadata={"help": "Measure nothing: table and plots of what there is, and what is missing."}
    )
    num_workers: int | None = field(
        default=None,
        metadata={"help": "Runs at a time, each in a process of its own. Default: one for each GPU, or 2 without."},
    )

    def __post_init__(self) -> None:
        check_types(self)
        check_ranges(self, num_workers=(1, MOST), num_tasks=(1, MOST))


@dataclass(frozen=True)
class Run:
    """One cell of the table: a method on a benchmark with a seed.

    Args:
        benchmark (`str`), method (`str`), seed (`int`): Where it stands in the table.
        options (`dict`): Everything that was chosen for it, as options of the recipes.
        folder (`str`): Folder of the model.
        needs (`str`, *optional*): Method whose experts it takes over.
        imports (`tuple[str, ...]`): Python files that define methods.
    """

    benchmark: str
    method: str
    seed: int
    options: dict
    folder: str
    needs: str | None
    imports: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str, int]:
        return self.benchmark, self.method, self.seed


def read_config(path: str) -> dict:
    """The YAML file on top of its `base`, after checking that it has what a comparison needs."""
    config = read_yaml(Path(path))
    check_keys(path, config, {"benchmarks", "methods"}, {"seeds", "options", "imports", *FAMILIES})
    return config


def config_of(data: str, args: CompareArguments) -> dict:
    """What a file would say, for a benchmark or another data set; tells what is chosen where nothing is said."""
    config: dict[str, Any] = {"seeds": [0], "methods": dict.fromkeys(args.methods or METHODS_TO_COMPARE, {})}
    if data in BENCHMARKS:
        return {**config, "benchmarks": {data: {}}}
    images = TaskStream.class_incremental(data, num_tasks=1)
    classes, count = len(images.classes), count_images(images[0].train) or 0
    num_tasks = args.num_tasks or max(1, min(MOST_TASKS, classes // 2))
    chosen: dict[str, Any] = {"dataset": data, "num_tasks": num_tasks}
    chosen["train_batch_size"] = choose_batch_size(count // num_tasks)
    chosen["num_train_epochs"] = choose_epochs(count // num_tasks, chosen["train_batch_size"])
    why = "as you chose"
    if args.backbone is None:
        chosen["backbone"], why = choose_backbone()
    print(f"{count} training images of {classes} classes in {num_tasks} task{'s' * (num_tasks != 1)}")
    print(f"backbone: {args.backbone or chosen['backbone']}, {why}")
    print("where a method trains: {num_train_epochs} passes, {train_batch_size} images at a time".format(**chosen))
    return {**config, "benchmarks": {images.name: chosen}}


def check_keys(path: str, config: dict, needed: set[str], others: set[str]) -> None:
    """Raises an error unless a file has all that is needed, and nothing that nobody reads."""
    missing, unknown = needed - {name for name in config if config[name]}, set(config) - needed - others
    if unknown or missing:
        raise OptionError(
            f"{path}: it lacks {sorted(missing)} and has {sorted(unknown, key=str)}, which nothing reads."
        )
    seeds = config.get("seeds", [0])
    if not isinstance(seeds, list) or not all(isinstance(seed, int) for seed in seeds):
        raise OptionError(f"{path}: seeds={seeds!r} must be a list of whole numbers.")
    for name in ("benchmarks", "methods", "series", "options"):
        entries = config.get(name, {})
        if not isinstance(entries, dict):
            raise OptionError(f"{path}: {name}={entries!r} must be a mapping of names.")
        for entry, options in entries.items() if name != "options" else ():
            if not isinstance(options or {}, dict):
                raise OptionError(f"{path}: {name}: {entry}={options!r} must be a mapping of options.")
    for name, kind in FAMILIES.items():
        if name in config and not fits(config[name], kind):
            shape = "be the name of a column" if kind is str else "have lists of methods"
            raise OptionError(f"{path}: {name}={config[name]!r} must {shape}.")


def read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict:
    if path in above:
        raise OptionError(f"{above[0]}: its base leads back to {path}.")
    config = read_file(path)
    bases, below, imports = config.pop("base", []), dict[str, Any](), config.pop("imports", [])
    for base in [bases] if isinstance(bases, str) else bases:
        below = merge(below, read_yaml(path.parent / base, (*above, path)))
    found = [*below.get("imports", []), *(str(path.parent / each) for each in imports)]
    return merge(below, {**config, "imports": found} if found else config)


@cache
def import_file(path: str) -> None:
    """Runs a Python file, once, for the methods that it defines."""
    if not Path(path).is_file():
        raise OptionError(f"imports: there is no file {path}.")
    runpy.run_path(path)


def merge(below: dict, above: dict) -> dict:
    """Two mappings of mappings in one: where both have a value, the one above wins; null takes away what is below."""
    merged = dict(below)
    for name, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(name), dict)
        merged[name] = merge(below[name], value) if both else value
        if value is None:
            del merged[name]
    return merged


def folder_of(args: CompareArguments) -> Path:
    return Path(args.output_dir or Path("out", Path(args.config or "comparison").stem))


def plan(args: CompareArguments, config: dict) -> list[Run]:
    """All runs of the table."""
    folder, runs, imports = folder_of(args), [], tuple(config.get("imports", ()))
    for path in imports:
        import_file(path)
    for kind in ("methods", "benchmarks"):
        for name in getattr(args, kind) or ():
            if name not in config[kind]:
                raise OptionError(
                    f"--{kind}: {args.config or 'this comparison'} has no {name!r}{nearest(name, config[kind])}"
                )
    for seed in args.seeds or config.get("seeds", [0]):
        for benchmark in config["benchmarks"]:
            known = BENCHMARKS.get(benchmark)
            if known is None and "dataset" not in (config["benchmarks"][benchmark] or {}):
                near = nearest(str(benchmark), BENCHMARKS)
                raise OptionError(f"There is no benchmark {benchmark!r}{near} There are {', '.join(BENCHMARKS)}.")
            for method in config["methods"]:
                chosen = args.methods is None or method in args.methods
                if not chosen or (args.benchmarks is not None and benchmark not in args.benchmarks):
                    continue
                options = {**chosen_options(config, benchmark, method), **args.options, "seed": seed}
                if known is not None:
                    options["benchmark"] = benchmark
                if (options.get("scenario", "class") if known is None else known.scenario) == "class" and seed:
                    options.setdefault("class_order_seed", seed)
                if args.backbone is not None:
                    options["backbone"] = args.backbone
                if args.data_root is not None and known is not None:
                    options["dataset"] = str(copy_of(benchmark, args.data_root))
                place = folder / "runs" / benchmark / str(seed)
                needs = options.pop("experts_from", None)
                if needs is not None:
                    options["experts_from"] = str(place / slug(needs))
                runs.append(Run(benchmark, method, seed, options, str(place / slug(method)), needs, imports))
    for run in runs:  # what cannot be meant is found before anything is learnt
        with refusing_options():
            make_method(run)
            for group, options in zip(GROUPS, split_options(run)[0], strict=True):
                group(**options)
    return runs


def chosen_options(config: dict, benchmark: str, method: str) -> dict:
    """What a file, and the benchmark itself, choose for a method on a benchmark."""
    of_benchmark, of_method = dict(config["benchmarks"][benchmark] or {}), dict(config["methods"][method] or {})
    of_both, twin = of_benchmark.pop("methods", {}), of_method.pop("tuned_as", None)
    kind = of_method.get("method", method)
    names = [method, kind]
    if twin is not None:
        options_of(twin)  # there is a method of that name
        names.append(twin)
    # What is meant for all methods is given to those that have it.
    accepted = COMMON | {f.name for f in fields(options_of(kind))}
    known = BENCHMARKS.get(benchmark)
    suited = next((name for name in names if known is not None and name in known.tuned), None)
    common = {} if known is None else known.options_for(suited)
    common = {**common, **config.get("options", {}), **of_benchmark}
    of_twin = config["methods"].get(twin) or {}
    return {
        **{name: value for name, value in common.items() if name in accepted},
        **{name: value for name, value in of_twin.items() if name in RATES},
        "method": kind,
        **of_method,
        **next((of_both[name] for name in names if name in of_both), {}),
    }


def copy_of(benchmark: str, data_root: str) -> Path:
    """Folder of a benchmark's data set: named after the benchmark, or as its repo on the Hub."""
    folder, dataset = Path(data_root, benchmark), BENCHMARKS[benchmark].dataset
    named = Path(data_root, dataset.rpartition("/")[2]) if isinstance(dataset, str) else folder
    return named if named.is_dir() and not folder.is_dir() else folder


def slug(name: str) -> str:
    return "".join(sign if sign.isalnum() else "_" for sign in name)


def split_options(run: Run) -> tuple[list[dict], dict]:
    """Options of each group of the recipes, and what is left for the method."""
    options = {name: value for name, value in run.options.items() if name != "method"}
    groups = [{f.name: options.pop(f.name) for f in fields(group) if f.name in options} for group in GROUPS]
    return groups, options


def make_method(run: Run) -> MethodOptions:
    kind, (_, options) = options_of(run.options["method"]), split_options(run)
    hints, known = get_type_hints(kind), {f.name for f in fields(kind)}
    for name, value in options.items():
        if name not in known:
            near = nearest(name, known | COMMON)
            raise OptionError(f"{run.method} on {run.benchmark}: there is no option {name!r}{near}")
        if not fits(value, hints[name]) and fits([value], hints[name]):  # as on a command line
            options[name] = [value]
    return kind(**options)
