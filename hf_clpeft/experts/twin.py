"""Copies of the backbone with shared weights, for in-place changes by PEFT."""

import copy
from typing import Any

from ..backbones import Backbone
from .calls import hooks_lock


def twin_of(backbone: Backbone) -> Backbone:
    """Copies the modules of a backbone and shares its weights.

    PEFT modifies a model in place. On a twin this does not affect the original, so an expert can be trained while
    others predict, in this thread or another.

    Returns:
        [`Backbone`]: A copy with its own modules and buffers. Parameters are shared.

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
    with hooks_lock:
        for module in backbone.model.modules():  # hooks are shared, not copied
            for name, hooks in vars(module).items():
                shared += hooks.values() if name.endswith("_hooks") and isinstance(hooks, dict) else []
        twin.model = copy.deepcopy(backbone.model, {id(thing): thing for thing in shared})
    return twin
