"""The frozen vision backbone that all experts share: image features and the layers that adapters target."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..config.model import BackboneConfig
from .errors import BackboneError
from .last_layer import ForClassToken, Parts, find_parts, shallow_copy
from .probe import Layout, prefix_obstacle, probe, prompt_obstacle
from .transform import ImageTransform
from .trunk import Hidden, Resume, Trunk


if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor


QUERY_VALUE_NAMES = (
    *(("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"), ("q", "v"), ("qkv", "qkv")),
    # Their counterparts in ConvNeXt, in DINOv3's ConvNeXt, and in ResNet, which has no linear layers.
    *(("pwconv1", "pwconv2"), ("pointwise_conv1", "pointwise_conv2"), ("convolution", "convolution")),
)
CLS_NAMES = ("cls_token", "class_embedding", "class_token")


class Backbone(torch.nn.Module):
    """A frozen vision model. Build it with [`load_backbone`].

    Args:
        model (`transformers.PreTrainedModel`): The model, which this freezes.
        processor (`transformers.BaseImageProcessor`): Its image processor.
        config ([`BackboneConfig`]): Its source, input size and weight hash.
        layout ([`Layout`], *optional*): Shapes of its outputs; probed here if left out.

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
        # Collected before any adapter is attached, as PEFT wraps layers and hides their names.
        self._layer_names = _layer_names_of(model, torch.nn.Linear) or _layer_names_of(model, torch.nn.Conv2d)
        if layout is None:  # probed now, as hooks may be attached later
            with suppress(Exception):  # raised on access instead
                layout = probe(model, self.input_shape)
        self._layout = layout
        self._parts = self._find_parts()

    @property
    def layout(self) -> Layout:
        """Shapes of the model's outputs: width, layers, tokens or feature map."""
        return self._layout or probe(self.model, self.input_shape)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the input."""
        return self.transform.channels, self.config.image_size, self.config.image_size

    @property
    def hidden_size(self) -> int:
        """Size of a feature vector."""
        return self.layout.hidden_size

    def check_prompts(self) -> None:
        """Raises [`BackboneError`] unless prompt tokens can be inserted after the embedding layer."""
        self._refuse("prompts", prompt_obstacle)

    def check_prefixes(self) -> None:
        """Raises [`BackboneError`] unless keys and values can be put in front of those of every layer."""
        self._refuse("prefixes", prefix_obstacle)

    def _refuse(self, what: str, obstacle: Callable[["PreTrainedModel", tuple[int, int, int]], str | None]) -> None:
        no_tokens = "it outputs a feature map, as a ConvNet does, instead of tokens"
        why = no_tokens if self.layout.feature_map else obstacle(self.model, self.input_shape)
        if why is not None:
            raise BackboneError(
                f"{self.config.name_or_path} does not support {what}: {why}. Use LoRA, or a backbone such as ViT."
            )

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.model.device

    def find_query_value(self) -> list[str]:
        """Names of the query and value projections, for `LoraConfig.target_modules`; for a ConvNet, its convolutions.

        Returns:
            `list[str]`: For example `["q_proj", "v_proj"]`, or one name where the projections are fused.

        Raises:
            [`BackboneError`]: The model has no projections with known names.
        """
        names = self._layer_names
        for query, value in QUERY_VALUE_NAMES:
            if query in names and names.count(query) == names.count(value):
                return list(dict.fromkeys([query, value]))
        raise BackboneError(
            f"No query and value projections found in {type(self.model).__name__}; its layers are named "
            f"{sorted(set(names))}. Set target_modules to those to adapt."
        )

    def train(self, mode: bool = True) -> "Backbone":
        """Keeps the backbone in evaluation mode, so that dropout stays off."""
        return super().train(False)

    @property
    def num_layers(self) -> int:
        """Number of layers of equal width; 1 if stages differ in width and cannot be truncated."""
        return self.layout.num_layers

    def tokens(
        self, pixel_values: torch.Tensor, layers: int | None = None, trunk: Trunk | None = None
    ) -> torch.Tensor:
        """Outputs of all tokens, after the final layer norm.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): Normalised images.
            layers (`int`, *optional*): Run only the first `layers` layers.
            trunk ([`Trunk`], *optional*): What passes over the same images share.

        Returns:
            `torch.Tensor` of shape `(batch, tokens, hidden_size)`, [CLS] first, in the backbone's dtype.
        """
        return self._run(pixel_values, layers, {}, trunk, whole=True)

    def forward(
        self,
        pixel_values: torch.Tensor,
        layers: int | Sequence[int] | None = None,
        trunk: Trunk | None = None,
    ) -> torch.Tensor:
        """[CLS] features; mean-pooled outputs for models without such a token.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): Normalised images.
            layers (`int` or sequence of `int`, *optional*): Run only the first `layers` layers. An increasing
                sequence: concatenate the L2-normalised features after each of these layers, in one forward pass.
            trunk ([`Trunk`], *optional*): What passes over the same images share.

        Returns:
            `torch.Tensor` of shape `(batch, hidden_size * number of layers taken)`, in the backbone's dtype.
        """
        if layers is None or isinstance(layers, int):
            return self.pool(self._run(pixel_values, layers, {}, trunk))
        *earlier, last = layers
        features: list[torch.Tensor] = []
        taps: Taps = {i: lambda output: features.append(self._center(output)) for i in earlier}
        features.append(self.pool(self._run(pixel_values, last, taps, trunk)))
        return torch.cat([torch.nn.functional.normalize(feature, dim=-1) for feature in features], dim=-1)

    def below(self, pixel_values: torch.Tensor, trunk: Trunk) -> Hidden:
        """Outputs of the whole trunk, which are computed unless `trunk` has them."""
        hidden = trunk.find(pixel_values)
        if hidden is None:
            self._run(pixel_values, trunk.depth, {}, trunk)
            hidden = trunk.find(pixel_values)
        assert hidden is not None
        return hidden

    def depth_below(self, names: Iterable[str]) -> int:
        """Number of first layers that an adapter leaves alone; 0 if passes cannot share them.

        Args:
            names (iterable of `str`): Names of the modules that it adapts.
        """
        place, numbers = f"{self.layout.layers}.", []
        for name in names:
            if not name.startswith(place):
                return 0
            numbers.append(int(name.removeprefix(place).split(".")[0]))
        depth = min(numbers, default=0)
        return depth if depth and self._splits else 0

    def names_in(self, layers: Iterable[int], suffixes: Iterable[str]) -> list[str]:
        """Names of the modules in some layers, as `LoraConfig.target_modules` takes them.

        Args:
            layers (iterable of `int`): Layers, from 1.
            suffixes (iterable of `str`): What the names end with, for example `["q_proj", "v_proj"]`.

        Raises:
            [`BackboneError`]: The backbone has no layers to choose among, or none of them has such a module.
        """
        place = self.layout.layers
        if place is None or not self._splits:
            raise BackboneError(
                f"{self.config.name_or_path} is not a stack of layers of one width, of which a pass can go on after "
                "any, so that expert_layers has none to choose among; leave it out."
            )
        ends = tuple(f".{suffix}" for suffix in suffixes)
        inside = tuple(f"{place}.{number - 1}." for number in layers)
        names = [name for name, _ in self.model.named_modules() if name.startswith(inside) and name.endswith(ends)]
        if not names:
            raise BackboneError(
                f"The layers of {self.config.name_or_path} have no module whose name ends with {sorted(suffixes)}."
            )
        return names

    def pool(self, outputs: torch.Tensor) -> torch.Tensor:
        """Pools outputs to one feature vector per image.

        Args:
            outputs (`torch.Tensor` of shape `(batch, tokens, hidden_size)` or `(batch, hidden_size, height, width)`):
                Outputs of a transformer, or of a ConvNet.

        Returns:
            `torch.Tensor` of shape `(batch, hidden_size)`.
        """
        if outputs.dim() == 4:
            return outputs.mean(dim=(2, 3))
        return outputs[:, 0] if self._has_cls else outputs.mean(dim=1)

    @torch.no_grad()
    def features(self, images: Sequence) -> np.ndarray:
        """Features of unprocessed images, for example for [`TaskStream.from_batches`].

        Args:
            images (sequence of `PIL.Image.Image`): Images of any size.

        Returns:
            `float32` array of shape `(len(images), hidden_size)`.
        """
        pixels = torch.from_numpy(self.transform.resize(images)).to(self.device)
        return self(self.transform.normalize(pixels)).float().cpu().numpy()

    def _center(self, output: Any) -> torch.Tensor:
        """Features after an earlier layer, centred as the final layer norm would."""
        features = self.pool(output[0] if isinstance(output, tuple) else output)
        return features - features.mean(dim=-1, keepdim=True)

    def _run(
        self, pixel_values: torch.Tensor, layers: int | None, taps: "Taps", trunk: Trunk | None, whole: bool = False
    ) -> torch.Tensor:
        """Outputs after the first `layers` layers; calls `taps` with outputs of layers before.

        Unless they are to be `whole`, the last of all layers, which passes never share, is run for [CLS] alone.
        """
        last, hidden = layers or self.num_layers, None
        # Copies of modules do not compile.
        parts = None if whole or last < self.num_layers or torch.compiler.is_compiling() else self._parts
        if layers is None and parts is None and (trunk is None or not trunk.depth):
            return self.model(pixel_values=pixel_values.to(self.model.dtype)).last_hidden_state
        if trunk is not None and trunk.depth:
            hidden = trunk.find(pixel_values, min([last, *taps]))
            shared = min(trunk.depth, last)
            if hidden is None or hidden.layers < shared:
                wanted = taps.get(shared)

                def keep(output: Any) -> None:
                    trunk.keep(pixel_values, Hidden.of(shared, output))
                    if wanted is not None:
                        wanted(output)

                taps = {**taps, shared: keep}
        model, stack = self._truncated(last, hidden)
        for number, tap in taps.items():  # on copies for this call, so that hooks are not shared
            position = number - (1 if hidden is None else hidden.layers)
            stack[position] = shallow_copy(stack[position])
            stack[position].register_forward_hook(lambda module, args, output, tap=tap: tap(output))
        # A layer with a forward pass of its own, as with gradient checkpointing, would run that of the original.
        if parts is not None and "forward" not in vars(stack[-1]):
            stack[-1] = ForClassToken(stack[-1], parts)
        # The embeddings of one image are enough where outputs of layers take their place.
        images = pixel_values if hidden is None else pixel_values[:1]
        return model(pixel_values=images.to(self.model.dtype)).last_hidden_state

    def _truncated(self, layers: int, hidden: Hidden | None = None) -> tuple[torch.nn.Module, Any]:
        """The model with only its first layers, those before `hidden` replaced by it, and the list of these layers.

        Containers around the layers are shallow copies with shared weights.
        """
        if self.layout.layers is None:
            return self.model, None
        path = self.layout.layers.split(".")
        model = container = shallow_copy(self.model)
        for name in path[:-1]:
            inner = shallow_copy(container.get_submodule(name))
            container._modules[name] = inner
            container = inner
        stack = container.get_submodule(path[-1])
        assert isinstance(stack, torch.nn.ModuleList)
        kept = stack[:layers]
        if hidden is not None:
            kept = torch.nn.ModuleList([Resume(hidden), *stack[hidden.layers : layers]])
        container._modules[path[-1]] = kept
        return model, kept

    def _find_parts(self) -> Parts | None:
        """The parts of the last layer if it can be run for [CLS] alone; found before adapters are attached."""
        if not self._has_cls or self._layout is None or self._layout.layers is None:
            return None
        found: list[Parts | None] = []
        model, stack = self._truncated(self.num_layers)
        stack[-1] = shallow_copy(stack[-1])

        def find(module: torch.nn.Module, inputs: tuple, options: dict) -> None:
            found.append(find_parts(self.model.get_submodule(self.layout.layers)[-1], *inputs, **options))

        stack[-1].register_forward_pre_hook(find, with_kwargs=True)
        with suppress(Exception), torch.no_grad():  # an architecture may raise anything
            model(pixel_values=torch.zeros(1, *self.input_shape, dtype=self.model.dtype, device=self.device))
        return found[0] if found else None

    @cached_property
    def _splits(self) -> bool:
        """Whether a pass that goes on after half of the layers gives what a whole pass does."""
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(2, *self.input_shape, generator=generator).to(self.device)
        trunk = Trunk(self.num_layers // 2)
        try:
            with torch.no_grad():
                whole, resumed = self.tokens(pixels, trunk=trunk), self.tokens(pixels, trunk=trunk)
        except Exception:  # an architecture may raise anything
            return False
        return torch.allclose(whole, resumed, rtol=1e-3, atol=1e-4)


Taps = dict[int, Callable[[Any], None]]  # what is called with the output of a layer, by its number from 1


def _layer_names_of(model: torch.nn.Module, kind: type[torch.nn.Module]) -> list[str]:
    """Last components of the names of all layers of a type."""
    return [name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, kind)]
