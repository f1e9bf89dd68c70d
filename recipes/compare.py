"""Compares methods on benchmarks over seeds: one YAML file in; a CSV, a Markdown table and plots out.

    python recipes/compare.py --config recipes/configs/digits.yaml                # minutes, on a CPU, offline
    python recipes/compare.py --config recipes/configs/main_cpu.yaml --data_root my/data --backbone my/vit

The file names `seeds`, `benchmarks` and `methods`. An entry holds options of the recipes (see `s_lora.py --help`),
those of the method among them; options that hold for all runs stand under `options`, those of one method on one
benchmark under `methods` of the benchmark. `method` names the method where the entry has a name of its own,
`experts_from` another entry whose experts are taken over, not trained again, `tuned_as` another method whose learning
rates hold where the method has none of its own. `imports` lists Python files to run first, which define methods that
are not in the package; `base` other files, on top of which this one stands; `undrawn` methods that the pictures leave
out; `along` a column of the CSV along which families are drawn as lines. A seed decides the order of classes (0 keeps
the data set's own), the draw of weights and that of batches.

Results go into the CSV run by run. What stands there already is not run again, and a run that was killed goes on after
its last task, so the same command finishes the table. A run that fails says why and costs its own cell and those of
runs that take over its experts; the others go on.
"""

import json
import multiprocessing
import os
import runpy
import shlex
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, fields
from functools import cache
from itertools import islice
from pathlib import Path
from typing import get_type_hints

import torch
from compare_tables import MEASURES, draw, families_of, key_of, make_table, read_rows, write_rows

from hf_clpeft import (
    METHODS,
    ConfigError,
    ContinualModel,
    ContinualTrainingArguments,
    MethodOptions,
    StreamReport,
    TaskStream,
)
from hf_clpeft.config.checks import MOST, check_ranges, check_types, fits
from hf_clpeft.config.errors import HfClpeftError, OptionError, errors_in_one_line, refusing_options
from hf_clpeft.streams import BENCHMARKS
from hf_clpeft.streams.images import open_image
from hf_clpeft.training.options import BackboneArguments, StreamArguments, options_of
from hf_clpeft.training.parsing import OptionParser, nearest, read_yaml as read_file
from hf_clpeft.training.recipe import command_line, learn, open_model


GROUPS = (StreamArguments, BackboneArguments, ContinualTrainingArguments)
RATES = ("learning_rate", "head_learning_rate")
FAMILIES = {"families": dict[str, list[str]], "references": list[str], "undrawn": list[str], "along": str}
MORE_MEASURES = ("backward_transfer", "calibration_error")  # in the CSV alone
IMAGES_COUNTED = 4  # of each task, whose forward passes are counted
COMMON = {f.name for group in GROUPS for f in fields(group)}


@dataclass
class CompareArguments:
    config: str = field(metadata={"help": "YAML file: seeds, benchmarks, methods, options."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for runs; default: out/<name of the file>."}
    )
    results: str | None = field(
        default=None, metadata={"help": "CSV file; table and plots go beside it. Default: <output_dir>/results.csv."}
    )
    data_root: str | None = field(
        default=None, metadata={"help": "Folder of copies of data sets, named after the benchmarks or their Hub ids."}
    )
    backbone: str | None = field(default=None, metadata={"help": "Where the backbone is, if not where the file says."})
    methods: list[str] | None = field(default=None, metadata={"help": "Only these methods of the file."})
    benchmarks: list[str] | None = field(default=None, metadata={"help": "Only these benchmarks of the file."})
    seeds: list[int] | None = field(default=None, metadata={"help": "Other seeds than the file's."})
    table_only: bool = field(
        default=False, metadata={"help": "Measure nothing: table and plots of what there is, and what is missing."}
    )
    num_workers: int | None = field(
        default=None,
        metadata={"help": "Runs at a time, each in a process of its own. Default: one for each GPU, or 2 without."},
    )

    def __post_init__(self):
        check_types(self)
        check_ranges(self, num_workers=(1, MOST))


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
    bases, below, imports = config.pop("base", []), {}, config.pop("imports", [])
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
    return Path(args.output_dir or Path("out", Path(args.config).stem))


def plan(args: CompareArguments, config: dict) -> list[Run]:
    """All runs of the table."""
    folder, runs, imports = folder_of(args), [], tuple(config.get("imports", ()))
    for path in imports:
        import_file(path)
    for kind in ("methods", "benchmarks"):
        for name in getattr(args, kind) or ():
            if name not in config[kind]:
                raise OptionError(f"--{kind}: {args.config} has no {name!r}{nearest(name, config[kind])}")
    for seed in args.seeds or config.get("seeds", [0]):
        for benchmark in config["benchmarks"]:
            if benchmark not in BENCHMARKS:
                near = nearest(str(benchmark), BENCHMARKS)
                raise OptionError(f"There is no benchmark {benchmark!r}{near} There are {', '.join(BENCHMARKS)}.")
            for method in config["methods"]:
                chosen = args.methods is None or method in args.methods
                if not chosen or (args.benchmarks is not None and benchmark not in args.benchmarks):
                    continue
                options = {**chosen_options(config, benchmark, method), "benchmark": benchmark, "seed": seed}
                if BENCHMARKS[benchmark].scenario == "class" and seed:
                    options.setdefault("class_order_seed", seed)
                if args.backbone is not None:
                    options["backbone"] = args.backbone
                if args.data_root is not None:
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
    suited = next((name for name in names if name in BENCHMARKS[benchmark].tuned), None)
    common = {**BENCHMARKS[benchmark].options_for(suited), **config.get("options", {}), **of_benchmark}
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


def measure(run: Run) -> dict:
    """Learns a method. Gives its row of the CSV."""
    for path in run.imports:  # in a process of its own
        import_file(path)
    (stream_options, backbone_options, training_options), _ = split_options(run)
    stream: TaskStream = StreamArguments(**stream_options).load()
    backbone = BackboneArguments(**backbone_options)
    # Runs share the cores, and cached images are read faster than workers start.
    own = {"disable_tqdm": True, "resume_from_checkpoint": "auto", "dataloader_num_workers": 0}
    training = ContinualTrainingArguments(**{**own, **training_options, "output_dir": run.folder})
    method = make_method(run)
    report = learn(stream, backbone, training, method)
    forwards = forwards_per_image(open_model(backbone, training, method), stream)
    return row_of(run, report, training, stream) | {"forwards_per_image": round(forwards, 3)}


def forwards_per_image(model: ContinualModel, stream: TaskStream) -> float:
    """Forward passes of the backbone that the prediction of an image takes, counted layer by layer on a few images."""
    backbone, counts = model.backbone, [0]
    whole = backbone.layout.layers is None
    layers = [backbone.model] if whole else list(backbone.model.get_submodule(backbone.layout.layers))

    def count(layer: torch.nn.Module, inputs: tuple, options: dict) -> None:
        counts[0] += len(next(value for value in (*inputs, *options.values()) if isinstance(value, torch.Tensor)))

    images = [open_image(encoded) for task in stream for encoded, _, _ in islice(task.test, IMAGES_COUNTED)]
    handles = [layer.register_forward_pre_hook(count, with_kwargs=True) for layer in layers]
    model.predict(images)
    for handle in handles:
        handle.remove()
    return counts[0] / (len(layers) * len(images))


def row_of(run: Run, report: StreamReport, training: ContinualTrainingArguments, stream: TaskStream) -> dict:
    environment, summary = report.environment, report.summary()
    if run.options.get("joined"):  # learnt once, it has no way to go
        summary = {name: summary[name] for name in ("average_accuracy", "calibration_error")}
    images = [len(task.train.dataset) for task in stream]
    stepped = [count for count, seconds in zip(images, report.seconds, strict=True) if "train" in seconds]
    count = sum if METHODS[run.options["method"]].independent else max
    backbone = environment["backbone"]
    name = backbone["name_or_path"]
    shown = {name: value for name, value in run.options.items() if name not in ("dataset", "experts_from", "backbone")}
    return {
        "benchmark": run.benchmark,
        "method": run.method,
        "seed": run.seed,
        **{name: f"{summary[name]:.6f}" if name in summary else "" for name in (*MEASURES, *MORE_MEASURES)},
        "trained_parameters": count(report.expert_parameters),
        "stored_bytes": sum(report.stored_bytes),
        "train_images": sum(images),
        "images_seen": training.num_train_epochs * sum(stepped),
        "seconds": round(sum(sum(parts.values()) for parts in report.seconds), 1),
        "train_seconds": round(sum(parts.get("train", 0.0) for parts in report.seconds), 1),
        "test_forwards_per_image": round(report.test_forwards_per_image, 3),
        "backbone": Path(name).name if Path(name).exists() else name,
        "backbone_revision": backbone["revision"] or "",
        "weight_hash": backbone["weight_hash"],
        "image_size": backbone["image_size"],
        "device": environment["device"],
        "num_processes": environment["num_processes"],
        "versions": json.dumps(environment["versions"]),
        "options": json.dumps(shown, sort_keys=True),
        "accuracy_matrix": json.dumps(report.to_dict()["accuracy_matrix"]),
    }


def run_all(runs: list[Run], results: Path, num_workers: int | None) -> list[dict]:
    """Runs what the CSV does not have yet. Gives its rows, those of these runs, in their order."""
    num_workers = num_workers or torch.cuda.device_count() or 2
    rows = {key_of(row): row for row in read_rows(results)}
    for run in runs:
        check_same(run, rows.get(run.key), results)
    todo = [run for run in runs if run.key not in rows]
    chains = chains_of(todo, rows)
    print(f"{len(runs)} runs, of which {len(runs) - len(todo)} stand in {results} already", flush=True)

    def note(run: Run, result: Future) -> bool:
        """Keeps the row of a run that has ended; says why if there is none."""
        if (error := result.exception()) is not None:
            print(f"{', '.join(map(str, run.key))}: failed", *traceback.format_exception(error), sep="\n", flush=True)
            return False
        row = result.result()
        rows[run.key] = row
        write_rows(rows.values(), results)
        print(f"{row['benchmark']}, {row['method']}, seed {row['seed']}: {row['average_accuracy']}", flush=True)
        return True

    if num_workers == 1:
        in_order(chains, at_once, note, 1)
    elif chains:
        context = multiprocessing.get_context("spawn")  # CUDA cannot be forked
        places = context.Queue()
        for place in range(num_workers):
            places.put(place)
        settings = (places, num_workers, torch.cuda.device_count())
        with ProcessPoolExecutor(num_workers, context, initializer=settle_worker, initargs=settings) as pool:
            in_order(chains, lambda run: pool.submit(measure, run), note, num_workers)
    return [rows[run.key] for run in runs if run.key in rows]


def at_once(run: Run) -> Future:
    """Runs it in this process. An interruption is no failure of the run: it goes up."""
    result: Future = Future()
    try:
        result.set_result(measure(run))
    except Exception as error:
        result.set_exception(error)
    return result


def in_order(
    chains: list[list[Run]],
    start: Callable[[Run], Future],
    note: Callable[[Run, Future], bool],
    num_workers: int,
) -> None:
    """Starts runs as workers become free, those that take over experts once these are trained."""
    ready, takers, running = deque[Run](), dict[tuple, list[Run]](), dict[Future, Run]()
    for first, *others in chains:
        ready.append(first)
        if first.needs is None:
            takers[first.key] = others
        else:
            ready.extend(others)
    while ready or running:
        while ready and len(running) < num_workers:
            run = ready.popleft()
            running[start(run)] = run
        for ended in wait(running, return_when=FIRST_COMPLETED).done:
            run = running.pop(ended)
            if note(run, ended):
                ready.extendleft(reversed(takers.pop(run.key, [])))  # next, as they take seconds


def settle_worker(places, num_workers: int, num_gpus: int) -> None:
    """Gives a process its GPU, before it has touched any, or its share of the cores."""
    place = places.get()
    if num_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(place % num_gpus)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_workers))


def chains_of(runs: list[Run], rows: dict) -> list[list[Run]]:
    """Runs that must follow each other: one that trains, and those that take over its experts."""
    chains: dict[tuple, list[Run]] = {run.key: [run] for run in runs if run.needs is None}
    for run in runs:
        if run.needs is not None:
            giver = (run.benchmark, run.needs, run.seed)
            if giver not in chains and not Path(run.options["experts_from"], "config.json").is_file():
                raise ConfigError(f"{run.method} takes the experts of {run.needs}, which is not among the runs.")
            chains.setdefault(giver, []).append(run)
    return list(chains.values())


def check_same(run: Run, row: dict | None, results: Path) -> None:
    """A row that was measured with other options must not pass for this run."""
    if row is None:
        return
    before = json.loads(row["options"])
    changed = [name for name, value in before.items() if run.options.get(name) != value]
    if changed:
        raise ConfigError(
            f"{results} has {run.key} with {changed[0]}={before[changed[0]]!r}, not {run.options.get(changed[0])!r}. "
            "Delete that row, or name another file with --results."
        )


def command_for(args: CompareArguments) -> str:
    """The command that measures cells, but for their names. Paths that are absolute here stand in capitals."""
    words = ["python", "recipes/compare.py"]
    for name in ("config", "output_dir", "results", "backbone", "data_root"):
        value = getattr(args, name)
        if value is not None:
            words += [f"--{name}", name.upper() if Path(value).is_absolute() else shlex.quote(value)]
    return " ".join(words)


def main():
    (args,) = OptionParser((CompareArguments,)).read()
    config = read_config(args.config)
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
    table = make_table(rows, [run.key for run in runs], command_for(args), families)
    results.with_suffix(".md").write_text(table, encoding="utf-8")
    shown = [row for row in rows if row["method"] not in config.get("undrawn", ())]
    paths = draw(shown, results.with_suffix(""), families, config.get("references", ()), config.get("along", ""))
    print(table)
    print(f"results: {results}    table: {results.with_suffix('.md')}    pictures: {paths[0]}, ...")
    print(f"next, another seed: {command_line()} --seeds {max(int(row['seed']) for row in rows) + 1}")
    if not args.table_only:
        check_complete(rows, runs)


def check_complete(rows: list[dict], runs: list[Run]) -> None:
    """Raises an error that names the runs that have no row: they failed, or those did whose experts they take over."""
    missing = {run.key for run in runs} - {key_of(row) for row in rows}
    if missing:
        names = ", ".join("/".join(map(str, key)) for key in sorted(missing))
        raise HfClpeftError(f"{len(missing)} of {len(runs)} runs failed: {names}. The same command tries them again.")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
