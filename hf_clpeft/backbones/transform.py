"""Image preprocessing of a backbone: resizing with Pillow on the CPU, normalisation with torch on the device."""

import json
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch

from .pictures import open_image


if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor

# Settings of an image processor that change no pixels here: images are RGB, and outputs are `uint8` arrays.
IRRELEVANT = {
    "data_format",
    "device",
    "disable_grouping",
    "do_convert_rgb",
    "do_reduce_labels",
    "feature_extractor_type",
    "image_processor_type",
    "input_data_format",
    "processor_class",
    "return_tensors",
}


class ImageTransform:
    """The image processor of a backbone in two steps: resizing on the CPU, normalisation on the device.

    Args:
        processor (`transformers.BaseImageProcessor`): Image processor of the backbone.
        channels (`int`, *optional*, defaults to 3): Input channels of the backbone: 3 (RGB) or 1 (greyscale).

    Example:

    ```py
    >>> import torch
    >>> from PIL import Image
    >>> from hf_clpeft.backbones import load_backbone

    >>> transform = load_backbone("hf-clpeft/vit-tiny-glyphs").transform
    >>> pixels = transform.resize([Image.new("RGB", (50, 40))])
    >>> pixels.shape, pixels.dtype
    ((1, 3, 32, 32), dtype('uint8'))
    >>> transform.normalize(torch.from_numpy(pixels)).mean().item()
    -1.0

    ```
    """

    def __init__(self, processor: "BaseImageProcessor", channels: int = 3):
        self.processor: Any = processor  # fields differ from class to class
        self.channels = channels

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a resized image."""
        return self.resize([PIL.Image.new("RGB", (8, 8))]).shape[1:]

    def resize(self, images: Iterable[Any]) -> np.ndarray:
        """Decodes, resizes and, if the processor does, crops images, one at a time to bound the memory.

        Args:
            images (iterable): One or more images in any form that [`open_image`] accepts.

        Returns:
            `uint8` array of shape `(number of images, channels, height, width)`.

        Raises:
            [`PictureError`]: One of them cannot be decoded.
        """
        return np.concatenate([self._resize(open_image(image)) for image in images])

    def _resize(self, image: PIL.Image.Image) -> np.ndarray:
        image = image.convert("L").convert("RGB") if self.channels == 1 else image
        pixels = self.processor([image], do_rescale=False, do_normalize=False, return_tensors="np").pixel_values
        return np.clip(np.round(pixels[:, : self.channels]), 0, 255).astype(np.uint8)

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Rescales and normalises pixels on their device.

        Args:
            pixels (`torch.Tensor` of shape `(batch, channels, height, width)`, `uint8`): Resized images.

        Returns:
            `torch.Tensor` of the same shape, `float32`: Input of the backbone.
        """
        values = pixels.float()
        if self.processor.do_rescale:
            values = values * self.processor.rescale_factor
        if self.processor.do_normalize:
            # Processors default to three channels, also those of greyscale backbones.
            mean, std = (
                _by_channel(tuple(numbers[: self.channels]), pixels.device)
                for numbers in (self.processor.image_mean, self.processor.image_std)
            )
            values = (values - mean) / std
        return values

    def differs_from(self, other: "ImageTransform") -> list[str]:
        """Names of the settings that differ and change the pixels of an image.

        Args:
            other ([`ImageTransform`]): Transform to compare with.

        Example:

        ```py
        >>> from hf_clpeft.backbones import load_backbone

        >>> small, large = (load_backbone("hf-clpeft/vit-tiny-glyphs", image_size=size) for size in (32, 48))
        >>> small.transform.differs_from(large.transform)
        ['size']

        ```
        """
        ours, theirs = self._settings(), other._settings()
        return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))

    def _settings(self) -> dict[str, Any]:
        values = json.loads(self.processor.to_json_string())
        settings = {name: value for name, value in values.items() if name not in IRRELEVANT and name[0] != "_"}
        for name, value in settings.items():
            if isinstance(value, dict):
                settings[name] = {key: number for key, number in value.items() if number is not None}
        kind = {"kind": type(self.processor).__name__, "channels": self.channels}
        return {name: value for name, value in settings.items() if value is not None} | kind


@lru_cache(maxsize=64)
def _by_channel(numbers: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Numbers that stay on the device: a copy with every batch would make the CPU wait."""
    return torch.tensor(numbers, dtype=torch.float32, device=device).view(-1, 1, 1)
