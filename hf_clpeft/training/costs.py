"""What a task has cost, and what it takes to repeat the numbers."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from ..config.text import get_logger
from ..methods.learners import FrozenLearner, TaskLearner
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


def bytes_beside_experts(model: ContinualModel) -> int:
    """Bytes of router and heads; none before the first task."""
    modules = (model.router, model.heads) if model.config.tasks else ()
    return sum(tensor.nbytes for module in modules for tensor in module.state_dict().values())


def count_trained(model: ContinualModel, learner: TaskLearner) -> tuple[int, int, int]:
    """Parameters that the last task trains: of experts, of keys, and of the head.

    Args:
        model ([`ContinualModel`]): Has learnt the task.
        learner ([`TaskLearner`]): What was trained.

    Returns:
        `tuple[int, int, int]`
    """
    method = model.config.method
    trained = [*model.bank] if method.experts == "pool" else [*model.bank][-1:]
    expert = 0 if isinstance(learner, FrozenLearner) else sum(expert.num_parameters for expert in trained)
    keys = model.router.keys.numel() if method.experts == "pool" else 0
    head = 0 if method.classifier == "router" else sum(rows.numel() for rows in learner.head.parameters())
    return expert, keys, head


def note_costs(
    report: StreamReport,
    model: ContinualModel,
    learner: TaskLearner,
    num_images: int,
    args: ContinualTrainingArguments,
    seconds: dict[str, float],
    stored: int,
) -> None:
    """Opens the report's row of the task that a model has just learnt.

    Args:
        report ([`StreamReport`]): Where to note it.
        model ([`ContinualModel`]): Has learnt the task.
        learner ([`TaskLearner`]): What was trained.
        num_images (`int`): Training images.
        args ([`ContinualTrainingArguments`]): How it was trained.
        seconds (`dict[str, float]`): Of [`timed`].
        stored (`int`): [`bytes_beside_experts`] before the task.
    """
    method, first = model.config.method, len(model.config.tasks) == 1
    expert, keys, head = count_trained(model, learner)
    # Where tasks share experts, these were there before, unless this is the first task.
    added = expert if first or method.experts == "per_task" else 0
    report.catch_up(model.config.tasks[:-1])
    report.add_task(
        learner.config.name,
        learner.config.title,
        expert_parameters=expert + keys,
        head_parameters=head,
        stored_bytes=4 * added + bytes_beside_experts(model) - stored,
        train_images_per_second=num_images * args.num_train_epochs / (seconds.get("train") or math.nan),
        untrained_accuracy=1 / len(learner.config.classes),
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
