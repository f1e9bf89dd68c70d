"""Where a backbone's files come from, of which commit, and what is checked before they are used."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.checks import read_json
from ..config.errors import ConfigError
from ..config.text import get_logger
from ..hub.client import hub_client
from ..hub.errors import HFValidationError, HubError, LocalEntryNotFoundError, explained, transferring
from .bundled import bundled_folder
from .errors import BackboneError


if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = get_logger(__name__)

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
ALL_FILES = [CONFIG_NAME, "preprocessor_config.json", "processor_config.json", "model*.safetensors", INDEX_NAME]
HINT = "Pass backbone= with the repo id or folder where you have it."
MOST_LAYERS = 1000  # what is built in a loop, by the name of its field
LOOPS = re.compile("layers|depth|blocks|stages|labels|levels|num_experts")
LARGEST_NUMBER = 10_000_000
LONGEST_LIST = 1000


def find_checkpoint(name_or_path: str, revision: str | None = None, **hub_options: Any) -> tuple[Path, str | None]:
    """The folder of a backbone's files, all of one commit.

    Args:
        name_or_path (`str`): Repo id or folder; some come with the package.
        revision (`str`, *optional*): Branch, tag or commit of the repo.
        hub_options: `token`, `cache_dir`, `local_files_only`.

    Returns:
        `Path`, and the commit; `None` for a folder of this machine, which has none.

    Raises:
        [`BackboneError`]: There is no such folder, repo or revision, or no way to it.
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
    if (folder / "adapter_config.json").is_file():  # of which transformers would load the base, from wherever it is
        raise BackboneError(f"{name_or_path!r} is a PEFT adapter, not a model; merge it into its base model first.")
    if not _has_weights(folder):
        raise BackboneError(
            f"The backbone {name_or_path!r} has no {WEIGHTS_NAME}, and other files could run code when read. The Hub "
            "keeps a safetensors copy of many repos in a pull request: try revision='refs/pr/1', or convert it with "
            "model.save_pretrained(FOLDER)."
        )
    return folder, commit


def read_config(folder: Path, name: str) -> "PretrainedConfig":
    """The configuration of a checkpoint's vision model, after a look at what it says.

    Args:
        folder (`Path`): The checkpoint's.
        name (`str`): What to call it in an error.

    Returns:
        `transformers.PretrainedConfig`: Of the vision tower, where a checkpoint has two.

    Raises:
        [`BackboneError`]: It is damaged, absurd, wants code of its own to run, or describes no vision model.
    """
    from transformers import AutoConfig, ViTConfig
    from transformers.models.auto import MODEL_MAPPING

    try:
        values = read_json(folder / CONFIG_NAME)
    except ConfigError as error:
        raise BackboneError(f"The backbone {name!r} cannot be loaded: {error}") from error
    _check(values, name)
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # anything may be raised on what somebody has tampered with
        if "auto_map" in values:
            raise BackboneError(
                f"The backbone {name!r} is of a kind ({str(values.get('model_type'))[:60]!r}) that brings its own "
                "code, which is never run here. Choose a model that transformers knows."
            ) from error
        raise BackboneError(f"The backbone {name!r} cannot be loaded ({_line(error)}) {HINT}") from error
    vision = getattr(config, "vision_config", None)
    if vision is not None and type(vision) in MODEL_MAPPING:
        config = vision
    if config.model_type == "vit_mae":  # whose own class hides 75 % of the patches, at random, in evaluation too
        same = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
        config = ViTConfig.from_dict(same)
    if type(config) not in MODEL_MAPPING:
        raise BackboneError(f"transformers has no model for {name!r}, which is a {config.model_type}.")
    return config


def count_numbers(folder: Path) -> int:
    """How many numbers the weights of a checkpoint hold, from the heads of its files.

    Args:
        folder (`Path`): The checkpoint's.

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
        raise BackboneError(f"The weights in {folder} are damaged or not whole: {error}") from error
    return count


def _download(repo_id: str, revision: str | None, **hub_options: Any) -> Path:
    """The folder in the cache, whose name is the commit. Where the cache has the last word, nobody is asked."""
    from huggingface_hub import constants, snapshot_download

    fixed = revision is not None and re.fullmatch("[0-9a-f]{40}", revision)
    if fixed and (folder := _cached(repo_id, revision, **hub_options)) is not None:
        return folder
    options: dict[str, Any] = {"revision": revision, "allow_patterns": ALL_FILES, **hub_options}
    try:
        with explained("load", repo_id, revision):
            if not (constants.HF_HUB_OFFLINE or hub_options.get("local_files_only")):
                api = hub_client(hub_options.get("token"))
                api.model_info(repo_id, revision=revision)  # fails at once if the Hub is gone; listing takes 23 s to
            with transferring():
                return Path(snapshot_download(repo_id, **options))
    except HubError as error:
        folder = _cached(repo_id, revision, **hub_options)
        if folder is None or not error.transient:
            raise
        logger.warning("%s is taken from the cache, commit %s: %s", repo_id, folder.name, error)
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


def _check(values: Any, name: str, key: str = "") -> None:
    """Refuses what would loop, allocate or fetch code before there is a model that could be measured."""
    if isinstance(values, dict):
        for inner, value in values.items():
            if inner == "quantization_config" and value:
                raise BackboneError(f"The backbone {name!r} is quantised; name the checkpoint that it was made from.")
            if inner.endswith("attn_implementation") and isinstance(value, str) and not value.isidentifier():
                raise BackboneError(f"The backbone {name!r} wants code from the Hub to run, {inner}={value[:60]!r}.")
            _check(value, name, str(inner))
    elif isinstance(values, list):
        if len(values) > LONGEST_LIST and not isinstance(values[0], str):
            raise BackboneError(f"{CONFIG_NAME} of the backbone {name!r} lists {len(values):,} values in {key}.")
        for value in values:
            _check(value, name, key)
    elif isinstance(values, int | float):
        most = MOST_LAYERS if LOOPS.search(key) and "id" not in key.split("_") else LARGEST_NUMBER
        if key == "num_labels":
            most = 100 * MOST_LAYERS
        if not abs(values) <= most or (values < 1 and key == "num_hidden_layers"):
            raise BackboneError(
                f"{CONFIG_NAME} of the backbone {name!r} has {key}={values!r:.40}; at most {most:,} makes sense."
            )


def _line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:300]
