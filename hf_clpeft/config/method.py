"""The options of a method: what its author declares, `config.json` keeps and the command line offers."""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from .checks import check_types
from .errors import ConfigError


OPTIONS: dict[str, type["MethodOptions"]] = {}
"""The options of every method by its name. Naming a subclass of [`hf_clpeft.Method`] fills it."""


@dataclass
class MethodOptions:
    """Base of every [`hf_clpeft.Method`]'s `Config`: a dataclass whose fields are the method's own options.

    Fields hold what JSON can hold, and have a help text in their metadata. `__post_init__` may check more than types;
    it begins with `super().__post_init__()`.

    Attributes:
        name (`str`): Name of the method. It is no field: naming the method sets it.

    Raises:
        [`ConfigError`]: A field holds another type than its annotation says.

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
        try:  # as they come back from JSON, so that saved options equal those that were given
            for field in fields(self):
                value = getattr(self, field.name)
                if isinstance(value, dict):
                    setattr(self, field.name, json.loads(json.dumps(value, default=_as_list)))
        except TypeError as error:
            raise ConfigError(f"{field.name}={value} cannot be saved: {error}.") from error

    def to_dict(self) -> dict[str, Any]:
        """The name and all options, ready for JSON."""
        return {"name": self.name, **asdict(self)}


def _as_list(value: Any) -> list:
    if isinstance(value, set | frozenset | tuple):
        return sorted(value) if not isinstance(value, tuple) else list(value)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


@dataclass
class UnknownOptions(MethodOptions):
    """Options of a method whose class has not been imported: enough to show and to push its model.

    Args:
        values (`dict`): What `config.json` says.
    """

    values: dict

    def __post_init__(self) -> None:
        super().__post_init__()
        self.name = self.values["name"]  # type: ignore[misc]  # of this one alone

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` said."""
        return self.values


def read_options(values: dict) -> MethodOptions:
    """Inverse of [`~MethodOptions.to_dict`].

    Args:
        values (`dict`): What `config.json` says of the method.

    Returns:
        [`MethodOptions`]: The method's `Config`; [`UnknownOptions`] if its class has not been imported.

    Raises:
        [`ConfigError`]: There is no name, or an option is unknown or cannot have that value.

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
