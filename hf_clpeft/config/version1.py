"""Reads version 1 of the format, which had one configuration class with flags for all methods."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from .checks import check_types
from .errors import ConfigError


@dataclass
class MethodV1:
    """The configuration of a method in version 1, with its defaults."""

    name: str
    peft: dict[str, Any]
    experts: Literal["per_task", "pool", "single", "first", "none"] = "per_task"
    router: str = "prototypes"
    classifier: Literal["head", "router", "both"] = "head"
    mix: int = 1
    joint: bool = False
    projection_size: int = 10_000
    k: int | str = 5
    head: Literal["auto", "shared", "per_task"] = "auto"
    query_with_first_expert: bool = False
    route_layer: int | list[int] | None = None
    pool_size: int = 10
    top_n: int = 5
    pull: float = 0.5
    readout: Literal["cls", "prompts"] = "cls"
    mask_logits: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        kind = (self.experts, self.classifier, self.joint)
        if kind not in KINDS or (self.experts == "none" and self.peft):
            raise ConfigError(
                f"experts={self.experts!r}, classifier={self.classifier!r}, joint={self.joint} and peft={self.peft} "
                "do not go together."
            )
        if (self.classifier, self.head) == ("both", "shared"):
            raise ConfigError("classifier='both' with head='shared' is not read any more.")


KINDS = {  # experts, classifier, joint
    ("per_task", "head", False),
    ("per_task", "both", False),
    ("pool", "head", False),
    ("single", "head", False),
    ("single", "head", True),
    ("first", "router", False),
    ("none", "router", False),
    ("none", "head", True),
}


def upgrade(values: dict) -> dict:
    """Converts the content of a `config.json` from version 1 to version 2. Option values are validated later.

    Raises:
        [`ConfigError`], `KeyError`, `TypeError`: Something is missing, unknown, or of another type.

    Example:

    ```py
    >>> from hf_clpeft.config.version1 import upgrade

    >>> method = {"name": "s_lora", "peft": {"peft_type": "LORA", "r": 4, "lora_alpha": 4}, "k": 20}
    >>> upgrade({"format_version": 1, "method": method})["method"]["name"]
    's_lora'

    ```
    """
    method = values["method"]
    if not isinstance(method, dict):
        raise ConfigError("method is no mapping.")
    unknown = method.keys() - {field.name for field in fields(MethodV1)}
    if unknown:
        raise ConfigError(f"method has no field {min(unknown)!r}.")
    return {**values, "method": _method(MethodV1(**method)), "format_version": 2}


def _method(old: MethodV1) -> dict[str, Any]:
    """Name and options of the method: a specific one if its options can express all flags, else a general one."""
    name, experts, peft, first = old.name, old.experts, old.peft, old.query_with_first_expert
    query = {"query_layers": [old.route_layer] if isinstance(old.route_layer, int) else old.route_layer}
    projection = {**query, "projection_size": old.projection_size}
    if old.classifier == "both":
        options = {"query_layers": query["query_layers"] or [-1], "mix": old.mix, "router": old.router}
        mixed = _with_peft(name, peft, options, {"s_lora_mix": first}, "s_x_mix")
        return mixed if first else {**mixed, "query_with_first": False}
    if experts == "per_task":
        options = {**projection, "k": old.k, "router": old.router, "head": old.head}
        names = {"s_lora": not first, "s_lora_pp": first, "s_prompts": not first, "s_prompts_pp": first}
        return _with_peft(name, peft, options, names, "s_x_pp" if first else "s_x")
    if experts == "pool":
        cls, pool = old.readout == "cls", {"pool_size": old.pool_size, "top_n": old.top_n, "pull": old.pull}
        general = _with_peft(name, peft, query | pool, {"l2l": cls, "l2p": not cls}, "l2x")
        return general if general["name"] != "l2x" else {**general, "readout": old.readout}
    if experts == "single":  # sequential and joint training produce the same kind of model
        name = "sequential_lora" if name == "joint_lora" else name
        return _with_peft(name, peft, {}, {"sequential_lora": True}, "single")
    if experts == "first":
        named = _with_peft(name, peft, projection, {"ranpac_first": old.router == "ridge"}, "closed_form_first")
        return named if named["name"] != "closed_form_first" else {**named, "router": old.router}
    if old.joint:
        return {"name": "linear_probe"}
    if (name, old.router) in (("ncm", "class_means"), ("slda", "gaussian")):
        return {"name": name, **query}
    if (name, old.router) == ("ranpac", "ridge"):
        return {"name": name, **projection}
    return {"name": "closed_form", "router": old.router, **projection}


def _with_peft(name: str, peft: dict, options: dict, names: dict[str, bool], general: str) -> dict[str, Any]:
    """Converts `peft` to options of the method `name`, if `names` allows it; keeps it for the `general` method."""
    if names.get(name) and peft.get("peft_type") == "LORA" and "prompts" not in name and name != "l2p":
        further = {option: value for option, value in peft.items() if option not in ("peft_type", "r")}
        if further.get("lora_alpha") == peft.get("r", 8):
            del further["lora_alpha"]
        else:
            further.setdefault("lora_alpha", 8)  # the default of PEFT
        return {"name": name, "r": peft.get("r", 8), "lora": further, **options}
    if names.get(name) and peft.keys() == {"peft_type", "num_virtual_tokens"}:
        return {"name": name, "prompt_length": peft["num_virtual_tokens"], **options}
    return {"name": general, "peft": peft, **options}
