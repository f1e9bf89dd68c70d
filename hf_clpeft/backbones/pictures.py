"""The one reader of pictures: whatever holds one becomes the same RGB pixels, wherever it is looked at."""

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


READER = 2
"""Version of the reader: raise it whenever a picture becomes other pixels, so that no cache of older ones is used."""

MOST_OBLONG = 1000  # the longer side by the shorter one; resizing a strip's shorter side would make the other one huge
KINDS = "a PIL image, a path, bytes, an open file, or an array or tensor of one picture (uint8, or floats from 0 to 1)"

T = TypeVar("T")
_Turn = PIL.Image.Transpose
_TURNS = {  # what the EXIF orientation asks for
    2: _Turn.FLIP_LEFT_RIGHT,
    3: _Turn.ROTATE_180,
    4: _Turn.FLIP_TOP_BOTTOM,
    5: _Turn.TRANSPOSE,
    6: _Turn.ROTATE_270,
    7: _Turn.TRANSVERSE,
    8: _Turn.ROTATE_90,
}
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)
_STREAMED = re.compile(r"(zip://[^:]*::)?hf://|zip://[^:]*::/")  # no other address of a stranger is asked
_LONGEST_NAME = 200  # characters that a message repeats
_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # chunks of a PNG
_JPEG_NOTES = {
    *range(0xE1, 0xEE),
    0xEF,
    0xFE,
}  # EXIF, XMP, profiles, comments; not what Adobe says of colours


class PictureError(HfClpeftError, OSError):
    """What is no picture, or none that can be read. The message says which one, why, and what to do.

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
    """Reads one picture as RGB pixels: the first frame of it, upright, over white where it is transparent.

    Training, [`ContinualModel.predict`], the command line and the demo all read with this function. Values of grey
    pictures with more than 8 bits become 0 to 255 as follows:

    - 16 bits: by their upper 8 bits.
    - 32-bit integers: from 0 to 255 as they are, from 0 to 65535 as 16 bits.
    - Floats: from 0 to 1 times 255, from 0 to 255 as they are (with 5 % more at both ends cut off; the brightest must
      be over a tenth of 255). What is not a number is black.
    - All others: the picture's own darkest value becomes black, its brightest white.

    An EXIF orientation is followed once, and ignored if it is none of 1 to 8; damaged notes (EXIF, XMP) beside good
    pixels are ignored, too. Colour profiles are not applied. A pipeline of `transformers` reads files in its own way:
    give it what this function returns.

    Args:
        picture (`PIL.Image.Image`, path, `bytes`, binary file, array, `torch.Tensor` or `dict`): An image of any mode;
            a file, or what is in one; what `datasets.Image(decode=False)` gives, `{"bytes": ..., "path": ...}`; or
            values of shape `(height, width)`, `(height, width, channels)` or `(channels, height, width)` with 1, 3 or
            4 channels: `uint8`, `uint16` if grey, or finite floats from 0 to 1. Where both ends of a shape could be
            channels, they are the last of an array and the first of a tensor.
        name (`str`, *optional*): What messages call it; the file's path if it has one.

    Returns:
        `PIL.Image.Image`: RGB, without metadata.

    Raises:
        [`PictureError`]: It is no picture, a damaged one, one of no pixels, or one of more than Pillow decodes
            (`PIL.Image.MAX_IMAGE_PIXELS`, times two) or a mere strip. Nothing but regular files is opened.

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
        return _read_path(_attempt(_path_of, picture, name))
    if isinstance(picture, PIL.Image.Image):
        return _read(picture, name)
    if isinstance(picture, np.ndarray | torch.Tensor):
        return _read(_attempt(_from_array, picture, name), name)
    if hasattr(picture, "read"):
        picture = _attempt(_content, picture, name)
    if isinstance(picture, bytes | bytearray | memoryview):
        if not picture:
            raise PictureError(f"{name} is empty: it has no bytes.")
        return read_file(io.BytesIO(picture), name)
    raise PictureError(f"{name} is of type {type(picture).__name__}, and no picture; give {KINDS}.")


def is_picture(thing: Any) -> bool:
    """Whether something is meant as one picture, rather than as several."""
    if isinstance(thing, np.ndarray | torch.Tensor):
        return thing.ndim < 4 and getattr(thing.dtype, "kind", "f") not in "OSU"  # an array of paths holds several
    one = str | os.PathLike | bytes | bytearray | memoryview | PIL.Image.Image | Mapping
    return isinstance(thing, one) or hasattr(thing, "read")


def _attempt(read: Callable[..., T], thing: Any, name: str) -> T:
    try:
        return read(thing, name)
    except PictureError:
        raise
    except Exception as error:  # whatever files, arrays and objects of strangers raise
        raise PictureError(f"{name} cannot be read: {_reason(error)}") from error


def _path_of(path: str | os.PathLike, name: str) -> str:
    return os.fsdecode(path)


def _read_row(data: Any, path: Any, name: str) -> PIL.Image.Image:
    """A picture of a data set: where it is streamed from the Hub or out of an archive, its path says so."""
    if isinstance(path, str) and path:
        name = _shown(path)
        if data is None and _STREAMED.match(path):
            data = _attempt(_fetch, path, name)
    return open_image(path if data is None else data, name)


def _fetch(path: str, name: str) -> bytes:
    from datasets.utils.file_utils import xopen

    with xopen(path, "rb") as file:
        return file.read()


def _shown(text: str) -> str:
    """A path as a message can hold it: it may be a stranger's."""
    text = text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}…"
    return text if text.isprintable() and text.strip() else repr(text)


def _read_path(path: str) -> PIL.Image.Image:
    name = _shown(path)
    try:
        file = Path(path)
        if file.is_dir():
            raise PictureError(f"{name} is a folder: give the pictures in it.")
        if file.exists() and not file.is_file():
            raise PictureError(f"{name} is no regular file.")  # to read a pipe could take for ever
        with open(path, "rb") as opened:
            if not opened.read(1):
                raise PictureError(f"{name} is empty: it has no bytes.")
            opened.seek(0)
            return read_file(opened, name)
    except PictureError:
        raise
    except (OSError, ValueError) as error:
        if _ADDRESS.match(path):
            raise PictureError(f"{name} is an address; download it first, and give the file.") from error
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
    """Reads an encoded picture as [`open_image`] does.

    Args:
        file (binary file): That can be sought in.
        name (`str`): What messages call it.
        formats (`tuple[str, ...]`, *optional*): Kinds that may be decoded, as Pillow names them. Default: all.
        check (callable, *optional*): Looks at the image before it is decoded, and raises what it likes.

    Returns:
        `PIL.Image.Image`: RGB, without metadata.

    Raises:
        [`PictureError`]: See [`open_image`]; its cause is Pillow's error.
    """
    try:
        return _decode(file, name, formats, check)
    except PictureError as error:
        if not isinstance(error.__cause__, Exception) or isinstance(error.__cause__, PictureError):
            raise
        picture = _without_notes(file)
        if picture is None:
            raise
        try:  # damaged notes do not spoil good pixels
            return _decode(io.BytesIO(picture), name, formats, check)
        except PictureError:
            raise error from error.__cause__


def _decode(
    file: Any, name: str, formats: tuple[str, ...] | None, check: Callable[[PIL.Image.Image], None]
) -> PIL.Image.Image:
    try:
        image = PIL.Image.open(file, formats=formats)
    except Exception as error:  # Pillow raises anything from OSError to struct.error on broken files
        raise PictureError(f"{name} is no picture that can be read: {_reason(error)}") from error
    with image:
        check(image)
        return _read(image, name)


def _without_notes(file: Any) -> bytes | None:
    """A PNG or JPEG without what says nothing about pixels; `None` where there is no such thing to take away."""
    file.seek(0)
    data = file.read(8)
    if not data.startswith((b"\x89PNG", b"\xff\xd8")):
        return None
    data += file.read()
    if data.startswith(b"\x89PNG"):
        kept, start = [data[:8]], 8
        while start + 8 <= len(data):
            end = start + 12 + int.from_bytes(data[start : start + 4])
            kind, sound = data[start + 4 : start + 8], zlib.crc32(data[start + 4 : end - 4]).to_bytes(4)
            if kind in _PIXELS or (kind == b"eXIf" and sound == data[end - 4 : end]):
                kept.append(data[start:end])
            start = end
    else:
        kept, start = [data[:2]], 2
        while data[start : start + 1] == b"\xff" and data[start + 1 : start + 2] != b"\xda":
            end = start + 2 + int.from_bytes(data[start + 2 : start + 4])
            if data[start + 1] not in _JPEG_NOTES:
                kept.append(data[start:end])
            start = end
        kept.append(data[start:])
    picture = b"".join(kept)
    return picture if len(picture) < len(data) else None


def _reason(error: Exception) -> str:
    if isinstance(error, PIL.UnidentifiedImageError):
        return "no kind of picture that Pillow knows."
    if isinstance(error, MemoryError):
        return "there is not enough memory for it."
    return " ".join(str(error).split()).rstrip(".") + "."


def _read(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    width, height = image.size
    if not width or not height or max(width, height) > MOST_OBLONG * min(width, height):
        raise PictureError(f"{name} has {width} x {height} pixels, of which no picture can be made.")
    if image.format == "EPS":
        raise PictureError(f"{name} is PostScript, a program that is not run here; save it as PNG first.")
    try:
        return _to_rgb(image)
    except PictureError as error:
        raise PictureError(f"{name} {error}") from error
    except Exception as error:  # Pillow raises anything from OSError to struct.error on broken files
        raise PictureError(f"{name} is no picture that can be read: {_reason(error)}") from error


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    clear = _clear_colour(image)
    image.load()
    turn = _turn_of(image)
    if image.mode == "RGB" and turn is None and not image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        upright = _greys(image, clear).convert("RGB")
    elif image.has_transparency_data:
        if clear != image.info.get("transparency"):
            image = image.copy()
            image.info["transparency"] = clear
        # Pillow has no way from La, which is grey times its alpha, to RGBA.
        page = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = PIL.Image.new("RGBA", page.size, "white")  # as on a page: most drawings have dark ink
        upright = PIL.Image.alpha_composite(white, page).convert("RGB")
    else:
        upright = image.convert("RGB")
    if turn is not None:
        upright = upright.transpose(turn)
    upright.info = {}  # whoever turns pictures upright later must not turn this one again
    return upright


def _turn_of(image: PIL.Image.Image) -> PIL.Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(0x0112, 1))
    except Exception:  # a camera's broken notes do not spoil its picture
        return None


def _clear_colour(image: PIL.Image.Image) -> Any:
    """The colour that is transparent, in the values of the loaded pixels; Pillow leaves it in those of the file.

    Until the image is loaded, its first tile says how many bits a value has in the file.
    """
    clear = image.info.get("transparency")
    tile = next(iter(getattr(image, "tile", ())), None)
    if clear is None or image.format != "PNG" or tile is None:
        return clear
    factor = {"L;2": 85, "L;4": 17}.get(tile[3])
    if factor is not None:
        return clear * factor
    return tuple(value >> 8 for value in clear) if tile[3] == "RGB;16B" else clear


def _greys(image: PIL.Image.Image, clear: Any) -> PIL.Image.Image:
    """A picture of more than 8 bits in 8; see [`open_image`]."""
    stored = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if stored.dtype == np.int32 and tags.get(258) == (32,) and tags.get(339, (1,)) == (1,):
        stored = stored.view(np.uint32)  # what Pillow takes for signed
    values = _eight_bits(stored)
    if tags.get(262) == 0:  # white is zero
        values = 255 - values
    if isinstance(clear, int):
        values = np.where(stored == clear, np.uint8(255), values)
    return PIL.Image.fromarray(values)


def _eight_bits(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return (values >> 8).astype(np.uint8)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise PictureError("holds no number.")
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
        raise PictureError(f"{what}, is no picture: it must be (height, width), or with 1, 3 or 4 channels besides.")
    if array.ndim == 3:
        array = np.moveaxis(array, channels or 0, -1)
        array = array[:, :, 0] if array.shape[-1] == 1 else array
    if array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):  # false of what is not a number
            found = f"{array.min():.4g} to {array.max():.4g}"
            raise PictureError(f"{what}, has values from {found}: floats must be from 0 to 1.")
        array = np.round(array.astype(np.float64) * 255).astype(np.uint8)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2 and array.ndim == 2:
        array = _eight_bits(array)
    if array.dtype != np.uint8:
        raise PictureError(f"{what}, is no picture: its values must be uint8, or floats from 0 to 1.")
    return PIL.Image.fromarray(np.ascontiguousarray(array))
