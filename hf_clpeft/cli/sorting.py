"""Copies files into a folder for each class."""

import re
import shutil
from pathlib import Path


UNKNOWN = "not recognised"


class Sorter:
    """Copies files into folders named after their classes. Nothing is ever replaced.

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
        self.names: dict[str | None, str] = {None: UNKNOWN}
        for label in labels:
            self.names[label] = _free(_as_name(label), {name.casefold() for name in self.names.values()})

    def copy(self, path: Path, label: str | None) -> Path:
        """Copies a file to the folder of its class; `None`: of those that are not recognised. Gives the new path."""
        place = self.folder / self.names[label]
        place.mkdir(parents=True, exist_ok=True)
        taken = {file.name.casefold() for file in place.iterdir()} if (place / path.name).exists() else set()
        target = place / _free(path.name, taken)
        shutil.copyfile(path, target)
        return target


def _as_name(label: str) -> str:
    """A name of a folder on any system, without a way out of the one above."""
    name = re.sub(r"[^\w .,()&+-]+", "_", label)[:80].strip(" .")
    return f"_{name}" if not name or re.fullmatch(r"(?i)con|prn|aux|nul|com\d|lpt\d", name.split(".")[0]) else name


def _free(name: str, taken: set[str]) -> str:
    """The name, or with a number if it is taken."""
    path, number, found = Path(name), 1, name
    while found.casefold() in taken:
        number += 1
        found = f"{path.stem} {number}{path.suffix}"
    return found
