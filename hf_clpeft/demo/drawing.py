"""Converts drawings to the format of scikit-learn's digits."""

import numpy as np
import PIL.Image
import PIL.ImageOps

from ..streams.digits import SCAN, enlarge
from .pictures import VisitorError


FAINTEST = 64  # of 255; fainter pixels are the antialiased edge of a stroke


def scan(drawing: PIL.Image.Image) -> PIL.Image.Image:
    """Crops a drawing to its ink and downsamples it to 8 x 8 pixels, like scikit-learn's digits.

    Args:
        drawing (`PIL.Image.Image`): Dark strokes on a light background.

    Returns:
        `PIL.Image.Image`: 32 x 32 pixels, light ink on black.

    Raises:
        [`VisitorError`]: The canvas is blank.

    Example:

    ```py
    >>> from PIL import Image, ImageDraw
    >>> from hf_clpeft.demo.drawing import scan

    >>> drawing = Image.new("RGB", (280, 280), "white")
    >>> ImageDraw.Draw(drawing).line([(140, 40), (140, 240)], fill="black", width=24)
    >>> scan(drawing).size
    (32, 32)

    ```
    """
    ink = PIL.ImageOps.invert(drawing.convert("L"))
    box = ink.point(lambda value: value >= FAINTEST and 255).getbbox()
    if box is None:
        raise VisitorError("There is nothing on the canvas yet: draw a digit first.")
    width, height = box[2] - box[0], box[3] - box[1]
    side = max(width, height)
    square = PIL.Image.new("L", (side, side))
    square.paste(ink.crop(box), ((side - width) // 2, (side - height) // 2))
    return enlarge(np.asarray(square.resize((SCAN, SCAN), PIL.Image.Resampling.BOX))).convert("RGB")
