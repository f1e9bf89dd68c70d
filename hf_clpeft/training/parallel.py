"""Task-parallel training: every process trains the independent experts of its own tasks."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from safetensors.torch import load_file

from ..config.checks import read_json
from ..config.errors import ConfigError
from ..methods import Method
from ..model import ContinualModel
from ..storage.folder import atomic, safe_path
from ..streams import Task, TaskStream
from ..streams.stream import BorderlessStream
from .arguments import ContinualTrainingArguments
from .checkpoints import Checkpoints, write_tensors


FOLDER = ".parallel"
TRAINED_NAME, RUN_NAME = "trained.safetensors", "run.json"


class ParallelExperts:
    """Store on disk for experts trained by several processes, from which the model copies them in order.

    Args:
        output_dir (`str` or `Path`): Folder of the run.
        model ([`ContinualModel`]): The model to train.
        args ([`ContinualTrainingArguments`]): Training arguments.
        made_with (`dict`): What must be equal to use stored experts, besides the arguments.
    """

    def __init__(
        self, output_dir: str | Path, model: ContinualModel, args: ContinualTrainingArguments, made_with: dict
    ):
        self.folder, self.model, self.args = safe_path(output_dir, FOLDER), model, args
        self.made_with = json.loads(json.dumps({**args.decisive(), **made_with}))

    def todo(self, stream: TaskStream, rank: int, num_processes: int) -> list[tuple[int, Task]]:
        """The shard of a process: indices and tasks that the model has not learnt, every `num_processes`-th."""
        learnt = {task.name for task in self.model.config.tasks}
        tasks = [task for task in stream if task.name not in learnt and task.name not in self.model.config.removed]
        return list(enumerate(tasks, start=len(learnt)))[rank::num_processes]

    def has(self, task: str, trained_on: dict) -> bool:
        """Whether a task's expert is stored, with equal arguments and training data."""
        path = self.folder / task / RUN_NAME
        return path.is_file() and read_json(path)["made_with"] == {**self.made_with, **trained_on}

    def put(self, seconds: float, trained_on: dict) -> None:
        """Stores the trained parameters of the current task atomically."""
        name, tensors = self._trained()
        with atomic(self.folder / name, sum(tensor.nbytes for tensor in tensors.values())) as staging:
            write_tensors(staging / TRAINED_NAME, tensors)
            text = json.dumps({"seconds": seconds, "made_with": {**self.made_with, **trained_on}})
            (staging / RUN_NAME).write_text(text, encoding="utf-8")

    def give(self, seconds: dict[str, float], trained_on: dict) -> bool:
        """Loads the stored parameters of the current task, like [`Donor.give`]."""
        name, tensors = self._trained()
        if not self.has(name, trained_on):
            return False
        found = load_file(self.folder / name / TRAINED_NAME)
        with torch.no_grad():
            for key, tensor in tensors.items():
                tensor.copy_(found[key])
        seconds["train"] = read_json(self.folder / name / RUN_NAME)["seconds"]
        return True

    def checkpoints(self, task: str) -> Checkpoints:
        """Checkpoints inside a task, apart from those of all others."""
        return Checkpoints(self.folder / f".{task}", self.args.save_total_limit)

    def _trained(self) -> tuple[str, dict[str, torch.Tensor]]:
        """Name and trainable parameters of the current task."""
        method = self.model.method
        assert method.task is not None
        parameters = [parameter for group in method.parameter_groups(self.args) for parameter in group["params"]]
        return method.task.name, {str(number): parameter.detach() for number, parameter in enumerate(parameters)}

    def clear(self) -> None:
        """Deletes all stored experts."""
        shutil.rmtree(self.folder, ignore_errors=True)


def check_independent(
    option: str, method: Method, stream: TaskStream | BorderlessStream, accelerator: Accelerator
) -> TaskStream:
    """Raises [`ConfigError`], which names the option, unless the experts of a stream can be trained independently."""
    if not isinstance(stream, TaskStream):
        raise ConfigError(f"{option} must know all tasks beforehand; this stream finds them while its images come.")
    if not (method.independent and method.trains):
        raise ConfigError(f"{option} needs an expert per task and masked logits; {method.name} has not.")
    if method.chained:
        raise ConfigError(f"{option} needs experts that are trained apart; those of {method.name} are not.")
    names = [label for task in stream for label in task.classes]
    if method.heads is not None and method.heads.shared and len(set(names)) < len(names):
        raise ConfigError(f"{option} needs head='per_task' where tasks share classes: their rows would be shared.")
    if accelerator.mixed_precision == "fp16":
        raise ConfigError(f"{option} trains in float32 or bf16; choose another mixed_precision than fp16.")
    return stream


class LocalAccelerator:
    """What [`StepLoop`] and [`extract`] need of `accelerate.Accelerator`, without communication between processes.

    Args:
        accelerator (`accelerate.Accelerator`): Provides the device and the precision.
    """

    num_processes, process_index, scaler = 1, 0, None

    def __init__(self, accelerator: Accelerator):
        self.device, self.autocast = accelerator.device, accelerator.autocast
        self.is_main_process = accelerator.is_main_process
        self.gradient_accumulation_steps = accelerator.gradient_accumulation_steps
        self.sync_gradients, self.last_batch = True, False
        self._batches = 0

    def prepare(self, *things: Any) -> Any:
        """Wraps loaders to move batches to the device; returns everything else unchanged."""
        prepared = [
            _OnDevice(thing, self) if isinstance(thing, torch.utils.data.DataLoader) else thing for thing in things
        ]
        return prepared[0] if len(prepared) == 1 else tuple(prepared)

    @contextmanager
    def accumulate(self, module: torch.nn.Module) -> Iterator[None]:
        """Sets `sync_gradients` if an optimizer step is due after this batch."""
        self._batches += 1
        self.sync_gradients = self._batches % self.gradient_accumulation_steps == 0 or self.last_batch
        if self.sync_gradients:
            self._batches = 0
        yield

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulates gradients."""
        (loss / self.gradient_accumulation_steps).backward()

    def clip_grad_norm_(self, parameters: Iterable[torch.Tensor], norm: float) -> None:
        """Clips gradients."""
        torch.nn.utils.clip_grad_norm_(parameters, norm)

    def gather(self, tensors: Any) -> Any:
        """Returns them unchanged."""
        return tensors

    def wait_for_everyone(self) -> None:
        """Does nothing."""


class _OnDevice:
    """A loader that moves batches to the device, and marks the last one."""

    def __init__(self, loader: torch.utils.data.DataLoader, accelerator: LocalAccelerator):
        self.loader, self.accelerator = loader, accelerator

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        batches = iter(self.loader)
        batch = next(batches, None)
        while batch is not None:
            following = next(batches, None)
            self.accelerator.last_batch = following is None
            yield send_to_device(batch, self.accelerator.device, non_blocking=True)
            batch = following
