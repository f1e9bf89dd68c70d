"""Generates the docstrings of the options of methods."""

import inspect
from dataclasses import MISSING, fields
from typing import Any


EXAMPLE = """Example:

```py
>>> from hf_clpeft import METHODS, ContinualModel

>>> options = METHODS[{name!r}].Config({needed})
>>> ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", options).method.title
{title!r}

```"""


def explain(method: Any) -> str:
    """Docstring of a method's `Config`: the docstring of the [`Method`] subclass, and the help text of each option.

    Example:

    ```py
    >>> from hf_clpeft import METHODS
    >>> from hf_clpeft.methods.help import explain

    >>> "r (`int`, *optional*, defaults to 1): Rank of the LoRA adapters." in explain(METHODS["s_lora"])
    True

    ```
    """
    about, _, example = (inspect.getdoc(method) or "").partition("Example:")
    lines = [about.strip()]
    options = fields(method.Config)
    names = [option.name for option in options]
    if options:
        lines += ["", "Args:"]
    for option in options:
        kind = option.type.__name__ if isinstance(option.type, type) else str(option.type).replace("typing.", "")
        default = option.default if option.default_factory is MISSING else option.default_factory()
        says = option.metadata.get("help", "")
        lines.append(f"    {option.name} (`{kind}`, *optional*, defaults to {default!r}): {says}")
    last = (
        f"Example:{example}"
        if example
        else EXAMPLE.format(
            name=method.name,
            title=method.title,
            needed='peft={"peft_type": "LORA", "r": 4}' if "peft" in names else "",
        )
    )
    return "\n".join([*lines, "", last])
