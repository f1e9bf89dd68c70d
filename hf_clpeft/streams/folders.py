"""Folders of pictures: which folder is a split, which one a class, and what is left out.

`datasets` looks for words such as `train` or `test` anywhere in a path, so that a class called `train` or `test tube`
becomes a split. Here a folder is a split only if all of those beside it are, and hold folders themselves.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, ReadInstruction
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from ..config.text import get_logger
from .source import StreamError


logger = get_logger(__name__)

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
EXTENSIONS = {*ImageFolder.EXTENSIONS, ".avif"}
METADATA = set(ImageFolder.METADATA_FILENAMES)
DATA = {".parquet", ".arrow", ".tar"}  # what holds pictures, if not folders do
# Folders that programs leave behind.
JUNK = {"__macosx", "__pycache__", ".appledouble", ".cache", ".dvc", ".git", ".huggingface", ".ipynb_checkpoints"}
JUNK |= {".svn", ".hg", ".thumbnails", ".trash", ".trashes", ".venv", "@eadir"}
LISTED = 3  # names that a message lists

Parts = tuple[str, ...]


@dataclass
class PictureFolder:
    """Pictures in class folders, perhaps below split folders.

    Args:
        root (`str`): Path of the folder, or an address that `fsspec` reads.
        splits (`dict[str, list[tuple[str, str]]]`): For each split, path below the root and class of every picture.
        names (`dict[str, str]`): Split for every name that it goes by: its folder's, and what `datasets` calls it.
    """

    root: str
    splits: dict[str, list[tuple[str, str]]]
    names: dict[str, str] = field(default_factory=dict)

    @property
    def classes(self) -> list[str]:
        """Names of all classes, in order."""
        return sorted({name for rows in self.splits.values() for _, name in rows})

    def open(self, split: str, streaming: bool = False) -> Dataset | IterableDataset:
        """One split, or a part or sum of splits as `datasets` writes it (`"train[:50%]"`, `"train+test"`).

        Raises:
            [`StreamError`]: There is no such split.
        """
        rows = self._rows(split)
        features = Features({"image": Image(), "label": ClassLabel(names=self.classes)})
        number = {name: i for i, name in enumerate(self.classes)}
        paths, labels = [path for path, _ in rows], [number[name] for _, name in rows]
        if streaming:  # lists are shards
            settings = {"root": self.root, "paths": paths, "labels": labels}
            return IterableDataset.from_generator(_read, features=features, gen_kwargs=settings)
        state = _state_of(self.root, paths)  # a picture that changes is another one
        settings = {"root": self.root, "paths": tuple(paths), "labels": tuple(labels), "state": state}
        return Dataset.from_generator(_read, features=features, gen_kwargs=settings)

    def _rows(self, split: str) -> list[tuple[str, str]]:
        if split in self.names or split in self.splits:
            return self.splits[self.names.get(split, split)]
        lengths = {name: len(self.splits[to]) for name, to in [*((s, s) for s in self.splits), *self.names.items()]}
        try:
            parts = ReadInstruction.from_spec(split).to_absolute(lengths)
        except (ValueError, AssertionError) as error:
            raise StreamError(f"{self.root!r} has no split {split!r}; its splits are {list(self.splits)}.") from error
        return [row for part in parts for row in self._rows(part.splitname)[part.from_ : part.to]]


def _read(root: str, paths: Iterable[str], labels: Iterable[int], state: str = "") -> Iterator[dict]:
    remote = "://" in root
    for path, label in zip(paths, labels, strict=True):
        place = f"{root}/{path}" if remote else os.path.join(root, path)
        if remote:
            with fsspec.open(place, "rb") as file:
                yield {"image": {"bytes": file.read(), "path": path}, "label": label}
        else:
            yield {"image": {"bytes": None, "path": place}, "label": label}


def _state_of(root: str, paths: list[str]) -> str:
    """Changes when a picture does."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            status = os.stat(os.path.join(root, path))
        except OSError:  # told by its row when it is read
            continue
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def is_picture(path: str) -> bool:
    """Whether a path is that of a picture, by its name.

    Example:

    ```py
    >>> from hf_clpeft.streams.folders import is_picture

    >>> [is_picture(path) for path in ("cat/1.JPG", "cat/1.txt", "cat/._1.jpg")]
    [True, False, False]

    ```
    """
    name = path.rsplit("/", 1)[-1]
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")


def list_files(folder: Path) -> list[str]:
    """Paths of all files below a folder, symlinks followed, in order; of an empty folder, its own with a `/` behind.

    Raises:
        [`StreamError`]: A folder cannot be read.
    """
    found: list[str] = []

    def walk(place: str, path: str, above: tuple[str, ...]) -> None:
        real = os.path.realpath(place)
        if real in above:  # a link to a folder that it lies in
            return
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError as error:
            raise StreamError(f"The folder {place!r} cannot be read: {error.strerror}.") from error
        if not entries and path:
            found.append(path)
        for entry in entries:
            if not os.path.isdir(entry.path):
                found.append(path + entry.name)
            elif entry.name.lower() not in JUNK:
                walk(entry.path, f"{path}{entry.name}/", (*above, real))

    walk(str(folder), "", ())
    return found


def find_metadata(files: Iterable[str]) -> list[str]:
    """Those among the paths that say more of pictures than folders do; `datasets` reads them."""
    return [path for path in files if path.rsplit("/", 1)[-1] in METADATA]


def holds_data(files: Iterable[str]) -> bool:
    """Whether there are files that hold pictures, such as Parquet files."""
    return any(os.path.splitext(path)[1].lower() in DATA for path in files)


def find_pictures(root: str, files: Iterable[str], named: Collection[str] = ()) -> PictureFolder:
    """Finds splits and classes among the files of a folder.

    A class is the first folder below the split; folders below it belong to it. The first level is that of the splits
    if every folder there is called like one (`train`, `Test`, `val`, ...) and at least one has folders with pictures,
    or if the splits are `named`. A folder that may be either, and pictures that may be lost, are refused.

    Args:
        root (`str`): Path or address of the folder.
        files (iterable of `str`): Paths below it, separated by `/`.
        named (collection of `str`, *optional*): Folders that the user calls splits.

    Raises:
        [`StreamError`]: There are no class folders, or it is not clear which ones are.

    Example:

    ```py
    >>> from hf_clpeft.streams.folders import find_pictures

    >>> find_pictures("toys", ["car/1.png", "train/1.png"]).classes
    ['car', 'train']
    >>> list(find_pictures("toys", ["train/car/1.png", "val/car/2.png"]).splits)
    ['train', 'val']

    ```
    """
    paths = [tuple(path.split("/")) for path in files if not JUNK & {part.lower() for part in path.split("/")[:-1]}]
    below = _find_level(root, paths, named)
    level = _Level(root, paths, below)
    words = [name for name in level.folders if name in named or name.lower() in SPLIT_WORDS]
    if not words and not level.folders:
        raise StreamError(f"{level.place} holds no picture.")
    if any(name in named and level.is_deep(name) for name in words):
        splits = [name for name in words if name in named or level.is_deep(name)]
    elif len(words) == len(level.folders):
        splits = [name for name in words if level.is_deep(name)]
        if not splits:
            raise StreamError(
                f"{level.place} holds pictures in {_listed(words)}, named like splits, without class folders: put "
                f"those of each class into {level.path(words[0], 'CLASS')}; or, if these are the classes, move them "
                f"into one folder, {level.path('train', words[0])}."
            )
    else:
        splits = []
        for name in words:
            if level.is_deep(name):
                other = next(folder for folder in level.folders if folder not in words)
                raise StreamError(
                    f"{level.place}: {name!r} may be a split or a class, as {other!r} lies beside it. If it is a "
                    f"split, name the splits with train_split and test_split; if it is a class, move all classes into "
                    f"one folder, {level.path('train', name)}."
                )
    level.warn_of_rest([*splits, *(() if splits else level.folders)])
    if not splits:
        return PictureFolder(root, {"train": level.pictures()})
    found = {name: _Level(root, paths, (*below, name)) for name in splits}
    for name, split in found.items():
        split.warn_of_rest(split.folders)
        if not split.folders:
            raise StreamError(f"{split.place} holds pictures, but no class folders; {name!r} can be no split.")
    return PictureFolder(root, {name: split.pictures() for name, split in found.items()}, _names_of(splits))


def _find_level(root: str, paths: list[Parts], named: Collection[str]) -> Parts:
    """Where splits or classes begin: at the top, or in the only folder there, such as `data`."""
    top = _Level(root, paths, ())
    if len(top.folders) != 1 or not top.is_deep(top.folders[0]):
        return ()
    (only,) = top.folders
    if only in named or only.lower() in SPLIT_WORDS:
        return ()
    inner = _Level(root, paths, (only,))
    if all(name in named or name.lower() in SPLIT_WORDS for name in inner.folders):
        return (only,)
    if "://" in root and len(inner.folders) > 1:  # of a repo, no folder can be given
        logger.warning("%s: taking the folders in %r for the classes.", top.place, only)
        return (only,)
    raise StreamError(
        f"{top.place} holds no pictures but in the folder {only!r}. If its folders are the classes, give "
        f"{top.path(only)}; if {only!r} is a class, move its pictures right into it."
    )


def _names_of(splits: list[str]) -> dict[str, str]:
    """What a split may be asked for by: what `datasets` calls it, too, where that is clear."""
    names: dict[str, list[str]] = defaultdict(list)
    for split in splits:
        names[SPLIT_WORDS.get(split.lower(), split)].append(split)
    return {name: same[0] for name, same in names.items() if len(same) == 1 and name not in splits}


class _Level:
    """The folders with pictures at one level, and the pictures beside them."""

    def __init__(self, root: str, paths: list[Parts], above: Parts):
        self.root, self.above = root, above
        inside = [path[len(above) :] for path in paths if path[: len(above)] == above and len(path) > len(above)]
        self.strays = ["/".join(path) for path in inside if len(path) == 1 and is_picture(path[0])]
        self.files: dict[str, list[Parts]] = defaultdict(list)
        self.without: list[str] = []
        for path in inside:
            if len(path) > 1:
                self.files[path[0]].append(path[1:])
        for name, files in list(self.files.items()):
            # What is hidden below a class is meant to be hidden.
            self.files[name] = [p for p in files if is_picture(p[-1]) and not any(q.startswith(".") for q in p)]
            if not self.files[name]:
                del self.files[name]
                self.without += [name] if not name.startswith(".") else []
        self.folders = sorted(self.files)
        self._check()

    @property
    def place(self) -> str:
        return self.path()

    def path(self, *names: str) -> str:
        path = "/".join((self.root, *self.above, *names))
        return path if path.isprintable() else repr(path)

    def is_deep(self, name: str) -> bool:
        """Whether all pictures of a folder lie in folders below it, but for strays."""
        deep = sum(len(path) > 1 for path in self.files[name])
        return deep > len(self.files[name]) - deep

    def pictures(self) -> list[tuple[str, str]]:
        rows = [
            ("/".join((*self.above, name, *path)), name) for name in self.folders for path in sorted(self.files[name])
        ]
        for path, _ in rows:
            if any("\ud800" <= character <= "\udfff" for character in self.root + path):
                raise StreamError(f"{self.root!r}: the name of {path!r} is no UTF-8 text; rename it.")
        return rows

    def _check(self) -> None:
        hidden = [name for name in self.folders if name.startswith(".")]
        if hidden:
            raise StreamError(
                f"{self.place}: the folder {hidden[0]!r} holds {len(self.files[hidden[0]])} pictures and is hidden. "
                "If it is a class, rename it so that it does not begin with a dot; if not, move it away."
            )
        if len(self.strays) > sum(map(len, self.files.values())):
            raise StreamError(
                f"{self.place} holds pictures, but no class: put those of each class into a folder with its name, "
                f"{self.path('robin', '1.jpg')}."
            )

    def warn_of_rest(self, used: Collection[str]) -> None:
        """Says what is left out. A loss that nobody is told of is the worst."""
        rest = [name for name in self.folders if name not in used]
        if rest:
            logger.warning("%s: leaving out the folders %s, which hold no class folders.", self.place, _listed(rest))
        if self.without:
            logger.warning("%s: leaving out the folders %s: no pictures there.", self.place, _listed(self.without))
        if self.strays:
            logger.warning("%s: leaving out pictures outside of class folders: %s.", self.place, _listed(self.strays))


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:LISTED])) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
