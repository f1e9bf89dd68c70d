"""Generates the docstrings of the options of methods."""

import inspect
import re
from dataclasses import MISSING, fields
from typing import Any

from .papers import PAPERS


EXAMPLE = """Example:

```py
>>> from hf_clpeft import METHODS, ContinualModel

>>> options = METHODS[{name!r}].Config({needed})
>>> ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", options).method.title
{title!r}

```"""


def costs_of(method: Any) -> str:
    """What a method trains, stores and costs: paragraphs of its docstring, or else of its nearest base class's.

    Example:

    ```py
    >>> from hf_clpeft import METHODS
    >>> from hf_clpeft.methods.help import costs_of

    >>> costs_of(METHODS["slda"])
    "**Trains** nothing. **Stores** the router's statistics. **Costs** one forward pass per image."

    ```
    """
    for kind in method.__mro__:
        paragraphs = inspect.cleandoc(vars(kind).get("__doc__") or "").split("\n\n")
        found = [text for text in paragraphs if re.search(r"\*\*(Trains|Stores|Costs)\*\*", text)]
        if found:
            return "\n\n".join(found)
    return ""


def explain(method: Any) -> str:
    """Docstring of a method's `Config`: the docstring of the [`Method`] subclass, and the help text of each option.

    A docstring that does not say what the method trains, stores and costs gets [`costs_of`]; a paper is cited.

    Example:

    ```py
    >>> from hf_clpeft import METHODS
    >>> from hf_clpeft.methods.help import explain

    >>> "r (`int`, *optional*, defaults to 1): Rank of the LoRA adapters." in explain(METHODS["s_lora"])
    True

    ```
    """
    about, _, example = (inspect.getdoc(method) or "").partition("Example:")
    lines, costs = [about.strip()], costs_of(method)
    lines += ["", costs] if costs not in about else []
    lines += ["", f"Paper: {PAPERS[method.paper].line()}"] if method.paper in PAPERS else []
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
