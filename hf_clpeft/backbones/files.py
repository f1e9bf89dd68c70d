"""Locates the files of a backbone, pins them to a commit, and validates them before they are loaded."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.checks import read_json
from ..config.errors import ConfigError
from ..config.hub_client import hub_client
from ..config.hub_errors import HFValidationError, HubError, LocalEntryNotFoundError, explained, transferring
from ..config.text import get_logger
from .bundled import bundled_folder
from .errors import BackboneError, first_line


if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = get_logger(__name__)

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
ALL_FILES = [CONFIG_NAME, "preprocessor_config.json", "processor_config.json", "model*.safetensors", INDEX_NAME]
HINT = "Pass backbone= with a repo id or folder that has it."
MAX_LAYERS = 1000  # limit on config fields that set the length of a loop
LOOP_FIELDS = re.compile("layers|depth|blocks|stages|labels|levels|num_experts")
MAX_NUMBER = 10_000_000
MAX_LIST_LENGTH = 1000


def find_checkpoint(name_or_path: str, revision: str | None = None, **hub_options: Any) -> tuple[Path, str | None]:
    """Locates or downloads the files of a backbone, all of one commit; arguments as for [`load_backbone`].

    Returns:
        `Path` and the commit, which is `None` for a local folder.

    Raises:
        [`BackboneError`]: There is no such folder, repo or revision, or it cannot be reached.
    """
    folder, commit = bundled_folder(name_or_path), None
    if folder is None and Path(name_or_path).is_dir():
        folder = Path(name_or_path)
    try:
        if folder is None:
            folder = _download(name_or_path, revision, **hub_options)
            commit = folder.name
    except HubError as error:
        raise BackboneError(f"The backbone {name_or_path!r} cannot be loaded ({error}) {HINT}") from error
    if not (folder / CONFIG_NAME).is_file():
        raise BackboneError(f"The backbone {name_or_path!r} cannot be loaded (it has no {CONFIG_NAME}.) {HINT}")
    if (folder / "adapter_config.json").is_file():  # transformers would load its base model, from any repo
        raise BackboneError(f"{name_or_path!r} is a PEFT adapter, not a model; merge it into its base model first.")
    if not _has_weights(folder):
        raise BackboneError(
            f"The backbone {name_or_path!r} has no {WEIGHTS_NAME}, and other formats can run code when read. The Hub "
            "keeps a safetensors copy of many repos in a pull request: try revision='refs/pr/1', or convert it with "
            "model.save_pretrained(FOLDER)."
        )
    return folder, commit


def read_config(folder: Path, name: str) -> "PretrainedConfig":
    """Reads and validates the configuration of a checkpoint's vision model; `name` is for error messages.

    Returns:
        `transformers.PretrainedConfig`: That of the vision tower, if the checkpoint has two towers.

    Raises:
        [`BackboneError`]: It is invalid, has values out of range, needs custom code, or is no vision model.
    """
    from transformers import AutoConfig, ViTConfig
    from transformers.models.auto import MODEL_MAPPING

    try:
        values = read_json(folder / CONFIG_NAME)
    except ConfigError as error:
        raise BackboneError(f"The backbone {name!r} cannot be loaded: {error}") from error
    _check_config(values, name)
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # a tampered file may raise anything
        if "auto_map" in values:
            raise BackboneError(
                f"The backbone {name!r} has the model type {str(values.get('model_type'))[:60]!r}, which needs "
                "custom code that is never run here. Choose a model that transformers includes."
            ) from error
        raise BackboneError(f"The backbone {name!r} cannot be loaded ({first_line(error)}) {HINT}") from error
    vision = getattr(config, "vision_config", None)
    if vision is not None and type(vision) in MODEL_MAPPING:
        config = vision
    if config.model_type == "vit_mae":  # whose own class masks 75 % of the patches at random, even in evaluation
        same = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
        config = ViTConfig.from_dict(same)
    if type(config) not in MODEL_MAPPING:
        raise BackboneError(f"transformers has no model for {name!r}, which is a {config.model_type}.")
    return config


def count_parameters(folder: Path) -> int:
    """Number of parameters of a checkpoint, from the headers of its files.

    Raises:
        [`BackboneError`]: A file is damaged or missing.
    """
    from safetensors import SafetensorError, safe_open

    count = 0
    try:
        for path in _weight_files(folder):
            with safe_open(path, "pt") as file:
                for key in sorted(file.keys()):
                    size = 1
                    for length in file.get_slice(key).get_shape():
                        size *= length
                    count += size
    except (SafetensorError, OSError) as error:
        raise BackboneError(f"The weights in {folder} are damaged or incomplete: {error}") from error
    return count


def _download(repo_id: str, revision: str | None, **hub_options: Any) -> Path:
    """Downloads to the cache folder, whose name is the commit; a cached commit makes no request."""
    from huggingface_hub import constants, snapshot_download

    fixed = revision is not None and re.fullmatch("[0-9a-f]{40}", revision)
    if fixed and (folder := _cached(repo_id, revision, **hub_options)) is not None:
        return folder
    options: dict[str, Any] = {"revision": revision, "allow_patterns": ALL_FILES, **hub_options}
    try:
        with explained("load", repo_id, revision):
            if not (constants.HF_HUB_OFFLINE or hub_options.get("local_files_only")):
                api = hub_client(hub_options.get("token"))
                api.model_info(repo_id, revision=revision)  # fails at once if the Hub is down; a listing waits 23 s
            with transferring():
                return Path(snapshot_download(repo_id, **options))
    except HubError as error:
        folder = _cached(repo_id, revision, **hub_options)
        if folder is None or not error.transient:
            raise
        logger.warning("%s: using the cached commit %s: %s", repo_id, folder.name, error)
        return folder


def _cached(repo_id: str, revision: str | None, **hub_options: Any) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        options: dict[str, Any] = {"revision": revision, "allow_patterns": ALL_FILES, **hub_options}
        folder = Path(snapshot_download(repo_id, **options | {"local_files_only": True}))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if (folder / CONFIG_NAME).is_file() and _has_weights(folder) else None


def _has_weights(folder: Path) -> bool:
    try:
        return all(path.is_file() for path in _weight_files(folder))
    except BackboneError:
        return False


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS_NAME).is_file() or not (folder / INDEX_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    try:
        names = set(json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise BackboneError(f"{folder / INDEX_NAME} is damaged.") from error
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise BackboneError(f"{folder / INDEX_NAME} names files outside its folder.")
    return [folder / name for name in sorted(names)]


def _check_config(values: Any, name: str, key: str = "") -> None:
    """Rejects values that would loop, allocate memory or fetch code while the model is built."""
    if isinstance(values, dict):
        for inner, value in values.items():
            if inner == "quantization_config" and value:
                raise BackboneError(
                    f"The backbone {name!r} is quantised; use the original checkpoint, with quantization_config= to "
                    "quantise it as it is loaded."
                )
            if inner.endswith("attn_implementation") and isinstance(value, str) and not value.isidentifier():
                raise BackboneError(f"The backbone {name!r} needs code from the Hub, {inner}={value[:60]!r}.")
            _check_config(value, name, str(inner))
    elif isinstance(values, list):
        if len(values) > MAX_LIST_LENGTH and not isinstance(values[0], str):
            raise BackboneError(f"{CONFIG_NAME} of the backbone {name!r} lists {len(values):,} values in {key}.")
        for value in values:
            _check_config(value, name, key)
    elif isinstance(values, int | float):
        most = MAX_LAYERS if LOOP_FIELDS.search(key) and "id" not in key.split("_") else MAX_NUMBER
        if key == "num_labels":
            most = 100 * MAX_LAYERS
        if not abs(values) <= most or (values < 1 and key == "num_hidden_layers"):
            raise BackboneError(
                f"{CONFIG_NAME} of the backbone {name!r} has {key}={values!r:.40}; at most {most:,} is allowed."
            )
