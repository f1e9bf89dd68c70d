"""Copies files into a folder for each class."""

import re
import shutil
from collections.abc import Iterator
from filecmp import cmp
from itertools import chain, count
from pathlib import Path

from ..config.errors import OptionError


UNKNOWN = "not recognised"


class Sorter:
    """Copies files into folders named after their classes. Nothing is ever replaced.

    A file that is there already, under its name or with a number, is not copied again.

    Args:
        folder (`Path`): Where these folders are, or are made.
        labels (list of `str`): Names of all classes, from whoever made the model.

    Example:

    ```py
    >>> from pathlib import Path
    >>> from hf_clpeft.cli.sorting import Sorter

    >>> _ = Path("a.jpg").write_bytes(b"")
    >>> Sorter(Path("sorted"), ["../cat"]).copy(Path("a.jpg"), "../cat").as_posix()
    'sorted/_cat/a.jpg'

    ```
    """

    def __init__(self, folder: Path, labels: list[str]):
        self.folder = folder
        self._there: dict[Path, dict[str, str]] = {}  # for each folder of a class: names of files, as they are
        self.names: dict[str | None, str] = {None: UNKNOWN}
        for label in labels:
            self.names[label] = _free(_as_name(label), {name.casefold() for name in self.names.values()})

    def copy(self, path: Path, label: str | None) -> Path:
        """Copies a file to the folder of its class; `None`: of those that are not recognised. Gives the new path."""
        place = self.folder / self.names[label]
        if place not in self._there:
            place.mkdir(parents=True, exist_ok=True)
            self._there[place] = {file.name.casefold(): file.name for file in place.iterdir()}
        there, name = self._there[place], ""
        for name in _numbered(path.name):
            if name.casefold() not in there:
                break
            known = place / there[name.casefold()]
            if known.is_file() and cmp(path, known, shallow=False):
                return known
        shutil.copyfile(path, place / name)
        there[name.casefold()] = name
        return place / name


def check_folder(folder: Path) -> None:
    """Raises [`OptionError`] unless a folder is there or can be made."""
    file = next((place for place in (folder, *folder.parents) if place.exists() and not place.is_dir()), None)
    if file is not None:
        raise OptionError(f"--copy-to {folder}: {file} is a file, not a folder.")


def _as_name(label: str) -> str:
    """A name of a folder on any system, without a way out of the one above."""
    name = re.sub(r"[^\w .,()&+-]+", "_", label)[:80].strip(" .")
    return f"_{name}" if not name or re.fullmatch(r"(?i)con|prn|aux|nul|com\d|lpt\d", name.split(".")[0]) else name


def _free(name: str, taken: set[str]) -> str:
    """The name, or with a number if it is taken."""
    return next(found for found in _numbered(name) if found.casefold() not in taken)


def _numbered(name: str) -> Iterator[str]:
    path = Path(name)
    return chain([name], (f"{path.stem} {number}{path.suffix}" for number in count(2)))
