"""The backbone again, in modules of its own, for what must not happen to the one that everybody runs."""

import copy
from typing import Any

from ..backbones import Backbone
from .calls import hooking


def twin_of(backbone: Backbone) -> Backbone:
    """A backbone of the same weights, not copies of them, in modules of its own.

    PEFT changes a model in place. On a twin it does so where nobody else runs: an expert can be trained while others
    predict, in this thread or another.

    Args:
        backbone ([`Backbone`]): The frozen model.

    Returns:
        [`Backbone`]: What is done to its modules is not done to those of `backbone`. Buffers are copies.

    Example:

    ```py
    >>> from hf_clpeft.backbones import load_backbone
    >>> from hf_clpeft.experts.twin import twin_of

    >>> backbone = load_backbone("hf-clpeft/vit-tiny-glyphs")
    >>> twin = twin_of(backbone)
    >>> twin.model is backbone.model, twin.model.layernorm.weight is backbone.model.layernorm.weight
    (False, True)

    ```
    """
    shared: list[Any] = [*backbone.model.parameters(), backbone.model.config]
    twin = copy.copy(backbone)
    twin._modules = dict(backbone._modules)
    with hooking:
        for module in backbone.model.modules():  # hooks of others are theirs
            for name, hooks in vars(module).items():
                shared += hooks.values() if name.endswith("_hooks") and isinstance(hooks, dict) else []
        twin.model = copy.deepcopy(backbone.model, {id(thing): thing for thing in shared})
    return twin
