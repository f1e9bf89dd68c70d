"""Runs what a comparison has planned, in several processes, and keeps a row of each run in a CSV."""

import json
import multiprocessing
import os
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import islice
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook

from ..backbones.pictures import open_image
from ..config.errors import ConfigError, HfClpeftError
from ..methods import METHODS
from ..model import ContinualModel
from ..reports.report import StreamReport
from ..streams import TaskStream
from ..training import ContinualTrainingArguments
from ..training.options import BackboneArguments, StreamArguments
from ..training.recipe import learn, open_model
from .plan import Run, import_file, make_method, split_options
from .rows import MEASURES, key_of, read_rows, write_rows


MORE_MEASURES = ("backward_transfer", "calibration_error")
IMAGES_COUNTED = 4  # of each task, whose forward passes are counted


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
    kinds = {type(layer) for layer in layers}

    def count(module: torch.nn.Module, inputs: tuple, output: Any) -> None:
        if type(module) in kinds:  # of the backbone, or of the copy of it that an expert runs on
            counts[0] += len(output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", output))

    images = [open_image(encoded) for task in stream for encoded, _, _ in islice(task.test or (), IMAGES_COUNTED)]
    handle = register_module_forward_hook(count)
    model.predict(images)
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


def settle_worker(places: Queue, num_workers: int, num_gpus: int) -> None:
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


def check_complete(rows: list[dict], runs: list[Run]) -> None:
    """Raises an error that names the runs that have no row: they failed, or those did whose experts they take over."""
    missing = {run.key for run in runs} - {key_of(row) for row in rows}
    if missing:
        names = ", ".join("/".join(map(str, key)) for key in sorted(missing))
        raise HfClpeftError(f"{len(missing)} of {len(runs)} runs failed: {names}. The same command tries them again.")
