"""A backbone's own image processing: resized by Pillow on the CPU, normalised by torch on the device."""

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch

from .pictures import open_image


if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor

# What an image processor says that changes no pixel here: pictures come as RGB, and go out as `uint8` arrays.
SAYS_NOTHING = {
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
    """A backbone's own image processing, cut in two: resizing on the CPU, arithmetic on the device.

    Args:
        processor (`transformers.BaseImageProcessor`): The backbone's image processor.
        channels (`int`, *optional*, defaults to 3): What the backbone takes: 3 (RGB) or 1 (grey).

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
        """Reads and resizes (and crops, if the processor does) images, one after the other: big ones may be many.

        Args:
            images (iterable): One or more pictures of any kind and size; see [`open_image`].

        Returns:
            `uint8` array of shape `(number of images, channels, height, width)`.

        Raises:
            [`PictureError`]: One of them is no picture.
        """
        return np.concatenate([self._resize(open_image(image)) for image in images])

    def _resize(self, image: PIL.Image.Image) -> np.ndarray:
        image = image.convert("L").convert("RGB") if self.channels == 1 else image
        pixels = self.processor([image], do_rescale=False, do_normalize=False, return_tensors="np").pixel_values
        return np.clip(np.round(pixels[:, : self.channels]), 0, 255).astype(np.uint8)

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Scales and normalises pixels, on whatever device they are.

        Args:
            pixels (`torch.Tensor` of shape `(batch, channels, height, width)`, `uint8`): Resized images.

        Returns:
            `torch.Tensor` of the same shape, `float32`: What the backbone expects.
        """
        values = pixels.float()
        if self.processor.do_rescale:
            values = values * self.processor.rescale_factor
        if self.processor.do_normalize:
            # The processor of a grey backbone may name three channels, as it does by default.
            mean, std = (
                torch.tensor(numbers[: self.channels], dtype=torch.float32, device=pixels.device).view(-1, 1, 1)
                for numbers in (self.processor.image_mean, self.processor.image_std)
            )
            values = (values - mean) / std
        return values

    def differs_from(self, other: "ImageTransform") -> list[str]:
        """Names of the settings for which the same picture may become other pixels; none if there are none.

        Args:
            other ([`ImageTransform`]): Another one.

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
        said = {name: value for name, value in values.items() if name not in SAYS_NOTHING and name[0] != "_"}
        for name, value in said.items():
            if isinstance(value, dict):
                said[name] = {key: number for key, number in value.items() if number is not None}
        kind = {"kind": type(self.processor).__name__, "channels": self.channels}
        return {name: value for name, value in said.items() if value is not None} | kind
