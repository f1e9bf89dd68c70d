"""Saves models atomically, and loads them with validation."""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.numpy import save
from safetensors.torch import load_file

from ..config import CONFIG_NAME, ConfigError, ContinualConfig, HfClpeftError
from ..config.checks import read_json
from ..experts import Expert
from ..experts.naming import renamer_for
from ..methods import Method, make_method
from ..reports.card import CARD_NAME, make_card
from ..reports.report import METRICS_NAME, REPORT_FILES, StreamReport
from ..reports.versions import library_versions
from ..routing.routing import State
from .files import (
    EXPERTS_FOLDER,
    HEADS_NAME,
    METHOD_NAME,
    PROCESSOR_NAME,
    ROUTER_NAME,
    check_same_model,
    expert_files,
    is_sums,
    known_config,
    sums_file,
)
from .folder import atomic, hash_file, known_hash, recover, remove_with, safe_path
from .pictures import check_size, of_tasks, task_of


if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor

STORED = (torch.float32, torch.int64)  # features; indices and counts
SMALL = 2**16  # numbers of a tensor
Hashes = dict[str, dict[str, str]]  # SHA-256 by path, for each expert's name and each path of sums


def save_files(
    folder: str | Path,
    method: Method,
    processor: "BaseImageProcessor",
    report: StreamReport | None,
    unchanged: Hashes,
    overwrite: bool = False,
    pictures: Mapping[str, bytes] = MappingProxyType({}),
) -> Hashes:
    """Saves a model to a folder atomically. Unchanged experts are not written again.

    What is new is loaded as a check before the change is committed.

    Args:
        folder (`str` or `Path`): Created if missing.
        method ([`Method`]): The model's method, with its state.
        processor (`transformers.BaseImageProcessor`): Image processor of the backbone.
        report ([`StreamReport`], *optional*): Metrics.
        unchanged (`dict`): SHA-256 of the files of each expert, and of the sums of each task, that have not changed
            since they were saved or loaded.
        overwrite (`bool`, *optional*, defaults to `False`): Replace another model in the folder.
        pictures (`dict[str, bytes]`, *optional*): Thumbnails and examples, by their path.

    Returns:
        `dict`: SHA-256 of the files of every expert, and of the sums of every task.

    Raises:
        `OSError`: It cannot be written; the folder is unchanged.
        [`ConfigError`]: The folder holds another model, or this one is incomplete and would not load; the folder is
            unchanged.
    """
    folder, model_config = Path(folder), method.config
    method.check()
    recover(folder)
    there = check_same_model(folder, model_config, overwrite=overwrite)
    safe_path(folder, EXPERTS_FOLDER)
    names, unchanged = method.bank.names, dict(unchanged)
    if report is not None:
        report.catch_up(model_config.tasks)
    changed = {
        name: method.bank[index] for index, name in enumerate(names) if not _has(folder, unchanged.get(name, {}))
    }
    tensors, sums = _tensors(method)
    new_sums = {path: part for path, part in sums.items() if not _has(folder, unchanged.get(path, {}))}
    written = {**tensors, **new_sums}
    pictures = of_tasks(pictures, {task.name: task.name for task in model_config.tasks})
    num_bytes = sum(tensor.nbytes for of_file in written.values() for tensor in of_file.values())
    num_bytes += sum(map(len, pictures.values()))
    with atomic(folder, num_bytes + sum(4 * expert.num_parameters for expert in changed.values())) as staging:
        for name, expert in changed.items():
            expert.save(staging / EXPERTS_FOLDER / name)
            unchanged[name] = {path: known_hash(staging / path) for path in expert_files(name)}
        for name, of_file in written.items():
            _write(staging / name, of_file)
        unchanged |= {path: {path: known_hash(staging / path)} for path in new_sums}
        for name, content in pictures.items():
            check_size(name, len(content))
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_bytes(content)
        processor.save_pretrained(staging)
        files = {path: digest for name in (*names, *sums) for path, digest in unchanged[name].items()}
        files |= {name: hash_file(staging / name) for name in (*tensors, PROCESSOR_NAME, *pictures)}
        config = replace(
            model_config,
            tasks=[
                *model_config.tasks[:-1],
                *map(copy, model_config.tasks[-1:]),
            ],  # a copy of the last, which seal() changes
            files=files,
            versions=library_versions(),
            calibrated=method.temperature() is not None,
        )
        config.seal()
        config.save(staging)
        if report is not None:
            report.save(staging)
        make_card(config, report).save(staging / CARD_NAME)
        _check_loads(method, staging, {**tensors, **sums}, [*written], list(changed))
        gone = [f"{EXPERTS_FOLDER}/{name}" for name in set(there.expert_names if there else []) - set(names)]
        gone += [path for path in (there.files if there else ()) if is_sums(path) and path not in sums]
        gone += [path for path in (there.files if there else ()) if task_of(path) and path not in pictures]
        gone += [METHOD_NAME] if METHOD_NAME not in tensors and (folder / METHOD_NAME).exists() else []
        remove_with(staging, gone + (list(REPORT_FILES) if report is None else []))
    for name in ("tasks", "files", "versions", "calibrated"):
        setattr(model_config, name, getattr(config, name))
    return {name: unchanged[name] for name in (*names, *sums)}


def load_files(folder: str | Path, method: Method) -> tuple[StreamReport | None, Hashes]:
    """Loads experts, router, heads and further state from a folder that [`check_files`] has accepted.

    Args:
        folder (`str` or `Path`): Written by [`save_files`].
        method ([`Method`]): Created from the configuration in that folder; loaded into.

    Returns:
        The report, if any, and SHA-256 of the files of every expert and of the sums of every task.

    Raises:
        [`ConfigError`], [`ExpertError`]: A file is damaged or does not match; the message says which.
    """
    folder, config, names = Path(folder), method.config, method.expert_names()
    if config.expert_names != names:
        raise ConfigError(
            f"{folder / CONFIG_NAME} does not fit together: its tasks need the experts {names[:5]}, and it has "
            f"{config.expert_names[:5]}."
        )
    experts = (Expert.load(name, folder / EXPERTS_FOLDER / name) for name in names)
    method.bank.extend(map(renamer_for(method.backbone), experts), len(names))
    _read_parts(method, lambda name: _read(folder / name) if (folder / name).is_file() else {})
    method.check()
    hashes = {name: {path: config.files[path] for path in expert_files(name)} for name in names}
    return _read_report(config, folder), hashes | {
        path: {path: digest} for path, digest in config.files.items() if is_sums(path)
    }


def _tensors(method: Method) -> tuple[dict[str, State], dict[str, State]]:
    """State dicts as they are stored, by file name, those of single tasks apart."""
    tasks = method.config.tasks
    shared, parts = ({}, []) if method.router is None else method.router.split(_numbers(method))
    tensors = {
        ROUTER_NAME: shared,
        HEADS_NAME: {} if method.heads is None else method.heads.to_tensors(),
        METHOD_NAME: method.state(),
    }
    sums = {sums_file(task.name): _as_stored(part) for task, part in zip(tasks, parts, strict=False)}
    return {name: _as_stored(part) for name, part in tensors.items() if part or name != METHOD_NAME}, sums


def _numbers(method: Method) -> list[list[int]]:
    """Class indices of each task."""
    number_of = {label: number for number, label in enumerate(method.config.classes)}
    return [[number_of[label] for label in task.classes] for task in method.config.tasks]


def _read_parts(method: Method, read: Callable[[str], State], trial: bool = False) -> None:
    """Loads router, heads and further state, by the names of their files. In a trial, a router only validates."""
    router, heads = method.router, method.heads
    tasks, num_classes = method.config.tasks, len(method.config.classes)
    for name in (ROUTER_NAME, HEADS_NAME, METHOD_NAME):
        tensors = read(name)
        try:
            if name == METHOD_NAME:
                method.load_state(tensors)
            elif name == ROUTER_NAME and router is not None:
                paths = [path for task in tasks if (path := sums_file(task.name)) in method.config.files]
                tensors = router.join(tensors, [*map(read, paths)], _numbers(method))
                (router.check if trial else router.load)(tensors, len(tasks), num_classes)
            elif name == HEADS_NAME and heads is not None:
                heads.load(tensors, tasks, num_classes)
            elif any(tensor.numel() for tensor in tensors.values()):  # version 1 saved empty ones
                raise ValueError(f"the method has no such part, and the file holds {sorted(tensors)[:3]}.")
        except ValueError as error:
            raise ConfigError(f"{name} does not fit the model: {error}") from error


def _has(folder: Path, files: dict[str, str]) -> bool:
    """Whether a folder has the files of an expert with these hashes."""
    return bool(files) and all(known_hash(f"{folder}/{path}") == digest for path, digest in files.items())


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    # Written by Python, which raises `OSError` on a full disk, unlike safetensors.
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(save({key: tensor.numpy() for key, tensor in tensors.items()}))


def _as_stored(tensors: State) -> State:
    """On the CPU, and in a dtype independent of that of the model."""
    return {
        key: tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else torch.int64).contiguous()
        for key, tensor in tensors.items()
    }


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    _check_stored(tensors, path)
    return tensors


def _check_stored(tensors: State, where: str | Path) -> None:
    """Raises [`ConfigError`] unless all numbers are of the stored dtypes, and finite."""
    for key, tensor in tensors.items():
        if tensor.dtype not in STORED:
            raise ConfigError(
                f"{where} has {tensor.dtype} in {key}; features are stored as float32, numbers as int64."
            )
    features = {key: tensor for key, tensor in tensors.items() if tensor.dtype == torch.float32}
    small = [tensor.flatten() for tensor in features.values() if tensor.numel() < SMALL]
    if small and torch.isfinite(torch.cat(small)).all():  # at once, as a head may have thousands
        features = {key: tensor for key, tensor in features.items() if tensor.numel() >= SMALL}
    for key, tensor in features.items():
        if not torch.isfinite(tensor).all():
            raise ConfigError(f"{where} has values that are not finite in {key}.")


def _read_report(config: ContinualConfig, folder: Path) -> StreamReport | None:
    path = folder / METRICS_NAME
    return StreamReport.from_dict(read_json(path), config.tasks) if path.is_file() else None


def _check_loads(method: Method, staging: Path, parts: dict[str, State], new: list[str], changed: list[str]) -> None:
    """Loads what is new like [`load_files`], except that experts are not tried on the backbone again.

    Args:
        method ([`Method`]): The model's.
        staging (`Path`): Folder with the new files.
        parts (`dict`): State dicts as they are stored, by file name, of all of the model.
        new (`list[str]`): Names of those that are in the staging folder.
        changed (`list[str]`): Names of the experts in the staging folder.
    """
    try:
        config = copy(known_config(staging))
        config.method = copy(config.method)
        for name in changed:
            Expert.load(name, staging / EXPERTS_FOLDER / name)
        for name in new:
            _check_stored(parts[name], name)
        _read_parts(make_method(method.backbone, config), lambda name: dict(parts.get(name, {})), trial=True)
        read_json(staging / PROCESSOR_NAME)
        _read_report(config, staging)
    except HfClpeftError as error:
        raise ConfigError(f"The model is not whole and was not saved: it would not load. {error}") from error
