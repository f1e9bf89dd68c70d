"""What a task has cost, and what it takes to repeat the numbers."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from ..config.text import get_logger
from ..model import ContinualModel
from ..reports.report import StreamReport
from ..reports.versions import library_versions
from .arguments import ContinualTrainingArguments


logger = get_logger(__name__)


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Notes how long something takes.

    Args:
        seconds (`dict[str, float]`): Where to note it.
        part (`str`): Under which name.
    """
    start = time.perf_counter()
    yield
    seconds[part] = round(time.perf_counter() - start, 3)


def note_costs(
    report: StreamReport,
    model: ContinualModel,
    trained: tuple[int, int],
    num_images: int,
    args: ContinualTrainingArguments,
    seconds: dict[str, float],
    stored: int,
) -> None:
    """Opens the report's row of the task that a model has just learnt.

    Args:
        report ([`StreamReport`]): Where to note it.
        model ([`ContinualModel`]): Has learnt the task.
        trained (`tuple[int, int]`): Parameters of experts and of the head, see [`Method.costs`].
        num_images (`int`): Training images.
        args ([`ContinualTrainingArguments`]): How it was trained.
        seconds (`dict[str, float]`): Of [`timed`].
        stored (`int`): [`Method.num_bytes`] before the task.
    """
    task = model.config.tasks[-1]
    report.catch_up(model.config.tasks[:-1])
    report.add_task(
        task.name,
        task.title,
        expert_parameters=trained[0],
        head_parameters=trained[1],
        stored_bytes=model.method.num_bytes() - stored,
        train_images_per_second=num_images * args.num_train_epochs / (seconds.get("train") or math.nan),
        untrained_accuracy=1 / len(task.classes),
        seconds=seconds,
    )


def describe_environment(
    model: ContinualModel, accelerator: Accelerator, args: ContinualTrainingArguments, before: dict
) -> dict:
    """Backbone, arguments, seed, versions and device of a run, ready for JSON.

    Args:
        model ([`ContinualModel`]): What learns.
        accelerator (`accelerate.Accelerator`): On what.
        args ([`ContinualTrainingArguments`]): How. Where a run is resumed with others than before, that is told.
        before (`dict`): The same of the run before, if there was one; what tasks were trained on is kept.
    """
    device, arguments = accelerator.device, args.decisive()
    former, pictures = before.get("arguments"), before.get("pictures")
    if args.resume_from_checkpoint is not None and isinstance(former, dict) and model.config.tasks:
        changed = [name for name in arguments if former.get(name, arguments[name]) != arguments[name]]
        if changed and accelerator.is_main_process:
            told = ", ".join(f"{name}={former[name]!r}, not {arguments[name]!r}" for name in changed)
            logger.warning("The tasks that are learnt already were learnt with %s.", told)
    return {
        "backbone": vars(model.config.backbone),
        "seed": args.seed,
        "arguments": arguments,
        "pictures": pictures if isinstance(pictures, dict) else {},
        "versions": library_versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }
