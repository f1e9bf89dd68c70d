"""The options of a method: fields of a dataclass, saved in `config.json` and offered on the command line."""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from .checks import check_types
from .errors import ConfigError


OPTIONS: dict[str, type["MethodOptions"]] = {}
"""Options by name of the method; filled when a subclass of [`hf_clpeft.Method`] is defined."""

RESOLVED = ("head", "view_kind")
"""Options that may be `"auto"` until the first task decides."""


@dataclass
class MethodOptions:
    """Base of every [`hf_clpeft.Method`]'s `Config`: a dataclass whose fields are the method's own options.

    Fields must be JSON-serialisable, and have a help text in their metadata. `__post_init__` may validate more than
    types, after calling `super().__post_init__()`.

    Attributes:
        name (`str`): Name of the method. Not a field: it is set when the method is defined.

    Raises:
        [`ConfigError`]: A value does not match the type hint of its field.

    Example:

    ```py
    >>> from hf_clpeft import s_lora

    >>> options = s_lora(r=4)
    >>> options.name, options.r, options.to_dict()["k"]
    ('s_lora', 4, 5)

    ```
    """

    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_types(self)
        try:  # round trip, so that saved options equal the given ones
            for field in fields(self):
                value = getattr(self, field.name)
                if isinstance(value, dict):
                    setattr(self, field.name, json.loads(json.dumps(value, default=_as_list)))
        except TypeError as error:
            raise ConfigError(f"{field.name}={value} cannot be saved: {error}.") from error

    def to_dict(self) -> dict[str, Any]:
        """The name and all options, JSON-serialisable."""
        return {"name": self.name, **asdict(self)}


def _as_list(value: Any) -> list:
    if isinstance(value, set | frozenset | tuple):
        return sorted(value) if not isinstance(value, tuple) else list(value)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


@dataclass
class UnknownOptions(MethodOptions):
    """Options of a method whose class has not been imported: enough to show and to push its model."""

    values: dict

    def __post_init__(self) -> None:
        super().__post_init__()
        self.name = self.values["name"]  # type: ignore[misc]  # on the instance

    def to_dict(self) -> dict[str, Any]:
        """The options as read from `config.json`."""
        return self.values


def read_options(values: dict) -> MethodOptions:
    """Inverse of [`~MethodOptions.to_dict`].

    Returns:
        [`MethodOptions`]: The method's `Config`; [`UnknownOptions`] if its class has not been imported.

    Raises:
        [`ConfigError`]: There is no name, an option is unknown, or its value is invalid.

    Example:

    ```py
    >>> from hf_clpeft.config import read_options

    >>> read_options({"name": "mine", "depth": 3}).values["depth"]
    3

    ```
    """
    if not isinstance(values, dict) or not isinstance(values.get("name"), str):
        raise ConfigError("method is no mapping with the name of a method and its options.")
    kind = OPTIONS.get(values["name"])
    if kind is None:
        return UnknownOptions(values)
    options = {name: value for name, value in values.items() if name != "name"}
    unknown = sorted(options.keys() - {field.name for field in fields(kind)})
    if unknown:
        raise ConfigError(f"method {values['name']} has no option {unknown[0]!r}.")
    return kind(**options)
