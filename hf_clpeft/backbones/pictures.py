"""The single image reader: decodes every kind of input to the same RGB pixels in training, prediction and demo."""

import io
import os
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL.Image
import torch

from ..config.errors import HfClpeftError


READER_VERSION = 2
"""Version of the reader. Increase it whenever decoded pixels change, to invalidate caches."""

MAX_ASPECT_RATIO = 1000  # resizing the shorter side of a strip would make the longer one huge
KINDS = "a PIL image, a path, bytes, an open file, or an array or tensor of one image (uint8, or floats from 0 to 1)"

T = TypeVar("T")
_Transpose = PIL.Image.Transpose
_ORIENTATIONS = {  # EXIF orientation to the transpose that undoes it
    2: _Transpose.FLIP_LEFT_RIGHT,
    3: _Transpose.ROTATE_180,
    4: _Transpose.FLIP_TOP_BOTTOM,
    5: _Transpose.TRANSPOSE,
    6: _Transpose.ROTATE_270,
    7: _Transpose.TRANSVERSE,
    8: _Transpose.ROTATE_90,
}
_URL = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)
_STREAMED = re.compile(r"(zip://[^:]*::)?hf://|zip://[^:]*::/")  # no other URLs are fetched
_MAX_NAME = 200  # characters of a path in a message
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # PNG chunks that affect pixels
_JPEG_METADATA = {*range(0xE1, 0xEE), 0xEF, 0xFE}  # EXIF, XMP, profiles, comments; not the colour transform of Adobe


class PictureError(HfClpeftError, OSError):
    """An input that cannot be decoded as an image. The message says which one, why, and how to fix it.

    Example:

    ```py
    >>> from hf_clpeft.streams import PictureError, open_image

    >>> try:
    ...     open_image(b"")
    ... except PictureError as error:
    ...     print(error)
    The picture is empty: it has no bytes.

    ```
    """


def open_image(picture: Any, name: str | None = None) -> PIL.Image.Image:
    """Decodes an image to RGB: its first frame, with EXIF orientation applied and transparency over white.

    Training, [`ContinualModel.predict`], the command line and the demo all use this function. Greyscale images with
    more than 8 bits are converted to 0 to 255 as follows:

    - 16 bits: the upper 8 bits.
    - 32-bit integers: unchanged if within 0 to 255, as 16 bits if within 0 to 65535.
    - Floats: times 255 if within 0 to 1, unchanged if within 0 to 255 and the maximum is above 25.5. Both ranges may
      be exceeded by 5 %, which is clipped. NaN becomes black.
    - Others: min-max normalised.

    Invalid EXIF orientations and damaged metadata (EXIF, XMP) are ignored if the pixels can be decoded. Colour
    profiles are not applied. Pipelines of `transformers` decode files differently: pass them the result instead.

    Args:
        picture (`PIL.Image.Image`, path, `bytes`, binary file, array, `torch.Tensor` or `dict`): An image of any mode;
            a path, or the contents of a file; a row of `datasets.Image(decode=False)`, `{"bytes": ..., "path": ...}`;
            or values of shape `(height, width)`, `(height, width, channels)` or `(channels, height, width)` with 1, 3
            or 4 channels: `uint8`, `uint16` if greyscale, or finite floats from 0 to 1. Ambiguous shapes are
            channels-last for arrays and channels-first for tensors.
        name (`str`, *optional*): Name for error messages. Default: the path, if it has one.

    Returns:
        `PIL.Image.Image`: RGB, without metadata.

    Raises:
        [`PictureError`]: It is not an image, is damaged or empty, has an aspect ratio above 1000, or exceeds the limit
            of Pillow (twice `PIL.Image.MAX_IMAGE_PIXELS`). Only regular files are opened.

    Example:

    ```py
    >>> import numpy as np
    >>> from PIL import Image
    >>> from hf_clpeft.streams import open_image

    >>> open_image(Image.new("LA", (8, 8))).getpixel((0, 0))
    (255, 255, 255)
    >>> open_image(np.full((8, 8), 0.5)).getpixel((0, 0))
    (128, 128, 128)

    ```
    """
    if isinstance(picture, Mapping) and picture.keys() == {"bytes", "path"}:
        return _read_row(picture["bytes"], picture["path"], name or "it")
    name = name or "The picture"
    if isinstance(picture, str | os.PathLike):
        return _read_path(_as_picture_error(_path_of, picture, name))
    if isinstance(picture, PIL.Image.Image):
        return _read(picture, name)
    if isinstance(picture, np.ndarray | torch.Tensor):
        return _read(_as_picture_error(_from_array, picture, name), name)
    if hasattr(picture, "read"):
        picture = _as_picture_error(_content, picture, name)
    if isinstance(picture, bytes | bytearray | memoryview):
        if not picture:
            raise PictureError(f"{name} is empty: it has no bytes.")
        return read_file(io.BytesIO(picture), name)
    raise PictureError(f"{name} is of type {type(picture).__name__}, not an image; pass {KINDS}.")


def is_picture(thing: Any) -> bool:
    """Whether an input is a single image rather than a batch."""
    if isinstance(thing, np.ndarray | torch.Tensor):
        return thing.ndim < 4 and getattr(thing.dtype, "kind", "f") not in "OSU"  # an array of paths is a batch
    one = str | os.PathLike | bytes | bytearray | memoryview | PIL.Image.Image | Mapping
    return isinstance(thing, one) or hasattr(thing, "read")


def _as_picture_error(read: Callable[..., T], thing: Any, name: str) -> T:
    try:
        return read(thing, name)
    except PictureError:
        raise
    except Exception as error:  # untrusted files, arrays and objects may raise anything
        raise PictureError(f"{name} cannot be read: {_reason(error)}") from error


def _path_of(path: str | os.PathLike, name: str) -> str:
    return os.fsdecode(path)


def _read_row(data: Any, path: Any, name: str) -> PIL.Image.Image:
    """Decodes an image of a data set, whose path may point to the Hub or into an archive."""
    if isinstance(path, str) and path:
        name = _printable_path(path)
        if data is None and _STREAMED.match(path):
            data = _as_picture_error(_fetch, path, name)
    return open_image(path if data is None else data, name)


def _fetch(path: str, name: str) -> bytes:
    from datasets.utils.file_utils import xopen

    with xopen(path, "rb") as file:
        return file.read()


def _printable_path(text: str) -> str:
    """A path made safe for a message: truncated, and escaped if it is not printable."""
    text = text if len(text) <= _MAX_NAME else f"{text[:_MAX_NAME]}…"
    return text if text.isprintable() and text.strip() else repr(text)


def _read_path(path: str) -> PIL.Image.Image:
    name = _printable_path(path)
    try:
        file = Path(path)
        if file.is_dir():
            raise PictureError(f"{name} is a folder: pass the images in it.")
        if file.exists() and not file.is_file():
            raise PictureError(f"{name} is not a regular file.")  # reading a pipe could block forever
        with open(path, "rb") as opened:
            if not opened.read(1):
                raise PictureError(f"{name} is empty: it has no bytes.")
            opened.seek(0)
            return read_file(opened, name)
    except PictureError:
        raise
    except (OSError, ValueError) as error:
        if _URL.match(path):
            raise PictureError(f"{name} is a URL; download it first, and pass the file.") from error
        reason = getattr(error, "strerror", None) or str(error)
        raise PictureError(f"{name} cannot be opened: {reason}.") from error


def _content(file: Any, name: str) -> bytes:
    if hasattr(file, "seekable") and file.seekable():
        file.seek(0)
    content = file.read()
    if not isinstance(content, bytes):
        raise PictureError(f"{name} is a file that gives {type(content).__name__}: open it with mode 'rb'.")
    return content


def read_file(
    file: Any,
    name: str,
    formats: tuple[str, ...] | None = None,
    check: Callable[[PIL.Image.Image], None] = lambda image: None,
) -> PIL.Image.Image:
    """Decodes an image file as [`open_image`] does.

    Args:
        file (binary file): Seekable file.
        name (`str`): Name for error messages.
        formats (`tuple[str, ...]`, *optional*): Formats that may be decoded, by their names in Pillow. Default: all.
        check (callable, *optional*): Called with the image before it is decoded; may raise any exception.

    Returns:
        `PIL.Image.Image`: RGB, without metadata.

    Raises:
        [`PictureError`]: See [`open_image`]; its `__cause__` is the error of Pillow.
    """
    try:
        return _decode(file, name, formats, check)
    except PictureError as error:
        if not isinstance(error.__cause__, Exception) or isinstance(error.__cause__, PictureError):
            raise
        stripped = _strip_metadata(file)
        if stripped is None:
            raise
        try:  # the metadata may be damaged, but not the pixels
            return _decode(io.BytesIO(stripped), name, formats, check)
        except PictureError:
            raise error from error.__cause__


def _decode(
    file: Any, name: str, formats: tuple[str, ...] | None, check: Callable[[PIL.Image.Image], None]
) -> PIL.Image.Image:
    try:
        image = PIL.Image.open(file, formats=formats)
    except Exception as error:  # Pillow may raise anything, such as struct.error, on damaged files
        raise PictureError(f"{name} is not a valid image: {_reason(error)}") from error
    with image:
        check(image)
        return _read(image, name)


def _strip_metadata(file: Any) -> bytes | None:
    """Removes the metadata of a PNG or JPEG; `None` if there is none."""
    file.seek(0)
    data = file.read(8)
    if not data.startswith((b"\x89PNG", b"\xff\xd8")):
        return None
    data += file.read()
    if data.startswith(b"\x89PNG"):
        kept, start = [data[:8]], 8
        while start + 8 <= len(data):
            end = start + 12 + int.from_bytes(data[start : start + 4])
            kind, checksum = data[start + 4 : start + 8], zlib.crc32(data[start + 4 : end - 4]).to_bytes(4)
            if kind in _PIXEL_CHUNKS or (kind == b"eXIf" and checksum == data[end - 4 : end]):
                kept.append(data[start:end])
            start = end
    else:
        kept, start = [data[:2]], 2
        while data[start : start + 1] == b"\xff" and data[start + 1 : start + 2] != b"\xda":
            end = start + 2 + int.from_bytes(data[start + 2 : start + 4])
            if data[start + 1] not in _JPEG_METADATA:
                kept.append(data[start:end])
            start = end
        kept.append(data[start:])
    stripped = b"".join(kept)
    return stripped if len(stripped) < len(data) else None


def _reason(error: Exception) -> str:
    if isinstance(error, PIL.UnidentifiedImageError):
        return "its format is not supported by Pillow."
    if isinstance(error, MemoryError):
        return "there is not enough memory for it."
    return " ".join(str(error).split()).rstrip(".") + "."


def _read(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    width, height = image.size
    if not width or not height or max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise PictureError(f"{name} has {width} x {height} pixels; it is empty or its aspect ratio is too extreme.")
    if image.format == "EPS":
        raise PictureError(f"{name} is PostScript, a program, which is never run here; save it as PNG first.")
    try:
        return _to_rgb(image)
    except PictureError as error:
        raise PictureError(f"{name} {error}") from error
    except Exception as error:  # Pillow may raise anything, such as struct.error, on damaged files
        raise PictureError(f"{name} is not a valid image: {_reason(error)}") from error


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    transparent = _transparent_value(image)
    image.load()
    orientation = _orientation_of(image)
    if image.mode == "RGB" and orientation is None and not image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        upright = _to_eight_bits(image, transparent).convert("RGB")
    elif image.has_transparency_data:
        if transparent != image.info.get("transparency"):
            image = image.copy()
            image.info["transparency"] = transparent
        # Pillow cannot convert La (premultiplied greyscale) to RGBA.
        page = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = PIL.Image.new("RGBA", page.size, "white")  # most drawings have dark lines
        upright = PIL.Image.alpha_composite(white, page).convert("RGB")
    else:
        upright = image.convert("RGB")
    if orientation is not None:
        upright = upright.transpose(orientation)
    upright.info = {}  # so that the orientation is not applied again
    return upright


def _orientation_of(image: PIL.Image.Image) -> PIL.Image.Transpose | None:
    try:
        return _ORIENTATIONS.get(image.getexif().get(0x0112, 1))
    except Exception:  # damaged EXIF data is ignored
        return None


def _transparent_value(image: PIL.Image.Image) -> Any:
    """The transparent colour in the value range of decoded pixels; Pillow keeps that of the file.

    Before the image is loaded, its first tile tells the bit depth of the file.
    """
    transparent = image.info.get("transparency")
    tile = next(iter(getattr(image, "tile", ())), None)
    if transparent is None or image.format != "PNG" or tile is None:
        return transparent
    factor = {"L;2": 85, "L;4": 17}.get(tile[3])
    if factor is not None:
        return transparent * factor
    return tuple(value >> 8 for value in transparent) if tile[3] == "RGB;16B" else transparent


def _to_eight_bits(image: PIL.Image.Image, transparent: Any) -> PIL.Image.Image:
    """Converts an image to 8 bits per value; see [`open_image`]."""
    stored = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if stored.dtype == np.int32 and tags.get(258) == (32,) and tags.get(339, (1,)) == (1,):
        stored = stored.view(np.uint32)  # Pillow reads unsigned values as signed
    values = _eight_bits(stored)
    if tags.get(262) == 0:  # white is zero
        values = 255 - values
    if isinstance(transparent, int):
        values = np.where(stored == transparent, np.uint8(255), values)
    return PIL.Image.fromarray(values)


def _eight_bits(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return (values >> 8).astype(np.uint8)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise PictureError("has no finite values.")
    low, high = float(finite.min()), float(finite.max())
    black, white = low, high
    if values.dtype.kind == "f":
        for most, least in ((1, -np.inf), (255, 25.5)):
            if -0.05 * most <= low and least < high <= 1.05 * most:
                black, white = 0, most
                break
    elif low >= 0 and high <= 255:
        black, white = 0, 255
    elif low >= 0 and high <= 65535:
        return _eight_bits(values.astype(np.uint16))
    values = np.nan_to_num(values.astype(np.float64), nan=black, posinf=white, neginf=black)
    return np.round(np.clip((values - black) / ((white - black) or 1), 0, 1) * 255).astype(np.uint8)


def _from_array(values: Any, name: str) -> PIL.Image.Image:
    tensor = isinstance(values, torch.Tensor)
    what = f"{name}, {'a tensor' if tensor else 'an array'} of {values.dtype} and shape {tuple(values.shape)}"
    array = values
    if tensor:
        values = values.detach().cpu()
        array = (values.float() if values.is_floating_point() else values).numpy()
    ends = (0, -1) if tensor else (-1, 0)
    channels = next((end for end in ends if array.ndim == 3 and array.shape[end] in (1, 3, 4)), None)
    if array.ndim != 2 and channels is None or not array.size:
        raise PictureError(f"{what}, is not an image: its shape must be (height, width) or with 1, 3 or 4 channels.")
    if array.ndim == 3:
        array = np.moveaxis(array, channels or 0, -1)
        array = array[:, :, 0] if array.shape[-1] == 1 else array
    if array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):  # False for NaN
            found = f"{array.min():.4g} to {array.max():.4g}"
            raise PictureError(f"{what}, has values from {found}: floats must be from 0 to 1.")
        array = np.round(array.astype(np.float64) * 255).astype(np.uint8)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2 and array.ndim == 2:
        array = _eight_bits(array)
    if array.dtype != np.uint8:
        raise PictureError(f"{what}, is not an image: its values must be uint8, or floats from 0 to 1.")
    return PIL.Image.fromarray(np.ascontiguousarray(array))
