"""Checkpoints inside a task, from which a killed run resumes."""

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save

from ..config.text import get_logger
from ..storage.folder import atomic, check_free_space, hash_file, safe_path


logger = get_logger(__name__)

FOLDER = "checkpoints"
STATE_NAME = "state.json"
TENSORS_NAME = "state.safetensors"
OVERHEAD = 2**17  # upper bound of a checkpoint's bytes besides tensors
DESCRIPTIONS = {
    "data": "other training images",
    "classes": "other classes",
    "model": "another model before the task",
    "method": "another method",
    "backbone": "another backbone",
}


@dataclass
class Progress:
    """Progress of a task's training.

    Args:
        task (`str`): Name of the task.
        made_with (`dict`): Everything that must be equal for a resumed run to repeat an uninterrupted one.
        step (`int`): Optimizer steps done.
        epoch (`int`): The current epoch.
        batch (`int`): Batches of this epoch done.
        logged (`int`): Optimizer steps over all tasks, the x axis of trackers.
    """

    task: str
    made_with: dict
    step: int = 0
    epoch: int = 0
    batch: int = 0
    logged: int = 0


@dataclass
class Checkpoints:
    """Checkpoints of an output folder, of which the newest are kept. Each is written atomically.

    Only JSON and safetensors are read, after their hashes are verified.

    Args:
        output_dir (`str` or `Path`): Folder of the run.
        keep (`int`): Number of checkpoints to keep.
        rank (`int`): Rank of this process; each saves its own random state.
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
        """Writes a checkpoint: the main process the shared state, every process its random state and data position.

        Args:
            progress ([`Progress`]): Progress of the task.
            tensors (`dict[str, torch.Tensor]`): Weights and optimizer state.
            values (`dict`): JSON-serialisable state besides tensors.
            position (`dict`, *optional*): JSON-serialisable position of this process in the data.
            wait (callable): A barrier over all processes.

        Raises:
            `OSError`: Writing failed, for example because the disk is full; earlier checkpoints are intact.
        """
        path = self.folder / f"{progress.task}-{progress.step:08d}"
        with self._collecting(path) as ranks:
            num_bytes = sum(tensor.nbytes for tensor in tensors.values()) + OVERHEAD
            if self.rank == 0:
                check_free_space(ranks, num_bytes)
            wait()
            random_tensors, random_values = random_state()
            write_tensors(ranks / f"rank-{self.rank}.safetensors", random_tensors)
            text = json.dumps({"random": random_values, "position": position})
            (ranks / f"rank-{self.rank}.json").write_text(text, encoding="utf-8")
            wait()
            if self.rank == 0:
                with atomic(path, num_bytes) as staging:
                    for file in ranks.iterdir():
                        shutil.move(file, staging)
                    write_tensors(staging / TENSORS_NAME, tensors)
                    files = {file.name: hash_file(file) for file in sorted(staging.iterdir())}
                    content = {"progress": asdict(progress), "values": values, "files": files}
                    text = json.dumps(content, allow_nan=False)
                    (staging / STATE_NAME).write_text(text, encoding="utf-8")
                for old in self._newest()[self.keep :]:
                    shutil.rmtree(old)
            wait()

    @contextmanager
    def _collecting(self, path: Path) -> Iterator[Path]:
        """Yields a folder for the files of each process, and explains a failure to write."""
        ranks = self.folder / ".ranks"
        try:
            if self.rank == 0:
                shutil.rmtree(ranks, ignore_errors=True)
                ranks.mkdir(parents=True)
            yield ranks
        except OSError as error:
            raise OSError(
                error.errno,
                f"{path} could not be saved ({error.strerror or error}). Fix that, and resume from the last one with "
                "--resume_from_checkpoint auto.",
            ) from error
        finally:
            if self.rank == 0:
                shutil.rmtree(ranks, ignore_errors=True)

    def latest(self, wanted: Progress) -> tuple[Progress, dict[str, torch.Tensor], dict, dict | None, tuple] | None:
        """The newest intact checkpoint of a task. Damaged ones are skipped with a warning.

        Args:
            wanted ([`Progress`]): The task and `made_with` to match.

        Returns:
            The arguments of [`~Checkpoints.save`] and the random state for [`set_random_state`]; `None` if there is no
            such checkpoint.
        """
        made_with = json.loads(json.dumps(wanted.made_with))
        warned = False
        for path in self._newest():
            try:
                content = json.loads((path / STATE_NAME).read_text(encoding="utf-8"))
                progress = Progress(**content["progress"])
                if progress.task != wanted.task:
                    continue
                if progress.made_with != made_with:
                    if not warned and self.rank == 0:
                        differences = _differences(progress.made_with, made_with)
                        logger.warning(
                            "The checkpoint %s was saved with %s. %s is trained anew.", path, differences, wanted.task
                        )
                    warned = True
                    continue
                damaged = [name for name, digest in content["files"].items() if hash_file(path / name) != digest]
                if damaged:
                    raise ValueError(f"{damaged[0]} does not match its hash")
                own = json.loads((path / f"rank-{self.rank}.json").read_text(encoding="utf-8"))
                random_state = load_file(path / f"rank-{self.rank}.safetensors"), own["random"]
                return progress, load_file(path / TENSORS_NAME), content["values"], own["position"], random_state
            except (OSError, ValueError, KeyError, TypeError) as error:
                logger.warning("The checkpoint %s is damaged (%s); trying the one before.", path, error)
        return None

    def clear(self) -> None:
        """Deletes all checkpoints, once the task's model is saved."""
        if self.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _newest(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if re.fullmatch(r"[A-Za-z0-9].*-\d{8}", path.name)]
        return sorted(found, key=lambda path: path.name[-8:], reverse=True)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes safetensors through Python, which raises `OSError` on a full disk, unlike the library's own writer."""
    path.write_bytes(save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}))


def _differences(found: dict, wanted: dict) -> str:
    """Describes the differences of two `made_with` in words."""
    names = [name for name in sorted(found | wanted) if found.get(name) != wanted.get(name)]
    parts = [DESCRIPTIONS.get(name) or f"{name}={found.get(name)!r}, not {wanted.get(name)!r}" for name in names]
    return "; ".join(parts)


def random_state() -> tuple[dict[str, torch.Tensor], dict]:
    """State of all random generators of this process: tensors, and JSON-serialisable values."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    numpy_state: Any = np.random.get_state()  # a tuple, as legacy=True by default
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
    """State of an optimizer: tensors by name, and JSON-serialisable values."""
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
