"""A checkpoint becomes a frozen backbone: tried without weights first, then loaded whole or not at all."""

import hashlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config.model import BackboneConfig
from .backbone import Backbone
from .errors import BackboneError
from .files import count_numbers, find_checkpoint, read_config
from .probe import Layout, probe
from .processors import measure, read_processor, set_size
from .sizes import fit_positions, own_size, patch_size_of
from .transform import ImageTransform


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor

LARGEST_TENSOR = 4 * 2**30  # bytes, for one picture
MOST_PATCHES = 2**14  # 2,048 px in patches of 16


def load_backbone(
    name_or_path: str,
    revision: str | None = None,
    image_size: int | None = None,
    dtype: str | torch.dtype = "float32",
    attn_implementation: str | None = None,
    processor: "BaseImageProcessor | None" = None,
    **hub_options: Any,
) -> Backbone:
    """Loads and freezes a vision model of `transformers`.

    Of a checkpoint with two towers, as CLIP's and SigLIP's, it takes the vision tower. `docs/backbones.md` says which
    families work with what.

    Args:
        name_or_path (`str`): Repo id or folder. `"hf-clpeft/vit-tiny-glyphs"` comes with the package.
        revision (`str`, *optional*): Branch, tag or commit of the repo. Whatever it is, the commit is found first,
            and all files come from that one.
        image_size (`int`, *optional*): Side of the square input in pixels. Other than the checkpoint's, its position
            embeddings are interpolated here, once.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"float32"`): `"float32"`, `"bfloat16"` or `"float16"`.
        attn_implementation (`str`, *optional*): What computes attention, as in `transformers`; by default it chooses.
        processor (`transformers.BaseImageProcessor`, *optional*): What resizes and normalises pictures, in place of
            the checkpoint's own: a saved model brings the one that it was trained with.
        hub_options: `token`, `cache_dir`, `local_files_only`.

    Returns:
        [`Backbone`]

    Raises:
        [`BackboneError`]: There is no such checkpoint, it has no safetensors or lacks weights, needs code of its own,
            takes pictures of another kind than grey or RGB, gives random features, or `image_size` does not fit it.

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
            f"The backbone {name_or_path!r} takes pictures of {channels!r:.20} channels; only RGB (3) and grey (1) "
            "are supported."
        )
    _check_size(config, image_size, name_or_path)
    processor = processor or read_processor(folder, name_or_path, config.model_type)
    transform = ImageTransform(processor, channels)
    if image_size is not None and not _makes(transform, image_size):
        set_size(processor, image_size)
    size = measure(transform, name_or_path)
    if image_size not in (None, size):
        raise BackboneError(f"The image processor of {name_or_path!r} makes pictures of {size} px, not {image_size}.")
    if image_size is None:
        _check_size(config, size, name_or_path, f"its image processor makes pictures of {size} px")
    layout = _try_without_weights(config, folder, (channels, size, size), name_or_path)
    model: Any = _load_weights(folder, config, attn_implementation, name_or_path)
    weight_hash = hash_weights(model)
    fit_positions(model, size)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return Backbone(model.to(dtype), processor, BackboneConfig(name_or_path, size, weight_hash, commit), layout)


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


def _makes(transform: ImageTransform, image_size: int) -> bool:
    """Whether a processor makes square pictures of that size as it is, so that nothing of it is to be changed."""
    try:
        return measure(transform, "") == image_size
    except BackboneError:
        return False


def _check_size(config: "PretrainedConfig", image_size: int | None, name: str, why: str = "") -> None:
    own, patch_size = own_size(config), patch_size_of(config)
    if image_size is None or image_size == own:
        return
    if not isinstance(image_size, int) or image_size < patch_size or image_size % patch_size:
        near = max(patch_size, round(image_size / patch_size) * patch_size)
        if why:
            raise BackboneError(
                f"{name!r}: {why}, no multiple of its patches of {patch_size}; pass image_size={near}."
            )
        raise BackboneError(f"image_size={image_size} is no multiple of the patch size {patch_size}; try {near}.")
    _check_patches(image_size, patch_size, name)


def _check_patches(image_size: int, patch_size: int, name: str) -> None:
    patches = (image_size // patch_size) ** 2
    if patch_size > 1 and patches > MOST_PATCHES or image_size > patch_size * 2**14:
        most = patch_size * int(MOST_PATCHES**0.5)
        raise BackboneError(
            f"image_size={image_size} makes {patches:,} patches of {name!r}, which would take all memory; at most "
            f"{most} px are possible."
        )


def _try_without_weights(config: "PretrainedConfig", folder: Path, shape: tuple[int, int, int], name: str) -> Layout:
    """Builds the model without memory, lets it take a picture, and refuses what would not work with weights."""
    from transformers.models.auto import MODEL_MAPPING

    size, own = shape[1], own_size(config)
    _check_patches(size, patch_size_of(config), name)
    model_class: Any = MODEL_MAPPING[type(config)]
    try:
        with torch.device("meta"):
            model = model_class(type(config).from_dict(config.to_dict()), **_without_pooler(model_class)).eval()
    except Exception as error:  # anything may be raised on what somebody has tampered with
        raise BackboneError(f"The backbone {name!r} cannot be built from its config.json: {_line(error)}") from error
    described, there = sum(tensor.numel() for tensor in model.state_dict().values()), count_numbers(folder)
    if described > 2 * there:
        raise BackboneError(
            f"The config.json of the backbone {name!r} describes a model of {described:,} numbers, but its weights "
            f"are {there:,}: the two do not belong together."
        )
    try:
        fit_positions(model, size)
        layout = probe(model, shape)
    except Exception as error:
        then = (
            f"Leave image_size out, or pass {own}." if own not in (None, size) else "Choose another size or backbone."
        )
        raise BackboneError(
            f"{model_class.__name__} of {name!r} does not take pictures of {size} px ({type(error).__name__}: "
            f"{_line(error)}). {then}"
        ) from error
    width = getattr(getattr(model, "timm_model", None), "num_features", layout.hidden_size)
    if layout.hidden_size != width:
        raise BackboneError(
            f"{name!r} gives its {width} channels last, which is not supported. Choose the same model in the form "
            "that transformers has, or another backbone."
        )
    if layout.random is not None:
        raise BackboneError(
            f"{model_class.__name__} of {name!r} draws random numbers in every pass ({layout.random}): the same "
            "picture would have other features each time. Choose another checkpoint."
        )
    if layout.num_bytes > LARGEST_TENSOR:
        raise BackboneError(
            f"image_size={size} makes {name!r} ask for {layout.num_bytes / 2**30:,.0f} GiB for one tensor of one "
            f"picture; at most {LARGEST_TENSOR // 2**30} are allowed. Choose a smaller size."
        )
    return layout


def _load_weights(
    folder: Path, config: "PretrainedConfig", attn_implementation: str | None, name: str
) -> "PreTrainedModel":
    from transformers.models.auto import MODEL_MAPPING

    model_class: Any = MODEL_MAPPING[type(config)]
    try:
        model, loaded = model_class.from_pretrained(
            str(folder),
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,  # a pickle could run code
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation=attn_implementation,
            **_without_pooler(model_class),
        )
    except Exception as error:  # transformers raises anything, from OSError to RuntimeError on shapes
        raise BackboneError(f"The weights of the backbone {name!r} cannot be loaded: {_line(error)}") from error
    if loaded["missing_keys"] or loaded["mismatched_keys"]:
        missing = sorted(map(str, [*loaded["missing_keys"], *loaded["mismatched_keys"]]))
        raise BackboneError(
            f"The checkpoint {name!r} has no fitting weights for {len(missing)} tensors of "
            f"{type(model).__name__}, for example {missing[0]}: they would stay random. Is it a vision transformer?"
        )
    return model


def _without_pooler(model_class: Any) -> dict[str, bool]:
    """The pooler is neither part of the [CLS] feature nor of many checkpoints."""
    accepted = inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in accepted else {}


def _line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:300]
