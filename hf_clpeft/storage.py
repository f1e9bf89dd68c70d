"""A model as a folder: what is written, and what is checked before a byte of it is believed."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from .checks import read_json
from .config import CONFIG_NAME, ContinualConfig, TaskConfig
from .errors import ConfigError
from .experts import Expert
from .experts.naming import rename_old_keys
from .folder import changing, hash_file, remove_with, settle
from .hub.card import CARD_NAME, make_card
from .learners import check_routes
from .report import METRICS_NAME, REPORT_FILES, StreamReport
from .versions import library_versions


if TYPE_CHECKING:
    from .modeling import ContinualModel

ROUTER_NAME = "router.safetensors"
HEADS_NAME = "heads.safetensors"
PROCESSOR_NAME = "preprocessor_config.json"
EXPERTS_FOLDER = "experts"
PICKLES = {".bin", ".ckpt", ".dill", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"}


def save_model(model: "ContinualModel", folder: str | Path) -> None:
    """Writes a model into a folder, as a whole or not at all. Experts that the folder has already stay as they are.

    Args:
        model ([`ContinualModel`]): What to save.
        folder (`str` or `Path`): Made if needed.

    Raises:
        `OSError`: It cannot be written; what was there before is untouched.
        [`ConfigError`]: The router has not learnt all tasks.
    """
    folder, config = Path(folder), model.config
    check_routes(model.router, config)
    if model.report is not None:
        model.report.catch_up(config.tasks)
    settle(folder)
    there, unchanged = _files_of(folder), model.unchanged_experts
    changed = {
        name: model.bank[index]
        for index, name in enumerate(model.bank.names)
        if name not in unchanged or not unchanged[name].items() <= there.items()
    }
    tensors = [*model.router.state_dict().values(), *model.heads.state_dict().values()]
    num_bytes = sum(tensor.nbytes for tensor in tensors) + sum(
        4 * expert.num_parameters for expert in changed.values()
    )
    with changing(folder, num_bytes) as staging:
        config.files = {}
        for name, expert in changed.items():
            expert.save(staging / EXPERTS_FOLDER / name)
            unchanged[name] = {path: hash_file(staging / path) for path in expert_files(name)}
        for name in model.bank.names:
            config.files |= unchanged[name]
        _write(staging / ROUTER_NAME, model.router.state_dict())
        _write(staging / HEADS_NAME, _head_rows(model))
        model.backbone.processor.save_pretrained(staging)
        config.files |= {name: hash_file(staging / name) for name in (ROUTER_NAME, HEADS_NAME, PROCESSOR_NAME)}
        config.versions = library_versions()
        config.save(staging)
        if model.report is not None:
            model.report.save(staging)
        make_card(config, model.report).save(staging / CARD_NAME)
        stale = [f"{EXPERTS_FOLDER}/{path.name}" for path in folder.glob(f"{EXPERTS_FOLDER}/*")]
        stale = [path for path in stale if path.split("/")[1] not in model.bank.names]
        remove_with(staging, stale + (list(REPORT_FILES) if model.report is None else []))


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
    _load_router(model, _read(folder / ROUTER_NAME))
    _load_heads(model, _read(folder / HEADS_NAME))
    if (folder / METRICS_NAME).is_file():
        model.report = StreamReport.from_dict(read_json(folder / METRICS_NAME), model.config.tasks)


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
    inside = [*folder.glob("*"), *folder.glob(f"{EXPERTS_FOLDER}/**/*")]
    check_names([path.relative_to(folder).as_posix() for path in inside if path.is_file()], config, folder)
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


def _files_of(folder: Path) -> dict[str, str]:
    """Files that the model in a folder vouches for; none if there is no readable model."""
    try:
        return ContinualConfig.load(folder).files
    except (FileNotFoundError, ConfigError):
        return {}


def _tasks_with_rows(model: "ContinualModel") -> list[TaskConfig]:
    return [] if model.config.method.classifier == "router" else model.config.tasks


def _head_rows(model: "ContinualModel") -> dict[str, torch.Tensor]:
    rows = {}
    for i, task in enumerate(_tasks_with_rows(model)):
        rows[f"{task.name}.weight"], rows[f"{task.name}.bias"] = model.heads.weights[i], model.heads.biases[i]
        rows[f"{task.name}.classes"] = torch.tensor(model.heads.classes[i], dtype=torch.int64)
    return rows


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    # Written by Python, whose errors say that a disk is full.
    path.write_bytes(save({key: tensor.contiguous() for key, tensor in tensors.items()}))


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ConfigError(f"{path} has values that are not finite in {key}.")
    return tensors


def _load_router(model: "ContinualModel", tensors: dict[str, torch.Tensor]) -> None:
    routed = model.config.method.routed
    try:
        model.router.load(tensors, len(model.config.tasks) * routed, len(model.config.classes) * routed)
    except ValueError as error:
        raise ConfigError(f"{ROUTER_NAME} does not fit the model: {error}") from error


def _load_heads(model: "ContinualModel", tensors: dict[str, torch.Tensor]) -> None:
    tasks = _tasks_with_rows(model)
    known, written = len(model.config.classes) * bool(tasks), set()
    for task in tasks:
        names = [f"{task.name}.{part}" for part in ("weight", "bias", "classes")]
        try:
            weight, bias, classes = (tensors.pop(name) for name in names)
            numbers = classes.tolist()
            if len(set(numbers)) < len(numbers) or not set(numbers) <= set(range(known)):
                raise ValueError(f"classes {numbers} are not among the {known} of the model.")
            model.heads.write(weight, bias, numbers, alone=len(task.classes) == 1)
            written |= set(numbers)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{HEADS_NAME}: the head of task {task.name!r} does not fit: {error}") from error
    if tensors or len(written) < known:
        raise ConfigError(
            f"{HEADS_NAME} has rows for {len(written)} of {known} classes, and {sorted(tensors)[:3]} too many."
        )
