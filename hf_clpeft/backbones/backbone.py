"""The frozen vision model that all experts share: features of pictures, and where adapters find their layers."""

import copy
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..config.model import BackboneConfig
from .errors import BackboneError
from .probe import Layout, probe, why_no_prompt
from .transform import ImageTransform


if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor


QUERY_VALUE_NAMES = (
    *(("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"), ("q", "v"), ("qkv", "qkv")),
    # What ConvNeXt has in their place, the same in DINOv3, and ResNet, which has no linear layers.
    *(("pwconv1", "pwconv2"), ("pointwise_conv1", "pointwise_conv2"), ("convolution", "convolution")),
)
CLS_NAMES = ("cls_token", "class_embedding", "class_token")


class Backbone(torch.nn.Module):
    """A frozen vision model. Build it with [`load_backbone`].

    Args:
        model (`transformers.PreTrainedModel`): The model; frozen here.
        processor (`transformers.BaseImageProcessor`): Its image processor.
        config ([`BackboneConfig`]): Where it came from.
        layout ([`Layout`], *optional*): What it makes of a picture; found out here if left out.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.backbones import load_backbone

    >>> backbone = load_backbone("hf-clpeft/vit-tiny-glyphs")
    >>> features = backbone(torch.zeros(2, 3, 32, 32))
    >>> tuple(features.shape) == (2, backbone.hidden_size)
    True

    ```
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        processor: "BaseImageProcessor",
        config: BackboneConfig,
        layout: Layout | None = None,
    ):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.processor = processor
        self.config = config
        self.transform = ImageTransform(processor, getattr(getattr(model, "config", None), "num_channels", 3))
        self._has_cls = any(name.endswith(CLS_NAMES) for name, _ in model.named_parameters())
        # Taken down while the model is still bare: an adapter on a layer hides the layer's name.
        self._layer_names = _names_of(model, torch.nn.Linear) or _names_of(model, torch.nn.Conv2d)
        if layout is None:  # found out now, as there may be hooks on the model later
            with suppress(Exception):  # which is raised by whoever asks for it
                layout = probe(model, self.input_shape)
        self._layout = layout

    @property
    def layout(self) -> Layout:
        """What the model makes of a picture: width, layers, tokens or places."""
        return self._layout or probe(self.model, self.input_shape)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the pixel values that it takes."""
        return self.transform.channels, self.config.image_size, self.config.image_size

    @property
    def hidden_size(self) -> int:
        """Width of a feature."""
        return self.layout.hidden_size

    def check_prompts(self) -> None:
        """Raises [`BackboneError`] unless prompt tokens can be inserted behind its embeddings."""
        places = "it gives places, as a ConvNet does, and no tokens"
        why = places if self.layout.places else why_no_prompt(self.model, self.input_shape)
        if why is not None:
            raise BackboneError(
                f"{self.config.name_or_path} takes no prompts: {why}. Choose LoRA, or a backbone such as ViT."
            )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    def find_query_value(self) -> list[str]:
        """Names of the query and value projections, for `LoraConfig.target_modules`; of a ConvNet, its convolutions.

        Returns:
            `list[str]`: For example `["q_proj", "v_proj"]`, or one name where the projections are fused.

        Raises:
            [`BackboneError`]: The model has no projections of a known name.
        """
        names = self._layer_names
        for query, value in QUERY_VALUE_NAMES:
            if query in names and names.count(query) == names.count(value):
                return list(dict.fromkeys([query, value]))
        raise BackboneError(
            f"No query and value projections found in {type(self.model).__name__}; its layers are named "
            f"{sorted(set(names))}. Name those to adapt with target_modules."
        )

    def train(self, mode: bool = True) -> "Backbone":
        """Keeps the backbone in evaluation mode: it is frozen, dropout included."""
        return super().train(False)

    @property
    def num_layers(self) -> int:
        """How many layers of one width it has; 1 where stages differ in width, which are not cut."""
        return self.layout.num_layers

    def tokens(self, pixel_values: torch.Tensor, layers: int | None = None) -> torch.Tensor:
        """Outputs of all tokens, behind the final layer norm.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): Normalised images.
            layers (`int`, *optional*): Run only so many of the layers.

        Returns:
            `torch.Tensor` of shape `(batch, tokens, hidden_size)`, [CLS] first, in the backbone's dtype.
        """
        model = self.model if layers is None else self._shorter(layers)
        return model(pixel_values=pixel_values.to(self.model.dtype)).last_hidden_state

    def forward(self, pixel_values: torch.Tensor, layers: int | Sequence[int] | None = None) -> torch.Tensor:
        """[CLS] features; the mean over all places where there is no such token.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): Normalised images.
            layers (`int` or sequence of `int`, *optional*): Run only so many of the layers. Several numbers,
                rising: the features behind each of these layers, L2-normalised, side by side, from one pass.

        Returns:
            `torch.Tensor` of shape `(batch, hidden_size)`, or so often that width, in the backbone's dtype.
        """
        if layers is None or isinstance(layers, int):
            return self.pool(self.tokens(pixel_values, layers))
        *earlier, last = layers
        features: list[torch.Tensor] = []
        model = self._shorter(last)  # of this call alone, and so are the layers that are listened to
        stack: Any = model.get_submodule(self.layout.layers or "")
        for i in earlier:
            stack[i - 1] = _shallow_copy(stack[i - 1])
            stack[i - 1].register_forward_hook(lambda *call: features.append(self._center(call[2])))
        outputs = model(pixel_values=pixel_values.to(self.model.dtype)).last_hidden_state
        features.append(self.pool(outputs))
        return torch.cat([torch.nn.functional.normalize(feature, dim=-1) for feature in features], dim=-1)

    def pool(self, outputs: torch.Tensor) -> torch.Tensor:
        """One feature of an image.

        Args:
            outputs (`torch.Tensor` of shape `(batch, tokens, hidden_size)` or `(batch, hidden_size, height, width)`):
                Of a transformer, or of a ConvNet.

        Returns:
            `torch.Tensor` of shape `(batch, hidden_size)`.
        """
        if outputs.dim() == 4:
            return outputs.mean(dim=(2, 3))
        return outputs[:, 0] if self._has_cls else outputs.mean(dim=1)

    @torch.no_grad()
    def features(self, images: Sequence) -> np.ndarray:
        """Features of images as they come, for example for [`TaskStream.from_batches`].

        Args:
            images (sequence of `PIL.Image.Image`): Images of any size.

        Returns:
            `float32` array of shape `(len(images), hidden_size)`.
        """
        pixels = torch.from_numpy(self.transform.resize(images)).to(self.device)
        return self(self.transform.normalize(pixels)).float().cpu().numpy()

    def _center(self, output: torch.Tensor | tuple) -> torch.Tensor:
        """Features behind an earlier layer, as the layer norm that follows the last would centre them."""
        features = self.pool(output[0] if isinstance(output, tuple) else output)
        return features - features.mean(dim=-1, keepdim=True)

    def _shorter(self, layers: int) -> torch.nn.Module:
        """The same modules with fewer layers: copies of the containers on the way to the list of layers, no more."""
        if self.layout.layers is None:
            return self.model
        path = self.layout.layers.split(".")
        model = container = _shallow_copy(self.model)
        for name in path[:-1]:
            inner = _shallow_copy(container.get_submodule(name))
            container._modules[name] = inner
            container = inner
        stack = container.get_submodule(path[-1])
        assert isinstance(stack, torch.nn.ModuleList)
        container._modules[path[-1]] = stack[:layers]
        return model


def _shallow_copy(module: torch.nn.Module) -> torch.nn.Module:
    duplicate = copy.copy(module)
    duplicate._modules, duplicate._forward_hooks = dict(module._modules), module._forward_hooks.copy()
    return duplicate


def _names_of(model: torch.nn.Module, kind: type[torch.nn.Module]) -> list[str]:
    """Last parts of the names of all layers of a kind."""
    return [name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, kind)]
