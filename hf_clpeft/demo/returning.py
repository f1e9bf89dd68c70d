"""Packs a model for a visitor to download, and takes it back from an archive that may be anybody's."""

import hashlib
import shutil
import zipfile
from pathlib import Path, PurePath, PurePosixPath

from ..config import CONFIG_NAME
from ..reports.report import METRICS_NAME
from .models import Models, history
from .pictures import JUNK, LARGEST_ARCHIVE, VisitorError


MOST_MEMBERS = 5_000
KINDS = (".json", ".safetensors", ".md", ".csv", ".png", ".jpg")  # of which a model consists
AGAIN = "Give the archive that was downloaded here, as it is."


def pack(folder: Path) -> str:
    """Packs a model into an archive beside its folder, without the files that are the server's own, such as locks.

    Args:
        folder (`Path`): Folder of the model.

    Returns:
        `str`: Path of the archive.
    """
    path = f"{folder}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            place = file.relative_to(folder)
            if file.is_file() and not _is_junk(place):
                archive.write(file, place.as_posix())
    return path


def take_back(models: Models, path: str | Path) -> str:
    """Registers the model in a downloaded archive.

    Args:
        models ([`Models`]): Where it is added.
        path (`str` or `Path`): The zip archive.

    Returns:
        `str`: Its key.

    Raises:
        [`VisitorError`]: It is no such archive, or holds a model that does not continue the served one.
        [`ConfigError`]: The model is damaged.
    """
    folder = models.new_folder()
    try:
        _unpack(Path(path), folder)
        content = _content(folder)
        known = models.returned(content)
        if known is not None:
            shutil.rmtree(folder.parent, ignore_errors=True)
            return known
        model = models.load(folder)
        served = history(models.served)
        if model.config.method.name != models.served.config.method.name or history(model)[: len(served)] != served:
            raise VisitorError(f"This model was not taught here: it does not begin with the same tasks. {AGAIN}")
    except BaseException:
        shutil.rmtree(folder.parent, ignore_errors=True)
        raise
    return models.add(folder, content)


def _unpack(path: Path, folder: Path) -> None:
    """Unpacks a model's files, and nothing else, within the limits of the demo."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [entry for entry in archive.infolist() if not entry.is_dir()]
            if len(members) > MOST_MEMBERS or sum(entry.file_size for entry in members) > LARGEST_ARCHIVE:
                raise VisitorError(f"{path.name} is too large for a model of this page. {AGAIN}")
            for entry in members:
                place = PurePosixPath(entry.filename)
                stored = entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
                if place.is_absolute() or ".." in place.parts or "\\" in entry.filename or not stored:
                    raise VisitorError(f"{path.name} was not made by this page. {AGAIN}")
            places = {PurePosixPath(entry.filename): entry for entry in members}
            places = {place: entry for place, entry in places.items() if not _is_junk(place)}
            root = _root_of(list(places), path.name)
            for place, entry in places.items():
                if place.suffix in KINDS and place.is_relative_to(root):
                    target = folder / place.relative_to(root)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(entry) as file:
                        target.write_bytes(file.read(entry.file_size))  # the size may be forged: never to the end
    except VisitorError:
        raise
    except Exception as error:  # zipfile raises anything from BadZipFile to UnicodeDecodeError
        raise VisitorError(f"{path.name} is no archive of a model, or a damaged one. {AGAIN}") from error


def _content(folder: Path) -> str:
    """What identifies the content of a model: its configuration vouches for all files but the metrics."""
    files = (path for path in (folder / CONFIG_NAME, folder / METRICS_NAME) if path.is_file())
    return " ".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)


def _root_of(places: list[PurePosixPath], name: str) -> PurePosixPath:
    """Where in an archive the model is: at the top, or in the folder that was unpacked and packed again."""
    roots = {place.parent for place in places if place.name == CONFIG_NAME and len(place.parts) <= 2}
    if PurePosixPath() in roots:
        return PurePosixPath()
    if len(roots) != 1:
        what = f"more than one {CONFIG_NAME}" if roots else f"no {CONFIG_NAME}, so it is no model"
        raise VisitorError(f"{name} holds {what}. {AGAIN}")
    return roots.pop()


def _is_junk(place: PurePath) -> bool:
    """Whether a file is no part of a model: hidden, or added by whatever packed it."""
    return any(part.startswith(".") or part.lower() in JUNK for part in place.parts)
