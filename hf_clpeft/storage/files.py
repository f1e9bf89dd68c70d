"""The files in a model's folder, and checks before they are read."""

import atexit
import os
import shutil
from pathlib import Path
from tempfile import mkdtemp

from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..config import CONFIG_NAME, ConfigError, ContinualConfig
from ..reports.card import CARD_NAME
from .folder import READY, Version, hash_file, unfinished_change, version_of
from .lineage import difference
from .pictures import EXAMPLES, THUMBNAILS, check_listed, check_size, task_of


ROUTER_NAME = "router.safetensors"
HEADS_NAME = "heads.safetensors"
METHOD_NAME = "method.safetensors"  # further state of a method, if any
PROCESSOR_NAME = "preprocessor_config.json"
EXPERTS_FOLDER = "experts"
SUMS_FOLDER = "sums"  # what the router knows of each task, if it keeps tasks apart
SAVE_ELSEWHERE = "Save this one into another folder, or pass overwrite=True."
PICKLES = {".bin", ".ckpt", ".dill", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"}
WEIGHTS = {".safetensors", *PICKLES}


def check_same_model(
    folder: str | Path, config: ContinualConfig | None, ways_out: str = SAVE_ELSEWHERE, overwrite: bool = False
) -> ContinualConfig | None:
    """Checks that a folder is empty or holds an earlier state of a model, so that it may be saved there.

    Args:
        folder (`str` or `Path`): Only read.
        config ([`ContinualConfig`], *optional*): Configuration of the model; `None` for a new one.
        ways_out (`str`, *optional*): Advice at the end of the error message.
        overwrite (`bool`, *optional*, defaults to `False`): Accept another model in the folder.

    Returns:
        [`ContinualConfig`], *optional*: Configuration of the model in the folder, which must not be modified.

    Raises:
        [`ConfigError`]: Another model would be lost, or the folder has unknown weights, with which it would not load.
    """
    saved, there, what = as_saved(folder), None, None
    try:
        there = known_config(saved)
    except FileNotFoundError:
        pass
    except ConfigError as error:
        what = f"one that cannot be read ({error})"
    if there is not None and there.tasks:
        learnt = f"one that has learnt {', '.join(task.name for task in there.tasks[:3])}"
        what = learnt if config is None else difference(config, there)
    if what is not None and not overwrite:
        raise ConfigError(f"{folder} holds another model, which would be lost: {what}. {ways_out}")
    known = there.files if there is not None else {}
    vouching = config or there
    if vouching is not None:
        check_names([name for name in _names_in(saved) if name not in known], vouching, folder)
    return there


def as_saved(folder: str | Path) -> Path:
    """The folder to read a model from: the given one, or a copy with a committed change that was not finished.

    The given folder is not modified. The copy is deleted when this process ends.

    Raises:
        [`ConfigError`]: The change is invalid or leads outside of the folder.

    Example:

    ```py
    >>> from hf_clpeft.storage.files import as_saved

    >>> as_saved("out").as_posix()
    'out'

    ```
    """
    folder = Path(folder)
    try:
        change = unfinished_change(folder)
    except FileNotFoundError:  # another process has just finished it
        return folder
    if change is None:
        return folder
    removed, names = change
    place = Path(mkdtemp(prefix="hf-clpeft-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    ours = {name for name in _names_in(folder) if Path(name).suffix in {".json", ".safetensors", ".jpg", *PICKLES}}
    kept = {name for name in ours if not any(f"{name}/".startswith(f"{gone}/") for gone in removed)}
    for name in kept | set(names):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        new = folder / READY / name
        shutil.copyfile(new if name in names and new.is_file() else folder / name, place / name)
    return place


def known_config(folder: str | Path) -> ContinualConfig:
    """[`ContinualConfig.load`], cached until the file changes: each save would read that of the save before it.

    It must not be modified.
    """
    version = version_of(Path(folder, CONFIG_NAME))
    known = _latest.get(version) if version is not None else None
    if known is None:
        known = ContinualConfig.load(folder)
        _latest.clear()
        if version is not None:
            _latest[version] = known
    return known


_latest: dict[Version, ContinualConfig] = {}  # at most one


def expert_files(name: str) -> list[str]:
    """Paths of an expert's files in a model's folder."""
    return [f"{EXPERTS_FOLDER}/{name}/{file}" for file in (ADAPTER_CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)]


def sums_file(task: str) -> str:
    """Path of the file of a router's sums over one task."""
    return f"{SUMS_FOLDER}/{task}.safetensors"


def is_sums(path: str) -> bool:
    """Whether a path is one of [`sums_file`]."""
    return path.startswith(f"{SUMS_FOLDER}/")


def check_files(folder: Path, config: ContinualConfig) -> None:
    """Raises [`ConfigError`] unless a folder has all files of its configuration with their hashes, and no others."""
    experts = {path for name in config.expert_names for path in expert_files(name)}
    sums = {sums_file(task.name) for task in config.tasks}
    expected = {ROUTER_NAME, HEADS_NAME, PROCESSOR_NAME, *experts} | (sums if sums & config.files.keys() else set())
    check_listed(config.files)
    names = {task.name for task in config.tasks}
    pictures = {path for path in config.files if task_of(path) in names}
    unnamed, unknown = expected - config.files.keys(), config.files.keys() - expected - pictures - {METHOD_NAME}
    if unnamed or unknown:
        raise ConfigError(
            f"{folder / CONFIG_NAME} does not fit together: of the files that its tasks need it lacks "
            f"{sorted(unnamed)[:3]}, and it names {sorted(unknown)[:3]}, which no task needs."
        )
    check_names([name for name in _names_in(folder) if name not in config.files], config, folder)
    for path, digest in config.files.items():
        version = version_of(f"{folder}/{path}")
        if version is None:
            raise ConfigError(f"{folder} lacks the file {path}, so the model is not whole.")
        check_size(path, version.size)
        if hash_file(f"{folder}/{path}") != digest:
            raise ConfigError(
                f"{folder / path} is not the file that {CONFIG_NAME} vouches for: it is damaged or from another model."
            )


def check_names(names: list[str], config: ContinualConfig, where: str | Path) -> None:
    """Raises [`ConfigError`] on pickles, and on weights that are not listed in the configuration.

    Args:
        names (`list[str]`): Paths in a model's folder or repo.
        config ([`ContinualConfig`]): Its configuration.
        where (`str` or `Path`): The folder or repo, for error messages.
    """
    for name in sorted(names):
        if Path(name).suffix.lower() in PICKLES:
            raise ConfigError(
                f"{where} holds {name}, which can run code when read. Only safetensors and JSON are read."
            )
        weights = name.startswith((f"{EXPERTS_FOLDER}/", f"{SUMS_FOLDER}/")) or name.endswith(".safetensors")
        if weights and name not in config.files and Path(name).name != CARD_NAME:
            raise ConfigError(f"{where} holds {name}, which its {CONFIG_NAME} does not know.")


def _names_in(folder: Path) -> list[str]:
    """Paths that may belong to a model: files at the top level, and everything in the folders of its parts."""
    names = [entry.name for entry in _entries(folder) if entry.is_file()]
    for part in (EXPERTS_FOLDER, SUMS_FOLDER, THUMBNAILS, EXAMPLES):
        for entry in _entries(folder / part):
            inside = [f"{entry.name}/{name}" for name in os.listdir(entry)] if entry.is_dir() else [entry.name]
            names += [f"{part}/{name}" for name in inside]
    return names


def _entries(folder: Path) -> list[os.DirEntry]:
    """What is in a folder, if it is one; without a `Path` for each of thousands of experts."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return list(entries)
