"""Loads image processors, always in the version that resizes with Pillow.

transformers has two versions of most image processors, one with Pillow and one with torchvision, whose pixels differ
by up to 2 of 255, and picks one by whether torchvision is installed. Always using Pillow gives a model the pixels it
was trained on wherever it is loaded. Classes are looked up in an allow-list, so custom code is never run.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image

from ..config.checks import read_json
from ..config.errors import ConfigError
from .errors import BackboneError, first_line
from .transform import ImageTransform


if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor

PROCESSOR_NAME = "preprocessor_config.json"
MAX_NUMBER = 4096  # limit on sides in pixels, above any other number in such a file
# Processors that only resize, crop, rescale, normalise and swap channels.
SUPPORTED = (
    "Beit Bit Blip ChineseCLIP CLIP ConvNext DeiT DPT EfficientNet Levit MobileNetV1 MobileNetV2 MobileViT Perceiver "
    "PoolFormer Pvt Segformer Siglip TextNet ViT"
).split()
# Equivalents of processors that exist only in a torchvision version.
PIL_EQUIVALENTS = {"DINOv3ViTImageProcessor": "ViTImageProcessor"}
INTERPOLATIONS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def read_processor(folder: str | Path, name: str, model_type: str | None = None) -> "BaseImageProcessor":
    """Loads the image processor of a checkpoint or a saved model.

    Args:
        folder (`str` or `Path`): Contains `preprocessor_config.json`, or a `processor_config.json` that nests it.
        name (`str`): Name of its owner for error messages.
        model_type (`str`, *optional*): Type of the model, for old files that do not name a processor.

    Returns:
        `transformers.BaseImageProcessor`

    Raises:
        [`BackboneError`]: There is no such file, or the processor is not supported.

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
    kind = PIL_EQUIVALENTS.get(kind, kind)
    if kind.removesuffix("ImageProcessor") not in SUPPORTED or not hasattr(transformers, f"{kind}Pil"):
        raise BackboneError(
            f"{name} has an image processor of the type {kind[:60]!r}, which is unknown or does more than resize, "
            "crop and normalise. Save a supported one, such as ViTImageProcessor or BitImageProcessor (resize, then "
            "crop), into a copy of the folder, and pass that folder."
        )
    _check_numbers(values, name)
    unused = ("auto_map", "image_processor_type", "feature_extractor_type", "processor_class", "_processor_class")
    try:
        return getattr(transformers, f"{kind}Pil")(**{k: v for k, v in values.items() if k not in unused})
    except Exception as error:  # a tampered file may raise anything
        raise BackboneError(f"The image processor of {name} cannot be created: {first_line(error)}") from error


def set_size(processor: Any, image_size: int) -> None:
    """Makes a processor output square images of `image_size` px, with the same crop ratio as before. In place."""
    if getattr(processor, "do_center_crop", False) and not hasattr(processor, "crop_pct"):
        old = _side(processor.crop_size)
        grown = {
            name: round(length * image_size / old)
            for name, length in dict(processor.size).items()
            if length is not None
        }
        processor.size = grown
        processor.crop_size = {"height": image_size, "width": image_size}
    elif hasattr(processor, "crop_pct"):  # ConvNeXt's crops to its `shortest_edge`
        processor.size = {"shortest_edge": image_size}
    else:
        processor.size = {"height": image_size, "width": image_size}


def output_size(transform: ImageTransform, name: str) -> int:
    """Side of the square output of a transform in pixels, measured on a wide and a tall image.

    Raises:
        [`BackboneError`]: Outputs are not square or not all of one size, or it cannot resize or normalise.
    """
    images = [PIL.Image.new("RGB", size) for size in ((50, 40), (40, 50))]
    try:
        shapes = {transform.resize([image]).shape[1:] for image in images}
    except Exception as error:
        raise BackboneError(f"The image processor of {name} cannot resize: {first_line(error)}") from error
    if len(shapes) != 1 or len({*(shape := shapes.pop())[1:]}) != 1 or shape[0] != transform.channels:
        raise BackboneError(
            f"The image processor of {name} does not output square images of one size. Give it a size with equal "
            "height and width, or a centre crop (do_center_crop, crop_size), or pass image_size=."
        )
    processor = transform.processor
    for values in (processor.image_mean, processor.image_std) if processor.do_normalize else ():
        if len(values) < transform.channels or (transform.channels == 1 and len(set(values)) > 1):
            raise BackboneError(
                f"The image processor of {name} normalises with {list(values)}, but its model takes images with "
                f"{transform.channels} channels. Set one mean and one standard deviation for each."
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
        return _from_timm_config(config["pretrained_cfg"], name)
    raise BackboneError(
        f"{name} has no {PROCESSOR_NAME}, which defines how images are resized and normalised. Save one into a "
        "copy of the folder, for example ViTImageProcessor(size={...}, image_mean=[...]).save_pretrained(FOLDER), "
        "and pass that folder."
    )


def _from_timm_config(config: dict, name: str) -> dict:
    """Converts a timm `pretrained_cfg` to an image processor that needs neither timm nor torchvision."""
    try:
        channels, height, width = config["input_size"]
        mode, share = config.get("crop_mode") or "center", float(config.get("crop_pct") or 0.875)
        if height != width or mode not in ("center", "squash"):
            raise ValueError(f"input_size={config['input_size']} with crop_mode={mode!r} is not supported")
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
        raise BackboneError(f"The pretrained_cfg of {name} does not say how to resize images: {error!r}.") from error


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
    elif isinstance(values, int | float) and not abs(values) <= MAX_NUMBER:
        raise BackboneError(
            f"The image processor of {name} has {key}={values!r:.40}; at most {MAX_NUMBER:,} is allowed."
        )


def _side(size: Any) -> int:
    return int(size.get("height") or size.get("shortest_edge"))
