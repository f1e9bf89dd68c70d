"""Validation of untrusted names, paths, types and JSON. Imports nothing heavy."""

import json
import math
import os
import re
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import ConfigError


MOST = 2**31 - 1  # upper bound of counts and rates
LONGEST_NAME = 96  # characters of a task's name
LARGEST_JSON = 8 * 2**20  # bytes; a model of 15,000 tasks needs less
DEEPEST_JSON = 20  # nested mappings and lists
LARGEST_INTEGER = 2**63 - 1


def check_task_name(name: str) -> str:
    """Returns `name` if it can be a folder and a git tag, else raises [`ConfigError`].

    Example:

    ```py
    >>> from hf_clpeft.config.checks import check_task_name

    >>> check_task_name("task-003")
    'task-003'

    ```
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or len(name) > LONGEST_NAME:
        raise ConfigError(
            f"Task name {name!r} must be 1 to {LONGEST_NAME} letters, digits, '_' or '-', the first a letter or digit."
        )
    return name


def check_path(path: str) -> str:
    """Returns `path` if it stays inside the folder that it is relative to, else raises [`ConfigError`].

    Example:

    ```py
    >>> from hf_clpeft.config.checks import check_path

    >>> check_path("experts/task-000/adapter_config.json")
    'experts/task-000/adapter_config.json'

    ```
    """
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*", path):
        raise ConfigError(f"Path {path!r} must be relative and stay inside the model's folder.")
    return path


def check_text(text: str, what: str) -> str:
    """Returns `text` if it can be written as UTF-8, else raises [`ConfigError`]: a lone surrogate cannot.

    Example:

    ```py
    >>> from hf_clpeft.config.checks import check_text

    >>> check_text("ox", "classes[0]")
    'ox'

    ```
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{what} is {text!r}, which is not valid Unicode: {error.reason}.") from error
    return text


def check_types(config: object) -> None:
    """Raises [`ConfigError`] unless every field of a dataclass matches its type hint.

    Example:

    ```py
    >>> from hf_clpeft.config import BackboneConfig

    >>> BackboneConfig("vit", image_size="big", weight_hash="0f3c")
    Traceback (most recent call last):
        ...
    hf_clpeft.config.errors.ConfigError: image_size='big' must be int.

    ```
    """
    kind: Any = type(config)
    hints = _hints_of(kind)
    for name in (each.name for each in fields(config)):  # type: ignore[arg-type]
        value, hint = getattr(config, name), hints[name]
        if not fits(value, hint):
            shown = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:77]}..."
            raise ConfigError(f"{name}={shown} must be {_describe(hint)}.")
        _check_values(value, name)


@lru_cache(maxsize=256)
def _hints_of(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


@lru_cache(maxsize=256)
def _parts_of(hint: Any) -> tuple[Any, tuple]:
    return get_origin(hint), get_args(hint)


def check_ranges(config: object, **ranges: tuple[float, float]) -> None:
    """Raises [`ConfigError`] unless fields of a dataclass are within (min, max). `None` is accepted, NaN is not.

    Example:

    ```py
    >>> from hf_clpeft.training.options import BackboneArguments

    >>> BackboneArguments(image_size=0)
    Traceback (most recent call last):
        ...
    hf_clpeft.config.errors.ConfigError: image_size=0 must be between 1 and 16,384.

    ```
    """
    for name, (least, most) in ranges.items():
        value = getattr(config, name)
        if value is not None and not least <= value <= most:
            open_ended = most == MOST and not value > most
            bounds = f"{least:,} or more" if open_ended else f"between {least:,} and {most:,}"
            raise ConfigError(f"{name}={value} must be {bounds}.")


def _describe(hint: Any) -> str:
    for choice in (hint, *get_args(hint)):
        if get_origin(choice) is Literal:
            return f"one of {', '.join(get_args(choice))}"
    return getattr(hint, "__name__", str(hint))


def fits(value: object, hint: Any) -> bool:
    """Whether a value matches a type hint of plain types, including the items of lists and mappings.

    Example:

    ```py
    >>> from hf_clpeft.config.checks import fits

    >>> fits(["a"], list[str] | None), fits([1], list[str] | None), fits(True, int)
    (True, False, False)

    ```
    """
    if type(value) is hint:
        return True
    origin, arguments = _parts_of(hint)
    if origin is Literal:
        return value in arguments
    if origin in (UnionType, Union):  # a union with a Literal is a typing.Union
        return any(fits(value, choice) for choice in arguments)
    if origin is list:
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            fits(k, arguments[0]) and fits(v, arguments[1]) for k, v in value.items()
        )
    if hint in (int, float):  # a bool is not a number, an int is a float
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return hint is Any or isinstance(value, hint)


def read_json(path: str | Path) -> dict:
    """Reads a small JSON file.

    Raises:
        [`ConfigError`]: The file is not valid JSON, not a mapping, or too large.

    Example:

    ```py
    >>> from pathlib import Path
    >>> from hf_clpeft.config.checks import read_json

    >>> _ = Path("config.json").write_text('{"k": 5}')
    >>> read_json("config.json")
    {'k': 5}

    ```
    """
    return parse_json(read_small(path), Path(path).name)


def read_small(path: str | Path) -> bytes:
    """Reads a file, or raises [`ConfigError`] if it is too large for JSON that is to be parsed.

    Example:

    ```py
    >>> from pathlib import Path
    >>> from hf_clpeft.config.checks import read_small

    >>> _ = Path("config.json").write_text("{}")
    >>> read_small("config.json")
    b'{}'

    ```
    """
    size = os.stat(path).st_size
    if size > LARGEST_JSON:
        raise ConfigError(f"{Path(path).name} has {size:,} bytes; at most {LARGEST_JSON:,} are read.")
    with open(path, "rb") as file:
        return file.read()


def parse_json(text: bytes, name: str) -> dict:
    """Parses the content of a JSON file; `name` is that of the file, for error messages.

    Raises:
        [`ConfigError`]: It is not valid JSON, or not a mapping.

    Example:

    ```py
    >>> from hf_clpeft.config.checks import parse_json

    >>> parse_json(b'{"k": 5}', "config.json")
    {'k': 5}

    ```
    """
    try:
        values = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique_fields,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is not valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{name} does not hold a mapping.")
    try:
        for field, value in values.items():
            _check_values(value, check_text(field, "a field's name"))
    except ConfigError as error:
        raise ConfigError(f"{name} cannot be used: {error}") from error
    return values


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"it has the field {name[:80]!r} twice")
        values[name] = value
    return values


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text[:80]} is not a finite number")
    return float(text)


def _check_values(value: Any, where: str, depth: int = 1) -> None:
    """Raises [`ConfigError`] on lone surrogates, integers of more than 63 bits, and deep nesting."""
    if isinstance(value, str):
        check_text(value, where)
    elif isinstance(value, dict | list):
        if depth > DEEPEST_JSON:
            raise ConfigError(f"{where} is nested deeper than {DEEPEST_JSON} levels.")
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(key, str):
                check_text(key, f"a name in {where}")
            _check_values(inner, f"{where[:60]}[{key!r:.40}]", depth + 1)
    elif isinstance(value, int) and not -LARGEST_INTEGER <= value <= LARGEST_INTEGER:
        raise ConfigError(f"{where} is an integer of {value.bit_length()} bits; at most 63 are read.")
