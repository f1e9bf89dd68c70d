"""Takes back a model that a visitor has downloaded, from an archive that may be anybody's."""

import shutil
import zipfile
from pathlib import Path, PurePosixPath

from .models import Models, history
from .pictures import LARGEST_ARCHIVE, VisitorError


MOST_MEMBERS = 5_000
KINDS = (".json", ".safetensors", ".md", ".csv", ".png", ".jpg")  # of which a model consists
AGAIN = "Give the archive that was downloaded here, as it is."


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
        model = models.load(folder)
        served = history(models.served)
        if model.config.method.name != models.served.config.method.name or history(model)[: len(served)] != served:
            raise VisitorError(f"This model was not taught here: it does not begin with the same tasks. {AGAIN}")
    except BaseException:
        shutil.rmtree(folder.parent, ignore_errors=True)
        raise
    return models.add(folder)


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
                if place.suffix in KINDS:
                    target = folder / place
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(entry) as file:
                        target.write_bytes(file.read(entry.file_size))  # the size may be forged: never to the end
    except VisitorError:
        raise
    except Exception as error:  # zipfile raises anything from BadZipFile to UnicodeDecodeError
        raise VisitorError(f"{path.name} is no archive of a model, or a damaged one. {AGAIN}") from error
