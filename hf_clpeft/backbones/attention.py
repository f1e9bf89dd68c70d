"""Access to the keys and values of a model's attention layers, through the attention interface of `transformers`.

An attention layer of `transformers` looks up the name in its configuration to find the function that computes softmax
attention: `sdpa`, `eager`, `flash_attention_2` and so on. Here it finds a function that lets others change keys and
values first, and then calls the one it would have called.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch


Update = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

NAME = "hf_clpeft"  # of `_attend` among the implementations of attention


class AttentionConfig:
    """The configuration of one attention layer, in which its implementation is [`intercept`]'s; all else is unchanged.

    The configuration of the model stays as it is: it says which masks are made and what is saved. A later
    `set_attn_implementation` has its effect.

    Args:
        layer (`torch.nn.Module`): The layer.

    Attributes:
        plain (`transformers.PretrainedConfig`): The configuration of the model.
        updates (`list`): Functions that change keys and values, one after another.
    """

    def __init__(self, layer: torch.nn.Module):
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, _attend)
        known: Any = layer.config
        self.plain: Any = known.plain if isinstance(known, AttentionConfig) else known
        self.updates: list[Update] = []
        self._functions = AttentionInterface()
        self._eager: Any = getattr(sys.modules[type(layer).__module__], "eager_attention_forward", None)

    @property
    def _attn_implementation(self) -> str:
        return NAME

    def function(self, on_meta: bool) -> Callable:
        """The function that the layer would have called; the plain one on the meta device, which has no kernels."""
        own: Any = self._functions.get(self.plain._attn_implementation, self._eager)
        return self._eager if on_meta else own

    def __getattr__(self, name: str) -> Any:
        if name == "plain" or name.startswith("__"):  # asked for while it is copied
            raise AttributeError(name)
        return getattr(self.plain, name)


def intercept(layer: torch.nn.Module, update: Update) -> None:
    """Lets a function change the keys and values of an attention layer before attention is computed.

    Args:
        layer (`torch.nn.Module`): A layer with a `config`, which is replaced. Other layers are not affected.
        update (callable): Maps keys and values, both of shape `(batch, heads, tokens, head_size)`, to new ones, which
            may have more tokens in front: these are never masked.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.backbones import load_backbone
    >>> from hf_clpeft.backbones.attention import intercept, sites

    >>> model, pixels = load_backbone("hf-clpeft/vit-tiny-glyphs").model, torch.randn(1, 3, 32, 32)
    >>> before = model(pixel_values=pixels).last_hidden_state
    >>> for layer in sites(model)[0]:
    ...     intercept(layer, lambda keys, values: (keys, 0 * values))
    >>> torch.equal(model(pixel_values=pixels).last_hidden_state, before)
    False

    ```
    """
    if not isinstance(layer.config, AttentionConfig):
        layer.config = AttentionConfig(layer)  # type: ignore[assignment]
    updates_of(layer).append(update)


def updates_of(layer: torch.nn.Module) -> list[Update]:
    """The functions that change the keys and values of a layer."""
    return layer.config.updates if isinstance(layer.config, AttentionConfig) else []


def sites(model: torch.nn.Module) -> list[list[torch.nn.Module]]:
    """The modules in each layer of a model that may look up their attention; no layers if they are not in one list."""
    config: Any = model.config
    count = getattr(config, "num_hidden_layers", None)
    lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    stack = next((layers for layers in lists if len(layers) == count), ())
    return [
        [module for module in layer.modules() if hasattr(getattr(module, "config", None), "_attn_implementation")]
        for layer in stack
    ]


def _attend(
    layer: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention as the layer would have computed it, on changed keys and values."""
    config: Any = layer.config
    length = key.shape[2]
    for update in config.updates:
        key, value = update(key, value)
    added = key.shape[2] - length
    if added and attention_mask is not None:  # a bias of positions in BEiT
        seen = attention_mask.dtype == torch.bool
        attention_mask = torch.nn.functional.pad(attention_mask, (added, 0), value=seen)
    return config.function(key.is_meta)(layer, query, key, value, attention_mask, **options)
