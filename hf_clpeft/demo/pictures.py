"""Decodes untrusted uploads within fixed limits; errors say what to do."""

import io
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import PIL.Image

from ..backbones.pictures import PictureError, read_file
from ..config.errors import HfClpeftError


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # no rarely used decoder, and none that runs a program
LARGEST_FILE = 20 * 2**20  # bytes
LARGEST_ARCHIVE = 200 * 2**20  # bytes, packed and unpacked
SMALLEST_SIDE = 4
MOST_PIXELS = 50_000_000
MOST_FILES = 500
MOST_OBLONG = 50  # aspect ratio; resizing the shorter side must not make the longer one huge
MOST_SCANS = 500  # of a progressive JPEG, usually 10; each of 75 bytes makes the decoder pass over all pixels

_OTHER_KINDS = {
    rb"%PDF": "a PDF document",
    rb"....ftypavi": "an AVIF picture",
    rb"....ftyp": "a HEIC picture or a video",
    rb".{0,1000}<svg": "an SVG drawing",
}
JUNK = ("__macosx", "thumbs.db", "desktop.ini")


class VisitorError(HfClpeftError, ValueError):
    """An invalid request of a visitor, such as a file that is not a picture. The message says why, and what to do.

    It may contain untrusted file names: escape it before rendering it as HTML.
    """


def open_picture(file: str | Path | bytes, name: str | None = None) -> PIL.Image.Image:
    """Reads one picture within the limits of the demo.

    Args:
        file (`str`, `Path` or `bytes`): The file, or its content.
        name (`str`, *optional*): Name for error messages; default: the file name.

    Returns:
        `PIL.Image.Image`: RGB, without metadata.

    Raises:
        [`VisitorError`]: The file is not a picture, is damaged, or exceeds a limit.

    Example:

    ```py
    >>> import PIL.Image
    >>> from hf_clpeft.demo.pictures import open_picture

    >>> PIL.Image.new("LA", (400, 100)).save("ink.png")
    >>> image = open_picture("ink.png")
    >>> image.mode, image.size, image.getpixel((0, 0))
    ('RGB', (400, 100), (255, 255, 255))

    ```
    """
    if isinstance(file, bytes):
        data, name = file, name or "The picture"
    else:
        name = name or Path(file).name
        try:
            with open(file, "rb") as opened:
                data = opened.read(LARGEST_FILE + 1)
        except (OSError, ValueError) as error:  # ValueError: the path has a NUL
            raise VisitorError(f"{name} was not uploaded; try again.") from error
    if not data:
        raise VisitorError(f"{name} is empty; choose another file.")
    if len(data) > LARGEST_FILE:
        raise VisitorError(f"{name} has more than {LARGEST_FILE // 2**20} MB; make it smaller first.")

    def check(image: PIL.Image.Image) -> None:
        _check_size(*image.size, name)
        if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MOST_SCANS:
            raise VisitorError(f"{name} is an unusual JPEG; save it as PNG first.")

    try:
        return read_file(io.BytesIO(data), name, FORMATS, check)
    except PictureError as error:
        raise VisitorError(f"{name} {_reason(error.__cause__, data)}") from error


def _reason(cause: BaseException | None, data: bytes) -> str:
    if isinstance(cause, PIL.UnidentifiedImageError):
        kinds = (kind for mark, kind in _OTHER_KINDS.items() if re.match(mark, data, re.DOTALL | re.IGNORECASE))
        return f"is {next(kinds, 'no picture that can be read here')}; save it as PNG or JPEG first."
    if isinstance(cause, PIL.Image.DecompressionBombError | PIL.Image.DecompressionBombWarning):
        return f"has more than {MOST_PIXELS:,} pixels; make it smaller first."
    return "is damaged, incomplete or of a rare format; save it as PNG or JPEG again."


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MOST_PIXELS:
        raise VisitorError(f"{name} has more than {MOST_PIXELS:,} pixels; make it smaller first.")
    size = f"{name} has {width} x {height} pixels"
    if min(width, height) < SMALLEST_SIDE:
        raise VisitorError(f"{size}; choose one of at least {SMALLEST_SIDE} x {SMALLEST_SIDE}.")
    if max(width, height) > MOST_OBLONG * min(width, height):
        raise VisitorError(f"{size}, which is too elongated; crop it first.")


def read_uploads(paths: Sequence[str | Path]) -> Iterator[tuple[str, PIL.Image.Image | VisitorError]]:
    """Reads pictures and zip archives of pictures, one picture at a time. Nothing is unpacked on disk.

    Archives are checked at the call; pictures are decoded lazily.

    Args:
        paths (sequence of `str` or `Path`): The uploaded files.

    Returns:
        Iterator of names and images: the name of a file, or its path within its archive with `/` between folders.
        Instead of an image, a [`VisitorError`] says why a file cannot be read.

    Raises:
        [`VisitorError`]: An archive is damaged, encrypted or malicious, or a limit is exceeded.

    Example:

    ```py
    >>> import zipfile
    >>> from hf_clpeft.demo.pictures import read_uploads

    >>> with zipfile.ZipFile("pictures.zip", "w") as archive:
    ...     archive.writestr("cats/tom.svg", "<svg></svg>")
    >>> for name, image in read_uploads(["pictures.zip"]):
    ...     print(name, "->", image)
    cats/tom.svg -> cats/tom.svg is an SVG drawing; save it as PNG or JPEG first.

    ```
    """
    plan: list[tuple[Path, dict[zipfile.ZipInfo, str] | None]] = []
    count = 0
    for path in map(Path, paths):
        members = _members(path) if _is_archive(path) else None
        plan.append((path, members))
        count += 1 if members is None else len(members)
        if count > MOST_FILES:
            raise VisitorError(f"These are more than {MOST_FILES} pictures; choose fewer of them.")
    return _read(plan)


def _is_archive(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) in (b"PK\3\4", b"PK\5\6")  # a picture with an appended archive is a picture
    except (OSError, ValueError):  # reported by open_picture
        return False


def _members(path: Path) -> dict[zipfile.ZipInfo, str]:
    """Names of the pictures in an archive, after checking it for path traversal, encryption and zip bombs."""
    again = "zip the pictures again"
    try:
        if path.stat().st_size > LARGEST_ARCHIVE:
            raise VisitorError(f"{path.name} has more than {LARGEST_ARCHIVE // 2**20} MB; make it smaller first.")
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except VisitorError:
        raise
    except Exception as error:  # zipfile raises anything from BadZipFile to UnicodeDecodeError
        raise VisitorError(f"{path.name} is damaged or incomplete; {again}.") from error
    members = {}
    for entry in entries:
        name = entry.filename.replace("\\", "/")
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts or re.match("[a-zA-Z]:", name):
            raise VisitorError(f"{path.name} holds a path outside of the archive, {name}; {again}.")
        if name.endswith("/") or any(part[0] == "." or part.lower() in JUNK for part in place.parts):
            continue
        if entry.flag_bits & 1:
            raise VisitorError(f"{path.name} is locked with a password; {again}, without one.")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack unbounded
            raise VisitorError(f"{path.name} uses an unusual compression; {again}, with the default settings.")
        members[entry] = str(place)
    if not members:
        raise VisitorError(f"{path.name} has no pictures in it; choose another file.")
    if sum(entry.file_size for entry in members if entry.file_size <= LARGEST_FILE) > LARGEST_ARCHIVE:
        raise VisitorError(f"{path.name} unpacks to more than {LARGEST_ARCHIVE // 2**20} MB; make it smaller first.")
    return members


def _read(
    plan: list[tuple[Path, dict[zipfile.ZipInfo, str] | None]],
) -> Iterator[tuple[str, PIL.Image.Image | VisitorError]]:
    for path, members in plan:
        if members is None:
            yield path.name, _attempt(open_picture, path)
            continue
        with zipfile.ZipFile(path) as archive:
            for entry, name in members.items():
                yield name, _attempt(_open_member, archive, entry, name)


def _attempt(read: Callable[..., PIL.Image.Image], *arguments: Any) -> PIL.Image.Image | VisitorError:
    try:
        return read(*arguments)
    except VisitorError as error:
        return VisitorError(str(error))  # a copy, as the traceback of the original keeps the file in memory


def _open_member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str) -> PIL.Image.Image:
    if entry.file_size > LARGEST_FILE:
        raise VisitorError(f"{name} has more than {LARGEST_FILE // 2**20} MB, so it was left out; make it smaller.")
    try:
        with archive.open(entry) as file:
            data = file.read(entry.file_size)  # the size may be forged, so never read to the end
    except Exception as error:  # zipfile raises anything from BadZipFile to zlib.error
        raise VisitorError(f"{name} is damaged in its archive; zip the pictures again.") from error
    return open_picture(data, name)
