"""Gradient checkpointing: activations inside the layers of a backbone are computed again instead of kept."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ..backbones import Backbone
from ..config.errors import ConfigError
from .calls import active_calls, same_calls


def set_checkpointing(backbone: Backbone, enabled: bool) -> None:
    """Switches gradient checkpointing of a backbone, and of twins of it that are made later.

    That of transformers needs a model in training mode, in which dropout is on; a frozen backbone never is. Passes
    without gradients are not affected.

    Args:
        backbone ([`Backbone`]): The frozen model, without an adapter on it.
        enabled (`bool`): Whether to recompute the activations inside each layer in the backward pass.

    Raises:
        [`ConfigError`]: `transformers` does not mark layers of this architecture as suitable.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.backbones import load_backbone
    >>> from hf_clpeft.experts.checkpointing import set_checkpointing

    >>> backbone, pixels = load_backbone("hf-clpeft/vit-tiny-glyphs"), torch.zeros(1, 3, 32, 32, requires_grad=True)
    >>> kept = torch.autograd.grad(backbone(pixels).sum(), pixels)
    >>> set_checkpointing(backbone, True)
    >>> torch.allclose(torch.autograd.grad(backbone(pixels).sum(), pixels)[0], kept[0], atol=1e-5)
    True

    ```
    """
    layers = [layer for layer in backbone.model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if enabled and not layers:
        raise ConfigError(
            f"gradient_checkpointing: transformers does not support it for {type(backbone.model).__name__}. Leave it "
            "out, and lower train_batch_size and raise gradient_accumulation_steps as much: the batch stays the same."
        )
    for layer in layers:
        vars(layer).pop("forward", None)
        if enabled:
            layer.forward = partial(_checkpointed, layer.forward)


def _checkpointed(forward: Callable, *args: Any, **options: Any) -> Any:
    """Runs the forward pass of a layer, and in the backward pass runs it again with the same experts."""
    if not torch.is_grad_enabled():
        return forward(*args, **options)
    calls = active_calls()

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), same_calls(calls)  # the second one perhaps in a thread of autograd

    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **options)
