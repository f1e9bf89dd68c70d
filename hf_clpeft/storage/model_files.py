"""A model as a folder: what is written, and what is checked before a byte of it is believed."""

import atexit
import shutil
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

import torch
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..config.checks import read_json
from ..config.errors import ConfigError, HfClpeftError
from ..config.model import CONFIG_NAME, ContinualConfig, TaskConfig
from ..experts import Expert
from ..experts.naming import rename_old_keys
from ..methods.heads import Heads
from ..methods.learners import check_routes
from ..reports.card import CARD_NAME, make_card
from ..reports.report import METRICS_NAME, REPORT_FILES, StreamReport
from ..reports.versions import library_versions
from .folder import READY, atomic, hash_file, recover, remove_with, safe_path, unfinished_change
from .lineage import difference


if TYPE_CHECKING:
    from ..model import ContinualModel

ROUTER_NAME = "router.safetensors"
HEADS_NAME = "heads.safetensors"
PROCESSOR_NAME = "preprocessor_config.json"
EXPERTS_FOLDER = "experts"
STORED = (torch.float32, torch.int64)  # features, and numbers of classes and tasks
SAVE_ELSEWHERE = "Save this one into another folder, or pass overwrite=True."
PICKLES = {".bin", ".ckpt", ".dill", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"}
WEIGHTS = {".safetensors", *PICKLES}


def save_model(model: "ContinualModel", folder: str | Path, overwrite: bool = False) -> None:
    """Writes a model into a folder, as a whole or not at all. Experts that the folder has already stay as they are.

    What was written is read again, as loading does, before anything takes the place of what was there.

    Args:
        model ([`ContinualModel`]): What to save.
        folder (`str` or `Path`): Made if needed.
        overwrite (`bool`, *optional*, defaults to `False`): Replace another model that the folder holds.

    Raises:
        `OSError`: It cannot be written; what was there before is untouched.
        [`ConfigError`]: The folder holds another model, or this one is not whole and would not load; what was there
            before is untouched.
    """
    folder = Path(folder)
    check_routes(model.router, model.config)
    recover(folder)
    there = check_same_model(folder, model.config, overwrite=overwrite)
    safe_path(folder, EXPERTS_FOLDER)
    names, unchanged, report = model.bank.names, dict(model.unchanged_experts), model.report
    if report is not None:
        report.catch_up(model.config.tasks)
    changed = {
        name: model.bank[index] for index, name in enumerate(names) if not _has(folder, unchanged.get(name, {}))
    }
    tensors = [*model.router.state_dict().values(), *model.heads.state_dict().values()]
    num_bytes = sum(tensor.nbytes for tensor in tensors) + sum(
        4 * expert.num_parameters for expert in changed.values()
    )
    with atomic(folder, num_bytes) as staging:
        for name, expert in changed.items():
            expert.save(staging / EXPERTS_FOLDER / name)
            unchanged[name] = {path: _known_hash(staging / path) for path in expert_files(name)}
        _write(staging / ROUTER_NAME, model.router.state_dict())
        _write(staging / HEADS_NAME, _head_rows(model))
        model.backbone.processor.save_pretrained(staging)
        files = {path: digest for name in names for path, digest in unchanged[name].items()}
        files |= {name: hash_file(staging / name) for name in (ROUTER_NAME, HEADS_NAME, PROCESSOR_NAME)}
        config = replace(
            model.config,
            tasks=[*model.config.tasks[:-1], *map(copy, model.config.tasks[-1:])],  # of which the last is sealed
            files=files,
            versions=library_versions(),
        )
        config.seal()
        config.save(staging)
        if report is not None:
            report.save(staging)
        make_card(config, report).save(staging / CARD_NAME)
        _check_loads(model, staging, list(changed))
        gone = [f"{EXPERTS_FOLDER}/{name}" for name in _experts_in(there) - set(names)]
        remove_with(staging, gone + (list(REPORT_FILES) if report is None else []))
    model.config.tasks, model.config.files, model.config.versions = config.tasks, config.files, config.versions
    model.unchanged_experts = {name: unchanged[name] for name in names}


def check_same_model(
    folder: str | Path, config: ContinualConfig | None, ways_out: str = SAVE_ELSEWHERE, overwrite: bool = False
) -> ContinualConfig | None:
    """Looks whether a model may be saved into a folder: it is empty, or holds an earlier state of that model.

    Args:
        folder (`str` or `Path`): Only looked at.
        config ([`ContinualConfig`], *optional*): The model's; as it is before, if it is to learn yet. `None` for one
            that has yet to be made.
        ways_out (`str`, *optional*): What the error advises.
        overwrite (`bool`, *optional*, defaults to `False`): Let another model be there.

    Returns:
        [`ContinualConfig`], *optional*: The model that is there.

    Raises:
        [`ConfigError`]: Another model would be lost, or what else lies there could not be loaded with this one.
    """
    saved, there, what = as_saved(folder), None, None
    try:
        there = ContinualConfig.load(saved)
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
    """Where to read the model of a folder: there, or, if a process was killed when it had begun to change the folder,
    in a copy in which that change is complete. The folder stays as it is.

    Args:
        folder (`str` or `Path`): A model's folder.

    Returns:
        `Path`: The folder, or the copy, which this process deletes when it ends.

    Raises:
        [`ConfigError`]: The change is none of ours: it would reach out of the folder.

    Example:

    ```py
    >>> from hf_clpeft.storage.model_files import as_saved

    >>> as_saved("out").as_posix()
    'out'

    ```
    """
    folder = Path(folder)
    try:
        change = unfinished_change(folder)
    except FileNotFoundError:  # another process has ended it just now
        return folder
    if change is None:
        return folder
    removed, names = change
    place = Path(mkdtemp(prefix="hf-clpeft-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    ours = {name for name in _names_in(folder) if Path(name).suffix in {".json", ".safetensors", *PICKLES}}
    kept = {name for name in ours if not any(f"{name}/".startswith(f"{gone}/") for gone in removed)}
    for name in kept | set(names):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        new = folder / READY / name
        shutil.copyfile(new if name in names and new.is_file() else folder / name, place / name)
    return place


def load_into(model: "ContinualModel", folder: str | Path) -> None:
    """Fills a model with the experts, router, head and report of a folder, after checking every file.

    Args:
        model ([`ContinualModel`]): Made from the configuration in that folder.
        folder (`str` or `Path`): What [`save_model`] wrote.

    Raises:
        [`ConfigError`], [`ExpertError`]: A file is missing, damaged, unknown or does not fit; the message says which.
    """
    folder, names = Path(folder), model.config.expert_names
    check_files(folder, model.config, names)
    experts = (Expert.load(name, folder / EXPERTS_FOLDER / name) for name in names)
    model.bank.extend(rename_old_keys(expert, model.backbone) for expert in experts)
    model.unchanged_experts = {name: {path: model.config.files[path] for path in expert_files(name)} for name in names}
    _read_router(model.router.load, model.config, folder)
    _read_heads(model.heads, model.config, folder)
    model.report = _read_report(model.config, folder)


def expert_files(name: str) -> list[str]:
    """Paths of an expert's files in a model's folder."""
    return [f"{EXPERTS_FOLDER}/{name}/{file}" for file in (ADAPTER_CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)]


def check_files(folder: Path, config: ContinualConfig, experts: list[str]) -> None:
    """Raises [`ConfigError`] unless the folder holds the files that its configuration vouches for, and no strangers.

    Args:
        folder (`Path`): A model's folder.
        config ([`ContinualConfig`]): Its configuration.
        experts (`list[str]`): Names of the experts that a model of this configuration has.
    """
    expected = {ROUTER_NAME, HEADS_NAME, PROCESSOR_NAME, *(path for name in experts for path in expert_files(name))}
    unnamed, unknown = expected - config.files.keys(), config.files.keys() - expected
    if unnamed or unknown:
        raise ConfigError(
            f"{folder / CONFIG_NAME} does not fit together: of the files that its tasks need it lacks "
            f"{sorted(unnamed)[:3]}, and it names {sorted(unknown)[:3]}, which no task needs."
        )
    check_names(_names_in(folder), config, folder)
    for path, digest in config.files.items():
        if not (folder / path).is_file():
            raise ConfigError(f"{folder} lacks the file {path}, so the model is not whole.")
        if hash_file(folder / path) != digest:
            raise ConfigError(
                f"{folder / path} is not the file that {CONFIG_NAME} vouches for: it is damaged or from another model."
            )


def check_names(names: list[str], config: ContinualConfig, where: str | Path) -> None:
    """Raises [`ConfigError`] if there are pickles, or weights that the configuration does not vouch for.

    Args:
        names (`list[str]`): Paths in a model's folder or repo.
        config ([`ContinualConfig`]): Its configuration.
        where (`str` or `Path`): The folder or repo, for the message.
    """
    for name in sorted(names):
        if Path(name).suffix.lower() in PICKLES:
            raise ConfigError(
                f"{where} holds {name}, which can run code when read. Only safetensors and JSON are read."
            )
        weights = name.startswith(f"{EXPERTS_FOLDER}/") or name.endswith(".safetensors")
        if weights and name not in config.files and Path(name).name != CARD_NAME:
            raise ConfigError(f"{where} holds {name}, which its {CONFIG_NAME} does not know.")


def _names_in(folder: Path) -> list[str]:
    """What may belong to a model in a folder: its files, and all that is beside and in its experts."""
    paths = [path for path in folder.glob("*") if path.is_file()]
    for path in folder.glob(f"{EXPERTS_FOLDER}/*"):
        paths += path.iterdir() if path.is_dir() else [path]
    return [path.relative_to(folder).as_posix() for path in paths]


def _experts_in(there: ContinualConfig | None) -> set[str]:
    """Names of the experts that the model in a folder has."""
    return set() if there is None else {path.split("/")[1] for path in there.files if path.count("/") == 2}


def _has(folder: Path, files: dict[str, str]) -> bool:
    """Whether a folder has the files of an expert, and has them as they were."""
    paths = {folder / path: digest for path, digest in files.items()}
    return bool(paths) and all(path.is_file() and _known_hash(path) == digest for path, digest in paths.items())


def _known_hash(path: Path) -> str:
    """SHA-256 of a file that is read once, as long as nobody writes into it: a save does not read all saves before."""
    status = path.stat()
    version = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if version not in _hashes:
        _hashes[version] = hash_file(path)
    return _hashes[version]


_hashes: dict[tuple[int, int, int, int], str] = {}


def _tasks_with_rows(config: ContinualConfig) -> list[TaskConfig]:
    return [] if config.method.classifier == "router" else config.tasks


def _head_rows(model: "ContinualModel") -> dict[str, torch.Tensor]:
    rows = {}
    for i, task in enumerate(_tasks_with_rows(model.config)):
        rows[f"{task.name}.weight"], rows[f"{task.name}.bias"] = model.heads.weights[i], model.heads.biases[i]
        rows[f"{task.name}.classes"] = torch.tensor(model.heads.classes[i], dtype=torch.int64)
    return rows


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    # Written by Python, whose errors say that a disk is full.
    stored = {key: tensor.to(_stored_dtype(tensor)).contiguous() for key, tensor in tensors.items()}
    path.write_bytes(save(stored))


def _stored_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The same whatever the precision that the model computes in."""
    return torch.float32 if tensor.is_floating_point() else torch.int64


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    for key, tensor in tensors.items():
        if tensor.dtype not in STORED:
            raise ConfigError(f"{path} has {tensor.dtype} in {key}; features are stored as float32, numbers as int64.")
        if not torch.isfinite(tensor).all():
            raise ConfigError(f"{path} has values that are not finite in {key}.")
    return tensors


def _read_router(
    take: Callable[[dict[str, torch.Tensor], int, int], None], config: ContinualConfig, folder: Path
) -> None:
    """Reads the router's file; `take` is the router's `load`, or its `check`."""
    tensors, routed = _read(folder / ROUTER_NAME), config.method.routed
    try:
        take(tensors, len(config.tasks) * routed, len(config.classes) * routed)
    except ValueError as error:
        raise ConfigError(f"{ROUTER_NAME} does not fit the model: {error}") from error


def _read_heads(heads: Heads, config: ContinualConfig, folder: Path) -> None:
    tasks, tensors = _tasks_with_rows(config), _read(folder / HEADS_NAME)
    known, written = len(config.classes) * bool(tasks), set()
    for task in tasks:
        names = [f"{task.name}.{part}" for part in ("weight", "bias", "classes")]
        try:
            weight, bias, classes = (tensors.pop(name) for name in names)
            if [tensor.dtype for tensor in (weight, bias, classes)] != [torch.float32, torch.float32, torch.int64]:
                raise ValueError("rows are float32, and the numbers of their classes int64.")
            numbers = classes.tolist()
            if len(set(numbers)) < len(numbers) or not set(numbers) <= set(range(known)):
                raise ValueError(f"classes {numbers[:20]} are not among the {known} of the model.")
            heads.write(weight, bias, numbers, alone=len(task.classes) == 1)
            written |= set(numbers)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{HEADS_NAME}: the head of task {task.name!r} does not fit: {error}") from error
    if tensors or len(written) < known:
        raise ConfigError(
            f"{HEADS_NAME} has rows for {len(written)} of {known} classes, and {sorted(tensors)[:3]} too many."
        )


def _read_report(config: ContinualConfig, folder: Path) -> StreamReport | None:
    path = folder / METRICS_NAME
    return StreamReport.from_dict(read_json(path), config.tasks) if path.is_file() else None


def _check_loads(model: "ContinualModel", staging: Path, changed: list[str]) -> None:
    """Reads what was written as [`load_into`] would, but for the backbone, on which experts have run already."""
    try:
        config = ContinualConfig.load(staging)
        for name in changed:
            Expert.load(name, staging / EXPERTS_FOLDER / name)
        _read_router(model.router.check, config, staging)
        _read_heads(Heads(model.heads.hidden_size, config.method.head == "shared"), config, staging)
        read_json(staging / PROCESSOR_NAME)
        _read_report(config, staging)
    except HfClpeftError as error:
        raise ConfigError(f"The model is not whole and was not saved: it would not load. {error}") from error
