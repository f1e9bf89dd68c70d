"""Reads what version 1 of the format said: one configuration for all methods, in which flags told them apart."""

from typing import Any


DEFAULTS: dict[str, Any] = {
    "experts": "per_task",
    "router": "prototypes",
    "classifier": "head",
    "mix": 1,
    "joint": False,
    "projection_size": 10_000,
    "k": 5,
    "head": "auto",
    "query_with_first_expert": False,
    "route_layer": None,
    "pool_size": 10,
    "top_n": 5,
    "pull": 0.5,
    "readout": "cls",
    "mask_logits": True,
}


def upgrade(values: dict) -> dict:
    """The same as version 2 says it. The files of both are the same; what a value may be is checked when it is read.

    Args:
        values (`dict`): Content of a `config.json`.

    Returns:
        `dict`

    Raises:
        `KeyError`, `TypeError`, `AttributeError`: Something is missing, or of another type.

    Example:

    ```py
    >>> from hf_clpeft.config.version1 import upgrade

    >>> method = {"name": "s_lora", "peft": {"peft_type": "LORA", "r": 4, "lora_alpha": 4}, "k": 20}
    >>> upgrade({"format_version": 1, "method": method})["method"]["name"]
    's_lora'

    ```
    """
    return {**values, "method": _method(dict(values["method"])), "format_version": 2}


def _method(old: dict[str, Any]) -> dict[str, Any]:
    """Name and options of the method: a named one where its options can say all that the flags said."""
    unknown = old.keys() - DEFAULTS.keys() - {"name", "peft"}
    if unknown:
        raise KeyError(f"method has no field {min(unknown)!r}")
    old = {**DEFAULTS, **old}
    name, experts, peft, first = old["name"], old["experts"], dict(old["peft"]), old["query_with_first_expert"]
    layers = [old["route_layer"]] if isinstance(old["route_layer"], int) else old["route_layer"]
    query = {"query_layers": layers}
    projection = {**query, "projection_size": old["projection_size"]}
    pool = {**query, **{option: old[option] for option in ("pool_size", "top_n", "pull")}}
    if (experts, old["classifier"]) == ("per_task", "both"):
        options = {**query, "mix": old["mix"], "router": old["router"]}
        return _with_peft(name, peft, options, {"s_lora_mix": first}, "s_x_mix")
    if experts == "per_task":
        options = {**projection, **{option: old[option] for option in ("k", "router", "head")}}
        names = {"s_lora": not first, "s_lora_pp": first, "s_prompts": not first, "s_prompts_pp": first}
        return _with_peft(name, peft, options, names, "s_x_pp" if first else "s_x")
    if experts == "pool":
        cls = old["readout"] == "cls"
        general = _with_peft(name, peft, pool, {"l2l": cls, "l2p": not cls}, "l2x")
        return general if general["name"] != "l2x" else {**general, "readout": old["readout"]}
    if experts == "single":  # trained in turn, or jointly: what it is comes to the same
        name = "sequential_lora" if name == "joint_lora" else name
        return _with_peft(name, peft, {}, {"sequential_lora": True}, "single")
    if experts == "first":
        named = _with_peft(name, peft, projection, {"ranpac_first": old["router"] == "ridge"}, "closed_form_first")
        return named if named["name"] != "closed_form_first" else {**named, "router": old["router"]}
    if old["joint"]:
        return {"name": "linear_probe"}
    if name in ("ncm", "slda") and old["router"] == {"ncm": "class_means", "slda": "gaussian"}[name]:
        return {"name": name, **query}
    if (name, old["router"]) == ("ranpac", "ridge"):
        return {"name": name, **projection}
    return {"name": "closed_form", "router": old["router"], **projection}


def _with_peft(name: str, peft: dict, options: dict, names: dict[str, bool], general: str) -> dict[str, Any]:
    """Says `peft` as the options of a named method, if that is one of `names`; as it is for the general method."""
    if names.get(name) and peft.get("peft_type") == "LORA" and "prompts" not in name and name != "l2p":
        further = {option: value for option, value in peft.items() if option not in ("peft_type", "r")}
        if further.get("lora_alpha") == peft.get("r", 8):
            del further["lora_alpha"]
        else:
            further.setdefault("lora_alpha", 8)  # as PEFT has it
        return {"name": name, "r": peft.get("r", 8), "lora": further, **options}
    if names.get(name) and peft.keys() == {"peft_type", "num_virtual_tokens"}:
        return {"name": name, "prompt_length": peft["num_virtual_tokens"], **options}
    return {"name": general, "peft": peft, **options}
