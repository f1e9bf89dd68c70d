"""The state of a task's training, again and again on disk, so that a killed run goes on where it was."""

import errno
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save

from ..config.text import get_logger
from ..storage.folder import atomic, hash_file, safe_path


logger = get_logger(__name__)

FOLDER = "checkpoints"
STATE_NAME = "state.json"
TENSORS_NAME = "state.safetensors"
BESIDE = 2**17  # bytes of a checkpoint besides its tensors, and a few more
IN_WORDS = {
    "data": "other training images",
    "classes": "other classes",
    "model": "another model before the task",
    "method": "another method",
    "backbone": "another backbone",
}


@dataclass
class Progress:
    """How far the training of a task is.

    Args:
        task (`str`): Its name.
        made_with (`dict`): What must not differ, or the steps to come would not be those of an undisturbed run.
        step (`int`): Optimizer steps done.
        epoch (`int`): The epoch that it is in.
        batch (`int`): Batches of that epoch that are done.
        logged (`int`): Optimizer steps of all tasks, as trackers count them.
    """

    task: str
    made_with: dict
    step: int = 0
    epoch: int = 0
    batch: int = 0
    logged: int = 0


@dataclass
class Checkpoints:
    """Checkpoints of one output folder, the newest of them kept. Each is written as a whole or not at all.

    What is read is JSON and safetensors, and only if it is, byte for byte, what was written.

    Args:
        output_dir (`str` or `Path`): Folder of the run.
        keep (`int`): How many to keep.
        rank (`int`): Number of this process; each keeps its random state.
    """

    output_dir: str | Path
    keep: int
    rank: int = 0
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder = safe_path(self.output_dir, FOLDER)

    def save(
        self,
        progress: Progress,
        tensors: dict[str, torch.Tensor],
        values: dict,
        position: dict | None,
        wait: Callable[[], None],
    ) -> None:
        """Writes a checkpoint: the main process what all share, every process its random state and its position.

        Args:
            progress ([`Progress`]): How far it is.
            tensors (`dict[str, torch.Tensor]`): Weights and the optimizer's state.
            values (`dict`): What is not a tensor, ready for JSON.
            position (`dict`, *optional*): Where in the images this process is, ready for JSON.
            wait (callable): Waits for the other processes.

        Raises:
            `OSError`: It cannot be written, for example because the disk is full; those before are untouched.
        """
        path = self.folder / f"{progress.task}-{progress.step:08d}"
        beside = self.folder / ".beside"  # what is each process's own, until all are there
        try:
            self._write(path, beside, progress, tensors, values, position, wait)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{path} could not be saved ({error.strerror or error}). Mend that, and go on where it was saved last "
                "with --resume_from_checkpoint auto.",
            ) from error
        finally:
            if self.rank == 0:
                shutil.rmtree(beside, ignore_errors=True)

    def _write(
        self,
        path: Path,
        beside: Path,
        progress: Progress,
        tensors: dict[str, torch.Tensor],
        values: dict,
        position: dict | None,
        wait: Callable[[], None],
    ) -> None:
        num_bytes = sum(tensor.nbytes for tensor in tensors.values()) + BESIDE
        if self.rank == 0:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            free = shutil.disk_usage(beside).free
            if free < num_bytes:
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {num_bytes:,} bytes needed, {free:,} free")
        wait()
        random_tensors, random_values = random_state()
        write_tensors(beside / f"rank-{self.rank}.safetensors", random_tensors)
        text = json.dumps({"random": random_values, "position": position})
        (beside / f"rank-{self.rank}.json").write_text(text, encoding="utf-8")
        wait()
        if self.rank == 0:
            with atomic(path, num_bytes) as staging:
                for file in beside.iterdir():
                    shutil.move(file, staging)
                write_tensors(staging / TENSORS_NAME, tensors)
                files = {file.name: hash_file(file) for file in sorted(staging.iterdir())}
                content = {"progress": asdict(progress), "values": values, "files": files}
                text = json.dumps(content, allow_nan=False)
                (staging / STATE_NAME).write_text(text, encoding="utf-8")
            for old in self._newest()[self.keep :]:
                shutil.rmtree(old)
        wait()

    def latest(self, wanted: Progress) -> tuple[Progress, dict[str, torch.Tensor], dict, dict | None, tuple] | None:
        """The newest whole checkpoint of a task. A damaged one is passed over with a warning.

        Args:
            wanted ([`Progress`]): Task, and what must not differ.

        Returns:
            What [`~Checkpoints.save`] was given, and the random state of this process for [`set_random_state`]; `None`
            if there is nothing to go on with.
        """
        made_with = json.loads(json.dumps(wanted.made_with))
        told = False
        for path in self._newest():
            try:
                content = json.loads((path / STATE_NAME).read_text(encoding="utf-8"))
                progress = Progress(**content["progress"])
                if progress.task != wanted.task:
                    continue
                if progress.made_with != made_with:
                    if not told and self.rank == 0:
                        differences = _differences(progress.made_with, made_with)
                        logger.warning(
                            "The state in %s was saved with %s. %s is trained anew.", path, differences, wanted.task
                        )
                    told = True
                    continue
                damaged = [name for name, digest in content["files"].items() if hash_file(path / name) != digest]
                if damaged:
                    raise ValueError(f"{damaged[0]} is not what was written")
                own = json.loads((path / f"rank-{self.rank}.json").read_text(encoding="utf-8"))
                random_state = load_file(path / f"rank-{self.rank}.safetensors"), own["random"]
                return progress, load_file(path / TENSORS_NAME), content["values"], own["position"], random_state
            except (OSError, ValueError, KeyError, TypeError) as error:
                logger.warning("The checkpoint %s is damaged (%s); going on with the one before.", path, error)
        return None

    def clear(self) -> None:
        """Removes all: the task is learnt, and the model is saved."""
        if self.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _newest(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if re.fullmatch(r"[A-Za-z0-9].*-\d{8}", path.name)]
        return sorted(found, key=lambda path: path.name[-8:], reverse=True)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes safetensors by Python, whose errors say that a disk is full; those of the library are of another kind."""
    path.write_bytes(save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}))


def _differences(found: dict, wanted: dict) -> str:
    """In words, what is not the same in two descriptions of what a state depends on."""
    names = [name for name in sorted(found | wanted) if found.get(name) != wanted.get(name)]
    told = [IN_WORDS.get(name) or f"{name}={found.get(name)!r}, not {wanted.get(name)!r}" for name in names]
    return "; ".join(told)


def random_state() -> tuple[dict[str, torch.Tensor], dict]:
    """State of all random generators of this process: tensors, and what is ready for JSON."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    numpy_state: Any = np.random.get_state()  # a tuple; a mapping only for those who ask for one
    name, keys, position, has_gauss, gauss = numpy_state
    tensors["numpy"] = torch.from_numpy(keys.astype(np.int64))
    version, internal, gauss_next = random.getstate()
    values = {"numpy": [name, position, has_gauss, gauss], "python": [version, list(internal), gauss_next]}
    return tensors, values


def set_random_state(tensors: dict[str, torch.Tensor], values: dict) -> None:
    """Inverse of [`random_state`]."""
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    name, position, has_gauss, gauss = values["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = values["python"]
    random.setstate((version, tuple(internal), gauss_next))


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict]:
    """State of an optimizer: tensors by name, and the rest ready for JSON."""
    state = optimizer.state_dict()
    tensors, values = {}, {}
    for parameter, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{parameter}.{name}"] = value
            else:
                values[f"{parameter}.{name}"] = value
    return tensors, {"state": values, "param_groups": state["param_groups"]}


def unpack_optimizer(tensors: dict[str, torch.Tensor], values: dict) -> dict:
    """Inverse of [`pack_optimizer`]: a `state_dict`."""
    state: dict[int, dict] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, parameter, name = key.split(".", 2)
            state.setdefault(int(parameter), {})[name] = tensor
    for key, value in values["state"].items():
        parameter, name = key.split(".", 1)
        state.setdefault(int(parameter), {})[name] = value
    return {"state": state, "param_groups": values["param_groups"]}
