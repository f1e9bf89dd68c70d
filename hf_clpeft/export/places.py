"""Where an export is written to, and whose expert it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME

from ..config.errors import ConfigError
from ..config.model import CONFIG_NAME
from ..experts import ExpertError
from ..model import ContinualModel
from ..storage.files import EXPERTS_FOLDER
from ..storage.folder import atomic, hash_file


WEIGHTS = (".safetensors", ".onnx", ".onnx.data")


@contextmanager
def written(folder: str | Path, overwrite: bool) -> Iterator[Path]:
    """Yields a staging folder, which replaces the target atomically unless that holds another model.

    Raises:
        [`ConfigError`]: The target holds another model, or one of this library.
        `OSError`: It cannot be written; the folder is unchanged.
    """
    with atomic(folder) as staging:
        yield staging
        files = [Path(folder, CONFIG_NAME), Path(folder, ADAPTER_CONFIG_NAME)]
        weights = [path for ending in WEIGHTS for path in Path(folder).glob(f"*{ending}")]
        for path in filter(Path.is_file, files + weights):
            new = staging / path.name
            if not (new.is_file() and hash_file(new) == hash_file(path)) and not overwrite:
                raise ConfigError(
                    f"{path} belongs to another model, which an export would spoil. Write into another folder, or "
                    "pass overwrite=True (--overwrite)."
                )
        if Path(folder, EXPERTS_FOLDER).exists():
            raise ConfigError(
                f"{folder} holds a model of hf_clpeft, which an export would spoil; name another folder."
            )


def find_task(model: ContinualModel, task: str) -> int:
    """Index of a task; raises [`ConfigError`] if the model has learnt none of that name."""
    names = [learnt.name for learnt in model.config.tasks]
    if task not in names:
        raise ConfigError(f"The model has learnt no task {task!r}; it knows {', '.join(names) or 'none yet'}.")
    return names.index(task)


def find_expert(model: ContinualModel, number: int) -> int:
    """Index of a task's expert in the bank; raises [`ExpertError`] if experts do not belong to tasks."""
    position = model.method.expert_of(number)
    if position is None:
        raise ExpertError(f"{model.config.method.name} has no expert that belongs to a task.")
    return position
