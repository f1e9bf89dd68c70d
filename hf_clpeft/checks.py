"""Checks of what comes from a file or a stranger: names, paths, types, JSON. Nothing heavy is imported."""

import json
import re
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from .errors import ConfigError


LONGEST_NAME = 96  # signs of a task's name
LARGEST_JSON = 4 * 2**20  # bytes; a model of 5,000 tasks needs less


def check_task_name(name: str) -> str:
    """Returns `name` if it can be a folder and a git tag, else raises [`ConfigError`].

    Example:

    ```py
    >>> from hf_clpeft.checks import check_task_name

    >>> check_task_name("task-003")
    'task-003'

    ```
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or len(name) > LONGEST_NAME:
        raise ConfigError(
            f"Task name {name!r} must be 1 to {LONGEST_NAME} letters, digits, '_' or '-', and start with no sign."
        )
    return name


def check_path(path: str) -> str:
    """Returns `path` if it stays inside the folder that it is relative to, else raises [`ConfigError`].

    Example:

    ```py
    >>> from hf_clpeft.checks import check_path

    >>> check_path("experts/task-000/adapter_config.json")
    'experts/task-000/adapter_config.json'

    ```
    """
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*", path):
        raise ConfigError(f"Path {path!r} must be relative and stay inside the model's folder.")
    return path


def check_types(config: object) -> None:
    """Raises [`ConfigError`] unless every field of a dataclass holds what its annotation says.

    Example:

    ```py
    >>> from hf_clpeft.config import BackboneConfig

    >>> BackboneConfig("vit", image_size="big", weight_hash="0f3c")
    Traceback (most recent call last):
        ...
    hf_clpeft.errors.ConfigError: image_size='big' must be int.

    ```
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not _fits(value, hint):
            shown = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:77]}..."
            raise ConfigError(f"{name}={shown} must be {getattr(hint, '__name__', hint)}.")


def _fits(value: object, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return any(_fits(value, choice) for choice in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(k, arguments[0]) and _fits(v, arguments[1]) for k, v in value.items()
        )
    if hint in (int, float):  # True is no number, and 1 is a float
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, hint)


def read_json(path: str | Path) -> dict:
    """Reads a small JSON file.

    Raises:
        [`ConfigError`]: It is damaged, no mapping, or so big that it cannot be ours.

    Example:

    ```py
    >>> from pathlib import Path
    >>> from hf_clpeft.checks import read_json

    >>> _ = Path("config.json").write_text('{"k": 5}')
    >>> read_json("config.json")
    {'k': 5}

    ```
    """
    path = Path(path)
    if path.stat().st_size > LARGEST_JSON:
        raise ConfigError(f"{path.name} has {path.stat().st_size:,} bytes; at most {LARGEST_JSON:,} are read.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path.name} is no JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path.name} holds no mapping.")
    return values
