"""Loads the frozen vision model that all experts share: its weights, its image processing, its projections."""

import copy
import hashlib
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .bundled import bundled_folder
from .config import BackboneConfig
from .errors import HfClpeftError
from .streams.images import ImageTransform


if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor


QUERY_VALUE_NAMES = (("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"), ("q", "v"), ("qkv", "qkv"))
CONVNET_NAMES = (("pwconv1", "pwconv2"), ("convolution", "convolution"))  # ConvNeXt, ResNet
CLS_NAMES = ("cls_token", "class_embedding", "class_token")


class BackboneError(HfClpeftError, ValueError):
    """A backbone that cannot be used, or is not the one that was asked for.

    Example:

    ```py
    >>> from hf_clpeft import BackboneError, load_backbone

    >>> try:
    ...     load_backbone("hf-clpeft/vit-tiny-glyphs", image_size=33)
    ... except BackboneError as error:
    ...     print(error)
    image_size=33 is no multiple of the patch size 8; try 32.

    ```
    """


class Backbone(torch.nn.Module):
    """A frozen vision model. Build it with [`load_backbone`].

    Args:
        model (`transformers.PreTrainedModel`): The model; frozen here.
        processor (`transformers.BaseImageProcessor`): Its image processor.
        config ([`BackboneConfig`]): Where it came from.

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

    def __init__(self, model: "PreTrainedModel", processor: "BaseImageProcessor", config: BackboneConfig):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.processor = processor
        self.config = config
        self.transform = ImageTransform(processor)
        self._has_cls = any(name.endswith(CLS_NAMES) for name, _ in model.named_parameters())
        # Taken down while the model is still bare: an adapter on a layer hides the layer's name.
        kinds = (torch.nn.Linear, torch.nn.Conv2d) if self.is_convnet else (torch.nn.Linear,)
        self._layer_names = [name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, kinds)]

    @property
    def hidden_size(self) -> int:
        """Width of a feature."""
        config = self.model.config
        return config.hidden_sizes[-1] if self.is_convnet else config.hidden_size

    @property
    def is_convnet(self) -> bool:
        """Whether it is made of stages of different width, and has neither tokens nor attention."""
        return hasattr(getattr(self.model, "config", None), "hidden_sizes")

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
        for query, value in CONVNET_NAMES if self.is_convnet else QUERY_VALUE_NAMES:
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
        """How many layers of one width it has; 1 for a ConvNet, which is not cut."""
        return 1 if self.is_convnet else self.model.config.num_hidden_layers

    def tokens(self, pixel_values: torch.Tensor, num_layers: int | None = None) -> torch.Tensor:
        """Outputs of all tokens, behind the final layer norm.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): Normalised images.
            num_layers (`int`, *optional*): Run only so many of the layers.

        Returns:
            `torch.Tensor` of shape `(batch, tokens, hidden_size)`, [CLS] first, in the backbone's dtype.
        """
        model = self.model if num_layers is None else self._shorter(num_layers)
        return model(pixel_values=pixel_values).last_hidden_state

    def forward(self, pixel_values: torch.Tensor, num_layers: int | Sequence[int] | None = None) -> torch.Tensor:
        """[CLS] features; the mean over all places where there is no such token.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): Normalised images.
            num_layers (`int` or sequence of `int`, *optional*): Run only so many of the layers. Several numbers,
                rising: the features behind each of these layers, L2-normalised, side by side, from one pass.

        Returns:
            `torch.Tensor` of shape `(batch, hidden_size)`, or so often that width, in the backbone's dtype.
        """
        if num_layers is None or isinstance(num_layers, int):
            return self.pool(self.tokens(pixel_values, num_layers))
        *earlier, last = num_layers
        features: list[torch.Tensor] = []
        layers = self.model.get_submodule(self._path_of_layers())
        hooks = [
            layers[i - 1].register_forward_hook(lambda *call: features.append(self._center(call[2]))) for i in earlier
        ]
        try:
            features.append(self.pool(self.tokens(pixel_values, last)))
        finally:
            for hook in hooks:
                hook.remove()
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
        return self(self.transform.normalize(pixels).to(self.model.dtype)).float().cpu().numpy()

    def _center(self, output: torch.Tensor | tuple) -> torch.Tensor:
        """Features behind an earlier layer, as the layer norm that follows the last would centre them."""
        features = self.pool(output[0] if isinstance(output, tuple) else output)
        return features - features.mean(dim=-1, keepdim=True)

    def _path_of_layers(self) -> str:
        """Name of the list of layers."""
        lists = (name for name, module in self.model.named_modules() if isinstance(module, torch.nn.ModuleList))
        return next(name for name in lists if len(self.model.get_submodule(name)) == self.num_layers)

    def _shorter(self, num_layers: int) -> torch.nn.Module:
        """The same modules with fewer layers: copies of the containers on the way to the list of layers, no more."""
        path = self._path_of_layers().split(".")
        model = container = _shallow_copy(self.model)
        for name in path[:-1]:
            inner = _shallow_copy(container.get_submodule(name))
            container._modules[name] = inner
            container = inner
        layers = container.get_submodule(path[-1])
        assert isinstance(layers, torch.nn.ModuleList)
        container._modules[path[-1]] = layers[:num_layers]
        return model


def _shallow_copy(module: torch.nn.Module) -> torch.nn.Module:
    duplicate = copy.copy(module)
    duplicate._modules = dict(module._modules)
    return duplicate


def load_backbone(
    name_or_path: str,
    revision: str | None = None,
    image_size: int | None = None,
    dtype: str | torch.dtype = "float32",
    attn_implementation: str | None = None,
    **hub_options: Any,
) -> Backbone:
    """Loads and freezes a vision transformer of `transformers`.

    Args:
        name_or_path (`str`): Repo id or folder. `"hf-clpeft/vit-tiny-glyphs"` comes with the package.
        revision (`str`, *optional*): Commit of the repo.
        image_size (`int`, *optional*): Side of the square input in pixels. Other than the checkpoint's, its position
            embeddings are interpolated here, once.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"float32"`): `"float32"`, `"bfloat16"` or `"float16"`.
        attn_implementation (`str`, *optional*): What computes attention, as in `transformers`; by default it chooses.
        hub_options: `token`, `cache_dir`, `local_files_only`.

    Returns:
        [`Backbone`]

    Raises:
        [`BackboneError`]: There is no such checkpoint, it has no safetensors or lacks weights, or `image_size` does
            not fit its patches.

    Example:

    ```py
    >>> from hf_clpeft.backbones import load_backbone

    >>> backbone = load_backbone("hf-clpeft/vit-tiny-glyphs", image_size=48)
    >>> backbone.config.image_size
    48

    ```
    """
    from transformers import AutoConfig, AutoModel
    from transformers.models.auto import MODEL_MAPPING

    # The name in `transformers` itself asked for torchvision before 5.2x.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    bundled = bundled_folder(name_or_path)
    source = str(bundled or name_or_path)
    where: dict[str, Any] = {"revision": None if bundled else revision, **hub_options}
    try:
        config = AutoConfig.from_pretrained(source, **where)
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"The backbone {name_or_path!r} cannot be loaded ({str(error).splitlines()[0]}) Pass backbone= with the "
            "repo id or folder where you have it."
        ) from error
    # The pooler is neither part of the [CLS] feature nor of many checkpoints.
    model_class: Any = MODEL_MAPPING[type(config)]
    accepted = inspect.signature(model_class.__init__).parameters
    extra = {"add_pooling_layer": False} if "add_pooling_layer" in accepted else {}
    model, loaded = AutoModel.from_pretrained(
        source,
        config=config,
        dtype=torch.float32,
        output_loading_info=True,
        use_safetensors=True,  # a pickle could run code
        attn_implementation=attn_implementation,
        **where,
        **extra,
    )
    if loaded["missing_keys"] or loaded["mismatched_keys"]:
        missing = sorted(map(str, [*loaded["missing_keys"], *loaded["mismatched_keys"]]))
        raise BackboneError(
            f"The checkpoint {name_or_path!r} has no fitting weights for {len(missing)} tensors of "
            f"{type(model).__name__}, for example {missing[0]}: they would stay random. Is it a vision transformer?"
        )
    weight_hash = hash_weights(model)
    processor = AutoImageProcessor.from_pretrained(source, **where)
    if image_size is not None:
        _set_image_size(model, processor, image_size)
    size = _input_size(processor)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    commit = revision or getattr(config, "_commit_hash", None)
    return Backbone(model.to(dtype), processor, BackboneConfig(name_or_path, size, weight_hash, commit))


def hash_weights(model: torch.nn.Module) -> str:
    """SHA-256 over a model's weights in float32, independent of the names that a version of transformers gives them.

    Args:
        model (`torch.nn.Module`): A model as loaded, before anything is interpolated or cast.

    Returns:
        `str` of 64 hexadecimal digits.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.backbones import hash_weights

    >>> len(hash_weights(torch.nn.Linear(2, 2)))
    64

    ```
    """
    digests = []
    for tensor in model.state_dict().values():
        array = tensor.detach().float().cpu().contiguous().numpy()
        digest = hashlib.sha256(str(array.shape).encode())
        digest.update(array)
        digests.append(digest.hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def _input_size(processor: Any) -> int:
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    return int(size.get("height") or size.get("shortest_edge"))


def _set_image_size(model: "PreTrainedModel", processor: Any, image_size: int) -> None:
    """Interpolates position embeddings to `image_size` for good, and lets the processor resize to it."""
    patch_size, embeddings = getattr(model.config, "patch_size", 1), getattr(model, "embeddings", None)
    if image_size < patch_size or image_size % patch_size:
        near = max(patch_size, round(image_size / patch_size) * patch_size)
        raise BackboneError(f"image_size={image_size} is no multiple of the patch size {patch_size}; try {near}.")
    if embeddings is not None and hasattr(embeddings, "position_embeddings") and image_size != model.config.image_size:
        patches = torch.zeros(1, (image_size // patch_size) ** 2 + 1, model.config.hidden_size)
        with torch.no_grad():
            positions = embeddings.interpolate_pos_encoding(patches, image_size, image_size)
        embeddings.position_embeddings = torch.nn.Parameter(positions.contiguous())
        for module in (embeddings, embeddings.patch_embeddings):
            module.image_size = (image_size, image_size)
        embeddings.patch_embeddings.num_patches = patches.shape[1] - 1
        model.config.image_size = image_size
    if getattr(processor, "do_center_crop", False):
        processor.crop_size = {"height": image_size, "width": image_size}
        processor.size = {"shortest_edge": image_size}
    elif hasattr(processor, "crop_pct"):  # ConvNeXt's crops to what it calls its shortest edge
        processor.size = {"shortest_edge": image_size}
    else:
        processor.size = {"height": image_size, "width": image_size}
