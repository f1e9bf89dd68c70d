"""Loads a checkpoint as a frozen backbone: first a dry run on the meta device, then the weights, all or nothing."""

import copy
import hashlib
import inspect
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config.model import BackboneConfig
from .backbone import Backbone
from .errors import BackboneError, first_line
from .files import count_parameters, find_checkpoint, read_config
from .probe import Layout, probe
from .processors import output_size, read_processor, set_size
from .sizes import interpolate_positions, native_size, patch_size_of
from .transform import ImageTransform


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor
    from transformers.utils.quantization_config import QuantizationConfigMixin

MAX_TENSOR_BYTES = 4 * 2**30  # for one image
MAX_PATCHES = 2**14  # 2,048 px in patches of 16


# While it builds or loads a model, transformers replaces functions of torch and of its own classes; two threads at
# once may leave them replaced, after which buffers of later models hold whatever was in memory.
building = threading.Lock()


def load_backbone(
    name_or_path: str,
    revision: str | None = None,
    image_size: int | None = None,
    dtype: str | torch.dtype = "float32",
    attn_implementation: str | None = None,
    processor: "BaseImageProcessor | None" = None,
    quantization_config: "QuantizationConfigMixin | None" = None,
    **hub_options: Any,
) -> Backbone:
    """Loads and freezes a vision model of `transformers`.

    Of a checkpoint with two towers, such as CLIP or SigLIP, it loads the vision tower. `docs/backbones.md` lists the
    supported families.

    Args:
        name_or_path (`str`): Repo id or folder. `"hf-clpeft/vit-tiny-glyphs"` is bundled with the package.
        revision (`str`, *optional*): Branch, tag or commit of the repo. It is resolved to a commit once, from which
            all files are loaded.
        image_size (`int`, *optional*): Side of the square input in pixels. If it differs from the checkpoint's, the
            position embeddings are interpolated once, at load time.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"float32"`): `"float32"`, `"bfloat16"` or `"float16"`.
        attn_implementation (`str`, *optional*): Attention implementation, as in `transformers`.
        processor (`transformers.BaseImageProcessor`, *optional*): Replaces the image processor of the checkpoint; a
            saved model passes the one that it was trained with.
        quantization_config (`transformers.TorchAoConfig`, `transformers.BitsAndBytesConfig` or the like, *optional*):
            Quantises the weights, as in `transformers`. Like `dtype`, it is a choice of every load: the weight hash is
            that of the checkpoint before, and experts stay in full precision, so a model may be trained and run with
            different ones. What it predicts then differs by their rounding.
        hub_options: `token`, `cache_dir`, `local_files_only`.

    Returns:
        [`Backbone`]

    Raises:
        [`BackboneError`]: There is no such checkpoint, it has no safetensors or lacks weights, needs custom code, does
            not take RGB or greyscale images, has random features, is quantised itself, or does not support
            `image_size` or `quantization_config`.

    Example:

    ```py
    >>> from hf_clpeft.backbones import load_backbone

    >>> backbone = load_backbone("hf-clpeft/vit-tiny-glyphs", image_size=48)
    >>> backbone.config.image_size
    48

    ```
    """
    folder, commit = find_checkpoint(name_or_path, revision, **hub_options)
    config = read_config(folder, name_or_path)
    channels = getattr(config, "num_channels", 3)
    if channels not in (1, 3):
        raise BackboneError(
            f"The backbone {name_or_path!r} takes images with {channels!r:.20} channels; only RGB (3) and "
            "greyscale (1) are supported."
        )
    _check_size(config, image_size, name_or_path)
    processor = processor or read_processor(folder, name_or_path, config.model_type)
    transform = ImageTransform(processor, channels)
    if image_size is not None and not _already_outputs(transform, image_size):
        set_size(processor, image_size)
    size = output_size(transform, name_or_path)
    if image_size not in (None, size):
        raise BackboneError(f"The image processor of {name_or_path!r} outputs images of {size} px, not {image_size}.")
    if image_size is None:
        _check_size(config, size, name_or_path, f"its image processor outputs images of {size} px")
    layout = _build_on_meta(config, folder, (channels, size, size), name_or_path)
    model: Any = _load_weights(folder, config, attn_implementation, name_or_path)
    weight_hash = hash_weights(model)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if quantization_config is not None:
        chosen = {"quantization_config": quantization_config, "dtype": dtype}
        model = _load_weights(folder, copy.deepcopy(config), attn_implementation, name_or_path, **chosen)
    interpolate_positions(model, size)
    if quantization_config is None:  # what is quantised has its dtype already
        model.to(dtype)
    return Backbone(model, processor, BackboneConfig(name_or_path, size, weight_hash, commit), layout)


def hash_weights(model: torch.nn.Module) -> str:
    """SHA-256 of a model's weights in float32, independent of their names in the state dict.

    Args:
        model (`torch.nn.Module`): The model as loaded, before position embeddings are interpolated or weights cast.

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


def _already_outputs(transform: ImageTransform, image_size: int) -> bool:
    """Whether a processor outputs square images of that size without changes."""
    try:
        return output_size(transform, "") == image_size
    except BackboneError:
        return False


def _check_size(config: "PretrainedConfig", image_size: int | None, name: str, why: str = "") -> None:
    own, patch_size = native_size(config), patch_size_of(config)
    if image_size is None or image_size == own:
        return
    if not isinstance(image_size, int) or image_size < patch_size or image_size % patch_size:
        near = max(patch_size, round(image_size / patch_size) * patch_size)
        if why:
            raise BackboneError(
                f"{name!r}: {why}, not a multiple of its patch size {patch_size}; pass image_size={near}."
            )
        raise BackboneError(f"image_size={image_size} is not a multiple of the patch size {patch_size}; try {near}.")
    _check_patches(image_size, patch_size, name)


def _check_patches(image_size: int, patch_size: int, name: str) -> None:
    patches = (image_size // patch_size) ** 2
    if patch_size > 1 and patches > MAX_PATCHES or image_size > patch_size * 2**14:
        most = patch_size * int(MAX_PATCHES**0.5)
        raise BackboneError(
            f"image_size={image_size} gives {name!r} {patches:,} patches, which would exhaust the memory; at most "
            f"{most} px are possible."
        )


def _build_on_meta(config: "PretrainedConfig", folder: Path, shape: tuple[int, int, int], name: str) -> Layout:
    """Builds the model on the meta device, runs one image through it, and rejects what cannot work with weights."""
    from transformers.models.auto import MODEL_MAPPING

    size, own = shape[1], native_size(config)
    _check_patches(size, patch_size_of(config), name)
    model_class: Any = MODEL_MAPPING[type(config)]
    try:
        with building, torch.device("meta"):
            model = model_class(type(config).from_dict(config.to_dict()), **_without_pooler(model_class)).eval()
    except Exception as error:  # a tampered file may raise anything
        raise BackboneError(f"The backbone {name!r} cannot be built from its config: {first_line(error)}") from error
    described, there = sum(tensor.numel() for tensor in model.state_dict().values()), count_parameters(folder)
    if described > 2 * there:
        raise BackboneError(
            f"The config.json of the backbone {name!r} describes a model of {described:,} parameters, but its weights "
            f"have {there:,}: they do not match."
        )
    try:
        interpolate_positions(model, size)
        layout = probe(model, shape)
    except Exception as error:
        then = (
            f"Leave image_size out, or pass {own}." if own not in (None, size) else "Choose another size or backbone."
        )
        raise BackboneError(
            f"{model_class.__name__} of {name!r} does not support images of {size} px ({type(error).__name__}: "
            f"{first_line(error)}). {then}"
        ) from error
    width = getattr(getattr(model, "timm_model", None), "num_features", layout.hidden_size)
    if layout.hidden_size != width:
        raise BackboneError(
            f"{name!r} outputs its {width} channels last, which is not supported. Use the transformers version of "
            "this model, or another backbone."
        )
    if layout.random is not None:
        raise BackboneError(
            f"{model_class.__name__} of {name!r} draws random numbers in every forward pass ({layout.random}), so "
            "the features of an image would change from call to call. Choose another checkpoint."
        )
    if layout.num_bytes > MAX_TENSOR_BYTES:
        raise BackboneError(
            f"image_size={size} makes {name!r} need {layout.num_bytes / 2**30:,.0f} GiB for one tensor of one "
            f"image; at most {MAX_TENSOR_BYTES // 2**30} are allowed. Choose a smaller size."
        )
    return layout


def _load_weights(
    folder: Path, config: "PretrainedConfig", attn_implementation: str | None, name: str, **quantized: Any
) -> "PreTrainedModel":
    from transformers.models.auto import MODEL_MAPPING

    model_class: Any = MODEL_MAPPING[type(config)]
    try:
        with building:
            model, loaded = model_class.from_pretrained(
                str(folder),
                config=config,
                output_loading_info=True,
                use_safetensors=True,  # a pickle could run code
                local_files_only=True,
                trust_remote_code=False,
                attn_implementation=attn_implementation,
                **{"dtype": torch.float32, **quantized},
                **_without_pooler(model_class),
            )
    except Exception as error:  # transformers may raise anything, such as RuntimeError on shapes
        raise BackboneError(f"The weights of the backbone {name!r} cannot be loaded: {first_line(error)}") from error
    if loaded["missing_keys"] or loaded["mismatched_keys"]:
        missing = sorted(map(str, [*loaded["missing_keys"], *loaded["mismatched_keys"]]))
        raise BackboneError(
            f"The checkpoint {name!r} has no matching weights for {len(missing)} tensors of "
            f"{type(model).__name__}, for example {missing[0]}: they would be random. Is it a vision transformer?"
        )
    return model


def _without_pooler(model_class: Any) -> dict[str, bool]:
    """Leaves out the pooler, which [CLS] features do not use and many checkpoints lack."""
    accepted = inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in accepted else {}
