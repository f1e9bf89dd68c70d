"""The image processor that a folder describes, always in the form that resizes with Pillow.

transformers has two forms of most image processors, whose pixels differ by up to 2 of 255: one resizes with Pillow,
one with torchvision. Its own choice depends on whether torchvision is installed. Here it is Pillow everywhere, so that
a model sees the pixels that it was trained on wherever it is loaded. And a class is taken from a list, by its name:
code that a stranger's file points to is never looked for.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image

from ..config.checks import read_json
from ..config.errors import ConfigError
from .errors import BackboneError
from .transform import ImageTransform


if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor

PROCESSOR_NAME = "preprocessor_config.json"
LARGEST_NUMBER = 4096  # pixels of a side, and more than any other number in such a file
# Those that do no more than resize, crop, scale, normalise and swap channels.
PLAIN = (
    "Beit Bit Blip ChineseCLIP CLIP ConvNext DeiT DPT EfficientNet Levit MobileNetV1 MobileNetV2 MobileViT Perceiver "
    "PoolFormer Pvt Segformer Siglip TextNet ViT"
).split()
# Those that exist with torchvision alone, and what does the same with Pillow.
STAND_INS = {"DINOv3ViTImageProcessor": "ViTImageProcessor"}
INTERPOLATIONS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def read_processor(folder: str | Path, name: str, model_type: str | None = None) -> "BaseImageProcessor":
    """The image processor of a checkpoint or a saved model.

    Args:
        folder (`str` or `Path`): Holds `preprocessor_config.json`, or `processor_config.json` with one inside.
        name (`str`): What to call its owner in an error.
        model_type (`str`, *optional*): Kind of the model, for files of old that do not say their own.

    Returns:
        `transformers.BaseImageProcessor`

    Raises:
        [`BackboneError`]: There is no such file, or it describes what cannot be used.

    Example:

    ```py
    >>> from hf_clpeft.backbones.processors import read_processor
    >>> from hf_clpeft.backbones.bundled import bundled_folder

    >>> type(read_processor(bundled_folder("hf-clpeft/vit-tiny-glyphs"), "the glyphs")).__name__
    'ViTImageProcessorPil'

    ```
    """
    import transformers

    values = _read_values(Path(folder), name)
    kind = values.get("image_processor_type") or values.get("feature_extractor_type") or _default_kind(model_type)
    kind = str(kind).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    kind = STAND_INS.get(kind, kind)
    if kind.removesuffix("ImageProcessor") not in PLAIN or not hasattr(transformers, f"{kind}Pil"):
        raise BackboneError(
            f"{name} has an image processor of the type {kind[:60]!r}, which does more than resize, crop and "
            "normalise, or is unknown. Save a plain one into a copy of the folder, such as ViTImageProcessor or "
            "BitImageProcessor (resize, then crop), and name that folder."
        )
    _check_numbers(values, name)
    unused = ("auto_map", "image_processor_type", "feature_extractor_type", "processor_class", "_processor_class")
    try:
        return getattr(transformers, f"{kind}Pil")(**{k: v for k, v in values.items() if k not in unused})
    except Exception as error:  # anything may be raised on what somebody has tampered with
        raise BackboneError(f"The image processor of {name} cannot be made: {_line(error)}") from error


def set_size(processor: Any, image_size: int) -> None:
    """Lets a processor make square pictures of `image_size`; one that crops cuts off the same share as before.

    Args:
        processor (`transformers.BaseImageProcessor`): Changed in place.
        image_size (`int`): Side, in pixels.
    """
    if getattr(processor, "do_center_crop", False) and not hasattr(processor, "crop_pct"):
        old = _side(processor.crop_size)
        grown = {
            name: round(length * image_size / old)
            for name, length in dict(processor.size).items()
            if length is not None
        }
        processor.size = grown
        processor.crop_size = {"height": image_size, "width": image_size}
    elif hasattr(processor, "crop_pct"):  # ConvNeXt's crops to what it calls its shortest edge
        processor.size = {"shortest_edge": image_size}
    else:
        processor.size = {"height": image_size, "width": image_size}


def measure(transform: ImageTransform, name: str) -> int:
    """Side of the square pictures that come out, in pixels, as seen by trying with a wide and a tall one.

    Args:
        transform ([`ImageTransform`]): To try.
        name (`str`): What to call its owner in an error.

    Raises:
        [`BackboneError`]: They are not square, or not all of one size, or it cannot resize or normalise at all.
    """
    pictures = [PIL.Image.new("RGB", size) for size in ((50, 40), (40, 50))]
    try:
        shapes = {transform.resize([picture]).shape[1:] for picture in pictures}
    except Exception as error:
        raise BackboneError(f"The image processor of {name} cannot resize: {_line(error)}") from error
    if len(shapes) != 1 or len({*(shape := shapes.pop())[1:]}) != 1 or shape[0] != transform.channels:
        raise BackboneError(
            f"The image processor of {name} does not make square pictures of one size. Give it a size with height and "
            "width alike, or a centre crop (do_center_crop, crop_size), or pass image_size=."
        )
    processor = transform.processor
    for values in (processor.image_mean, processor.image_std) if processor.do_normalize else ():
        if len(values) < transform.channels or (transform.channels == 1 and len(set(values)) > 1):
            raise BackboneError(
                f"The image processor of {name} normalises with {list(values)}, but its model takes pictures of "
                f"{transform.channels} channels. Name a mean and a standard deviation for each."
            )
    return shape[1]


def _read_values(folder: Path, name: str) -> dict:
    nested = folder / "processor_config.json"
    try:
        if nested.is_file() and isinstance(found := read_json(nested).get("image_processor"), dict):
            return found
        if (folder / PROCESSOR_NAME).is_file():
            return read_json(folder / PROCESSOR_NAME)
        config = read_json(folder / "config.json")
    except (ConfigError, OSError) as error:
        raise BackboneError(f"The image processor of {name} cannot be read: {error}") from error
    if isinstance(config.get("pretrained_cfg"), dict):
        return _as_timm_does(config["pretrained_cfg"], name)
    raise BackboneError(
        f"{name} has no {PROCESSOR_NAME}, which says how its pictures are resized and normalised. Save one into a "
        "copy of the folder, for example ViTImageProcessor(size={...}, image_mean=[...]).save_pretrained(FOLDER), "
        "and name that folder."
    )


def _as_timm_does(config: dict, name: str) -> dict:
    """Resize and crop of a timm checkpoint, whose own form needs timm and torchvision."""
    try:
        channels, height, width = config["input_size"]
        mode, share = config.get("crop_mode") or "center", float(config.get("crop_pct") or 0.875)
        if height != width or mode not in ("center", "squash"):
            raise ValueError(f"input_size={config['input_size']} with crop_mode={mode!r} is not known here")
        edge = math.floor(height / share)
        return {
            "image_processor_type": "BitImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": edge} if mode == "center" else {"height": edge, "width": edge},
            "resample": INTERPOLATIONS[config.get("interpolation") or "bilinear"],
            "do_center_crop": True,
            "crop_size": {"height": height, "width": height},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(config["mean"]),
            "image_std": list(config["std"]),
        }
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise BackboneError(f"The pretrained_cfg of {name} does not say how to resize pictures: {error!r}.") from error


def _default_kind(model_type: Any) -> str | None:
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    kinds = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type, {})
    return kinds.get("pil") or kinds.get("torchvision")


def _check_numbers(values: Any, name: str, key: str = "") -> None:
    if isinstance(values, dict):
        for inner, value in values.items():
            _check_numbers(value, name, str(inner))
    elif isinstance(values, list):
        for value in values:
            _check_numbers(value, name, key)
    elif isinstance(values, int | float) and not abs(values) <= LARGEST_NUMBER:
        raise BackboneError(
            f"The image processor of {name} has {key}={values!r:.40}; at most {LARGEST_NUMBER:,} makes sense."
        )


def _side(size: Any) -> int:
    return int(size.get("height") or size.get("shortest_edge"))


def _line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:200]
