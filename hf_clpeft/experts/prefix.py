"""Prefix tuning for vision transformers: keys and values in front of those of chosen layers, which all tokens see.

PEFT hands prefixes to a language model as its cache of past tokens, which a vision transformer lacks. Here they go
through the attention interface of `transformers`; the embedding and the file format are PEFT's, and so is the
configuration, but for a choice of layers.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, PeftType, PrefixEncoder, PrefixTuningConfig

from ..backbones import Backbone
from ..backbones.attention import intercept, sites, updates_of
from .calls import active_call, attach_to_attention
from .prompts import PromptTunedVisionModel, TokenTable


States = tuple[torch.Tensor, torch.Tensor]  # keys and values, of shape (batch, heads, tokens, head_size)


@dataclass
class PrefixConfig(PrefixTuningConfig):
    """PEFT's configuration of prefixes, and which layers have one.

    The field is named as in `peft.LoraConfig`. PEFT has none here: it ignores it with a warning, and takes the
    prefixes for those of the first layers.

    Args:
        layers_to_transform (`list[int]`, *optional*): Rising indices of the layers, from 0. Default, as in PEFT: the
            first `num_layers`, or all.

    Raises:
        `ValueError`: `num_layers` is not their number.

    Example:

    ```py
    >>> from hf_clpeft.experts.prefix import PrefixConfig

    >>> PrefixConfig(num_virtual_tokens=5, layers_to_transform=[2, 3, 4]).num_layers
    3

    ```
    """

    layers_to_transform: list[int] | None = field(
        default=None, metadata={"help": "Rising indices of the layers; default: the first num_layers, or all."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers_to_transform is not None:
            self.num_layers = len(self.layers_to_transform) if self.num_layers is None else self.num_layers
            if self.num_layers != len(self.layers_to_transform):
                raise ValueError(f"num_layers={self.num_layers}, but layers_to_transform={self.layers_to_transform}.")


def layers_of(config: Any, num_layers: int) -> list[int]:
    """Indices of the layers with a prefix.

    Args:
        config (`peft.PrefixTuningConfig`): The configuration, which need not be of this class.
        num_layers (`int`): Layers of the backbone.

    Raises:
        `ValueError`: The backbone has too few layers.
    """
    count = num_layers if config.num_layers is None else config.num_layers
    chosen = getattr(config, "layers_to_transform", None)
    layers = list(range(count)) if chosen is None else chosen
    if not 1 <= len(layers) <= num_layers or layers[-1] >= num_layers:
        raise ValueError(f"its {len(layers)} layers end with index {max(layers, default=0)}, of {num_layers} layers.")
    return layers


def prepend(prefix: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> States:
    """Puts a prefix in front of keys and values.

    Args:
        prefix (`torch.Tensor` of shape `(2, length, hidden_size)` or `(batch, 2, length, hidden_size)`): Keys and
            values, one prefix for the batch or one for every image.
        key, value (`torch.Tensor` of shape `(batch, heads, tokens, head_size)`): Those of the layer.

    Returns:
        Keys and values of shape `(batch, heads, length + tokens, head_size)`.
    """
    heads = prefix.expand(key.shape[0], -1, -1, -1).unflatten(-1, (key.shape[1], -1)).transpose(2, 3)
    keys, values = heads.unbind(dim=1)
    return torch.cat([keys.to(key.dtype), key], dim=2), torch.cat([values.to(value.dtype), value], dim=2)


def prepare_for_prefixes(backbone: Backbone) -> None:
    """Lets [`insert_prefixes`] put prefixes into the layers of a backbone; without it, nothing changes.

    Raises:
        [`BackboneError`]: The backbone does not support prefixes.
    """
    backbone.check_prefixes()
    for number, modules in enumerate(sites(backbone.model)):
        for module in modules:
            attach_to_attention(module, _key(number))


def insert_prefixes(prefixes: Mapping[int, torch.Tensor]) -> AbstractContextManager[None]:
    """Context manager: backbones put prefixes in front of the keys and values of some layers, in this thread only.

    The prefixes of context managers around it, or of experts that run within it, come on top.

    Args:
        prefixes (mapping of `int` to `torch.Tensor`): Prefixes by index of their layer, from 0. Each is of shape
            `(2, length, hidden_size)`, keys and values; or `(batch, 2, length, hidden_size)`, for every image its own.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.backbones import load_backbone
    >>> from hf_clpeft.experts.prefix import insert_prefixes, prepare_for_prefixes

    >>> backbone = load_backbone("hf-clpeft/vit-tiny-glyphs")
    >>> prepare_for_prefixes(backbone)
    >>> pixels = torch.randn(2, 3, 32, 32)
    >>> with insert_prefixes({0: torch.randn(2, 5, backbone.hidden_size)}):
    ...     features = backbone(pixels)
    >>> torch.equal(features, backbone(pixels))
    False

    ```
    """
    return active_call(_Inserting({_key(layer): prefix for layer, prefix in prefixes.items()}))


def split(rows: torch.Tensor, layers: list[int]) -> dict[int, torch.Tensor]:
    """Prefixes by layer, of shape `(..., 2, length, hidden_size)`, from PEFT's `prompt_embeddings`.

    Args:
        rows (`torch.Tensor` of shape `(..., length, layers * 2 * hidden_size)`): As PEFT saves them.
        layers (`list[int]`): Index of each layer.
    """
    parts = rows.unflatten(-1, (len(layers), 2, -1)).movedim(-4, -2)  # (..., layers, 2, length, hidden_size)
    return dict(zip(layers, parts.unbind(dim=-4), strict=True))


class PrefixTunedVisionModel(PromptTunedVisionModel):
    """A `PeftModel` with trainable keys and values in front of those of a vision transformer's layers.

    The outputs have as many tokens as without a prefix.

    Args:
        model (`transformers.PreTrainedModel`): A vision transformer that uses the attention interface of
            `transformers`; see [`Backbone.check_prefixes`].
        peft_config (`PrefixTuningConfig`): `num_virtual_tokens`: the length of the prefix of a layer. Which layers
            have one: see [`PrefixConfig`].
        adapter_name (`str`, *optional*, defaults to `"default"`): Name of the prefix.
        kwargs: As for `peft.PeftModel`.

    Source: Prefix-Tuning, arXiv 2101.00190; in vision transformers, DualPrompt, arXiv 2204.04799.

    Example:

    ```py
    >>> import torch
    >>> from peft import PrefixTuningConfig
    >>> from hf_clpeft.backbones import load_backbone
    >>> from hf_clpeft.experts import PrefixTunedVisionModel

    >>> backbone = load_backbone("hf-clpeft/vit-tiny-glyphs")
    >>> model = PrefixTunedVisionModel(backbone.model, PrefixTuningConfig(num_virtual_tokens=4, num_layers=2))
    >>> model(pixel_values=torch.zeros(1, 3, 32, 32)).last_hidden_state.shape[1]
    17

    ```
    """

    def _make_encoder(self, config: Any) -> torch.nn.Module:
        encoder = PrefixEncoder(config)
        if config.init_weights != "zero":
            torch.nn.init.normal_(encoder.embedding.weight, std=0.02)  # as prompts
        return encoder

    def _attach(self) -> None:
        layers = sites(self.base_model)
        self._num_layers = len(layers)
        self._updates = [
            (module, partial(self._insert, number)) for number in range(len(layers)) for module in layers[number]
        ]
        for module, update in self._updates:
            intercept(module, update)

    def _insert(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> States:
        config: Any = self.peft_config[self.active_adapter]
        layers = layers_of(config, self._num_layers)
        if self._adapters_disabled or layer not in layers:
            return key, value
        encoder: Any = self.prompt_encoder[self.active_adapter]
        return prepend(split(encoder.embedding.weight, layers)[layer], key, value)

    def unload(self) -> torch.nn.Module:
        """Removes the prefix and returns the unchanged backbone."""
        for module, update in self._updates:
            updates_of(module).remove(update)
        return self.base_model


class PrefixTable(TokenTable):
    """Prefixes as virtual tokens of all their layers; those selected for an image are concatenated.

    Args:
        backbone ([`Backbone`]): The frozen model. What is added to its attention layers does nothing outside
            [`~PrefixTable.selected`] and in other threads.
        config (`peft.PrefixTuningConfig`): Configuration of the first expert, which chooses the layers.
    """

    def __init__(self, backbone: Backbone, config: PeftConfig):
        self.num_layers = backbone.num_layers
        self.layers = layers_of(config, self.num_layers)
        self.hidden_size = backbone.hidden_size
        super().__init__(len(self.layers) * 2 * self.hidden_size, backbone.device)
        prepare_for_prefixes(backbone)

    def pack(self, config: PeftConfig, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
        """Converts a prefix to rows; arguments as for [`LoraTable.pack`].

        Returns:
            `torch.Tensor` of shape `(length, layers * 2 * hidden_size)`, and the scale, which is always 1.

        Raises:
            `ValueError`: It is not a prefix for the same layers of this backbone.
        """
        if config.peft_type != PeftType.PREFIX_TUNING or not isinstance(config, PrefixTuningConfig):
            raise ValueError(f"it is {config.peft_type}, not a prefix.")
        layers = layers_of(config, self.num_layers)
        if layers != self.layers:
            raise ValueError(f"it is a prefix for the layers {layers}, and not {self.layers}.")
        return self.tokens(config, tensors)

    def selected(
        self, selection: torch.Tensor, form: str, dtype: torch.dtype, rows: torch.Tensor | None = None
    ) -> AbstractContextManager[None]:
        """Context manager: the backbone inserts every image's own prefixes; arguments as for [`PromptTable`]."""
        return insert_prefixes(split(self.tokens_of(selection, rows).to(dtype), self.layers))


class _Inserting:
    """A [`Call`] that inserts prefixes, by key of their layer; see [`insert_prefixes`]."""

    def __init__(self, prefixes: dict[str, torch.Tensor]):
        self.prefixes = prefixes

    def update(self, key: str, args: tuple, output: Any) -> States | None:
        """Puts the prefix of an attention layer in front of its keys and values."""
        prefix = self.prefixes.get(key)
        return None if prefix is None else prepend(prefix, *output)


def _key(layer: int) -> str:
    return f"attention.{layer}"
