"""ImageFolder data sets: detects which folders are splits, which are classes, and which are skipped.

`datasets` searches whole paths for words such as `train` or `test`, so a class called `train` or `test tube` becomes
a split. Here a folder is a split only if all its siblings are named like splits and it has subfolders.
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
IMAGE_EXTENSIONS = {*ImageFolder.EXTENSIONS, ".avif"}
METADATA = set(ImageFolder.METADATA_FILENAMES)
DATA_EXTENSIONS = {".parquet", ".arrow", ".tar"}  # formats that embed the images
# Created by tools, not by users.
IGNORED = {"__macosx", "__pycache__", ".appledouble", ".cache", ".dvc", ".git", ".huggingface", ".ipynb_checkpoints"}
IGNORED |= {".svn", ".hg", ".thumbnails", ".trash", ".trashes", ".venv", "@eadir"}
MAX_LISTED = 3  # names listed in a message

Parts = tuple[str, ...]


@dataclass
class PictureFolder:
    """Images in class folders, optionally below split folders.

    Args:
        root (`str`): Path of the folder, or a URL that `fsspec` reads.
        splits (`dict[str, list[tuple[str, str]]]`): For each split, relative path and class of every image.
        aliases (`dict[str, str]`): Alternative names of splits, such as `validation` for a folder `val`.
    """

    root: str
    splits: dict[str, list[tuple[str, str]]]
    aliases: dict[str, str] = field(default_factory=dict)

    @property
    def classes(self) -> list[str]:
        """Names of all classes, sorted."""
        return sorted({name for rows in self.splits.values() for _, name in rows})

    def open(self, split: str, streaming: bool = False) -> Dataset | IterableDataset:
        """Opens a split, or a slice or sum of splits in the syntax of `datasets` (`"train[:50%]"`, `"train+test"`).

        Raises:
            [`StreamError`]: There is no such split.
        """
        rows = self._rows(split)
        features = Features({"image": Image(), "label": ClassLabel(names=self.classes)})
        number = {name: i for i, name in enumerate(self.classes)}
        paths, labels = [path for path, _ in rows], [number[name] for _, name in rows]
        if streaming:  # `datasets` shards lists in `gen_kwargs`
            settings = {"root": self.root, "paths": paths, "labels": labels}
            return IterableDataset.from_generator(_generate_rows, features=features, gen_kwargs=settings)
        fingerprint = _fingerprint(self.root, paths)  # part of the cache key, so that changed files are re-read
        settings = {"root": self.root, "paths": tuple(paths), "labels": tuple(labels), "fingerprint": fingerprint}
        return Dataset.from_generator(_generate_rows, features=features, gen_kwargs=settings)

    def _rows(self, split: str) -> list[tuple[str, str]]:
        if split in self.aliases or split in self.splits:
            return self.splits[self.aliases.get(split, split)]
        lengths = {name: len(self.splits[to]) for name, to in [*((s, s) for s in self.splits), *self.aliases.items()]}
        try:
            parts = ReadInstruction.from_spec(split).to_absolute(lengths)
        except (ValueError, AssertionError) as error:
            raise StreamError(f"{self.root!r} has no split {split!r}; its splits are {list(self.splits)}.") from error
        return [row for part in parts for row in self._rows(part.splitname)[part.from_ : part.to]]


def _generate_rows(root: str, paths: Iterable[str], labels: Iterable[int], fingerprint: str = "") -> Iterator[dict]:
    remote = "://" in root
    for path, label in zip(paths, labels, strict=True):
        place = f"{root}/{path}" if remote else os.path.join(root, path)
        if remote:
            with fsspec.open(place, "rb") as file:
                yield {"image": {"bytes": file.read(), "path": path}, "label": label}
        else:
            yield {"image": {"bytes": None, "path": place}, "label": label}


def _fingerprint(root: str, paths: list[str]) -> str:
    """Hash of paths, sizes and modification times."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            status = os.stat(os.path.join(root, path))
        except OSError:  # reported with its row when it is read
            continue
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def is_picture(path: str) -> bool:
    """Whether a path has the extension of an image.

    Example:

    ```py
    >>> from hf_clpeft.streams.folders import is_picture

    >>> [is_picture(path) for path in ("cat/1.JPG", "cat/1.txt", "cat/._1.jpg")]
    [True, False, False]

    ```
    """
    name = path.rsplit("/", 1)[-1]
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS and not name.startswith(".")


def list_files(folder: Path) -> list[str]:
    """Sorted paths of all files below a folder, following symlinks. Empty folders are listed with a trailing `/`.

    Raises:
        [`StreamError`]: A folder cannot be read.
    """
    found: list[str] = []

    def walk(place: str, path: str, above: tuple[str, ...]) -> None:
        real = os.path.realpath(place)
        if real in above:  # a symlink cycle
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
            elif entry.name.lower() not in IGNORED:
                walk(entry.path, f"{path}{entry.name}/", (*above, real))

    walk(str(folder), "", ())
    return found


def find_metadata(files: Iterable[str]) -> list[str]:
    """Paths of the metadata files (`metadata.csv`, `metadata.jsonl`, ...), which `datasets` reads."""
    return [path for path in files if path.rsplit("/", 1)[-1] in METADATA]


def holds_data(files: Iterable[str]) -> bool:
    """Whether there are files that embed images, such as Parquet files."""
    return any(os.path.splitext(path)[1].lower() in DATA_EXTENSIONS for path in files)


def find_pictures(root: str, files: Iterable[str], named: Collection[str] = ()) -> PictureFolder:
    """Detects splits and classes in the files of a folder.

    A class is a folder directly below the split, with all its subfolders. The top level is taken as splits if every
    folder there is named like one (`train`, `Test`, `val`, ...) and at least one has subfolders with images, or if
    the splits are `named`. Ambiguous layouts raise an error rather than drop images silently.

    Args:
        root (`str`): Path or URL of the folder.
        files (iterable of `str`): Relative paths with `/` as separator.
        named (collection of `str`, *optional*): Folders that the user has named as splits.

    Raises:
        [`StreamError`]: There are no class folders, or the layout is ambiguous.

    Example:

    ```py
    >>> from hf_clpeft.streams.folders import find_pictures

    >>> find_pictures("toys", ["car/1.png", "train/1.png"]).classes
    ['car', 'train']
    >>> list(find_pictures("toys", ["train/car/1.png", "val/car/2.png"]).splits)
    ['train', 'val']

    ```
    """
    paths = [tuple(path.split("/")) for path in files if not IGNORED & {part.lower() for part in path.split("/")[:-1]}]
    below = _find_level(root, paths, named)
    level = _Level(root, paths, below)
    words = [name for name in level.folders if name in named or name.lower() in SPLIT_WORDS]
    if not words and not level.folders:
        raise StreamError(f"{level.place} has no images.")
    if any(name in named and level.has_subfolders(name) for name in words):
        splits = [name for name in words if name in named or level.has_subfolders(name)]
    elif len(words) == len(level.folders):
        splits = [name for name in words if level.has_subfolders(name)]
        if not splits:
            raise StreamError(
                f"{level.place} has images in {_listed(words)}, named like splits, without class folders: put "
                f"those of each class into {level.path(words[0], 'CLASS')}; or, if these are the classes, move them "
                f"into one folder, {level.path('train', words[0])}."
            )
    else:
        splits = []
        for name in words:
            if level.has_subfolders(name):
                other = next(folder for folder in level.folders if folder not in words)
                raise StreamError(
                    f"{level.place}: {name!r} could be a split or a class, as {other!r} is next to it. If it is a "
                    f"split, name the splits with train_split and test_split; if it is a class, move all classes into "
                    f"one folder, {level.path('train', name)}."
                )
    level.warn_of_skipped([*splits, *(() if splits else level.folders)])
    if not splits:
        level.tell_of_nested()
        return PictureFolder(root, {"train": level.pictures()})
    found = {name: _Level(root, paths, (*below, name)) for name in splits}
    for name, split in found.items():
        split.warn_of_skipped(split.folders)
        split.tell_of_nested()
        if not split.folders:
            raise StreamError(f"{split.place} has images but no class folders, so {name!r} cannot be a split.")
    return PictureFolder(root, {name: split.pictures() for name, split in found.items()}, _aliases_of(splits))


def _find_level(root: str, paths: list[Parts], named: Collection[str]) -> Parts:
    """The folder that contains the splits or classes: the root, or its only subfolder, such as `data`."""
    top = _Level(root, paths, ())
    if len(top.folders) != 1 or not top.has_subfolders(top.folders[0]):
        return ()
    (only,) = top.folders
    if only in named or only.lower() in SPLIT_WORDS:
        return ()
    inner = _Level(root, paths, (only,))
    if all(name in named or name.lower() in SPLIT_WORDS for name in inner.folders):
        return (only,)
    if "://" in root and len(inner.folders) > 1:  # a subfolder of a repo cannot be passed
        logger.warning("%s: using the folders in %r as classes.", top.place, only)
        return (only,)
    raise StreamError(
        f"{top.place} has images only in the folder {only!r}. If its subfolders are the classes, pass "
        f"{top.path(only)}; if {only!r} is a class, move its images directly into it."
    )


def _aliases_of(splits: list[str]) -> dict[str, str]:
    """Standard names of splits (`train`, `test`, `validation`), where only one folder maps to each."""
    names: dict[str, list[str]] = defaultdict(list)
    for split in splits:
        names[SPLIT_WORDS.get(split.lower(), split)].append(split)
    return {name: same[0] for name, same in names.items() if len(same) == 1 and name not in splits}


class _Level:
    """The folders with images at one level, and loose images next to them."""

    def __init__(self, root: str, paths: list[Parts], above: Parts):
        self.root, self.above = root, above
        inside = [path[len(above) :] for path in paths if path[: len(above)] == above and len(path) > len(above)]
        self.loose = ["/".join(path) for path in inside if len(path) == 1 and is_picture(path[0])]
        self.files: dict[str, list[Parts]] = defaultdict(list)
        self.empty: list[str] = []
        for path in inside:
            if len(path) > 1:
                self.files[path[0]].append(path[1:])
        for name, files in list(self.files.items()):
            # Hidden files and folders below a class are skipped on purpose.
            self.files[name] = [p for p in files if is_picture(p[-1]) and not any(q.startswith(".") for q in p)]
            if not self.files[name]:
                del self.files[name]
                self.empty += [name] if not name.startswith(".") else []
        self.folders = sorted(self.files)
        self._check()

    @property
    def place(self) -> str:
        return self.path()

    def path(self, *names: str) -> str:
        path = "/".join((self.root, *self.above, *names))
        return path if path.isprintable() else repr(path)

    def has_subfolders(self, name: str) -> bool:
        """Whether most images of a folder are in subfolders rather than directly in it."""
        deep = sum(len(path) > 1 for path in self.files[name])
        return deep > len(self.files[name]) - deep

    def pictures(self) -> list[tuple[str, str]]:
        rows = [
            ("/".join((*self.above, name, *path)), name) for name in self.folders for path in sorted(self.files[name])
        ]
        for path, _ in rows:
            if any("\ud800" <= character <= "\udfff" for character in self.root + path):
                raise StreamError(f"{self.root!r}: the name of {path!r} is not valid UTF-8; rename it.")
        return rows

    def _check(self) -> None:
        hidden = [name for name in self.folders if name.startswith(".")]
        if hidden:
            raise StreamError(
                f"{self.place}: the folder {hidden[0]!r} has {len(self.files[hidden[0]])} images but is hidden. "
                "If it is a class, rename it without the leading dot; if not, move it elsewhere."
            )
        if len(self.loose) > sum(map(len, self.files.values())):
            raise StreamError(
                f"{self.place} has images but no class folders: put those of each class into a folder with its name, "
                f"{self.path('robin', '1.jpg')}."
            )

    def warn_of_skipped(self, used: Collection[str]) -> None:
        """Warns about every skipped folder and image, so that no data is lost silently."""
        rest = [name for name in self.folders if name not in used]
        if rest:
            logger.warning("%s: skipping the folders %s, which have no class folders.", self.place, _listed(rest))
        if self.empty:
            logger.warning("%s: skipping the folders %s, which have no images.", self.place, _listed(self.empty))
        if self.loose:
            logger.warning("%s: skipping images outside of class folders: %s.", self.place, _listed(self.loose))

    def tell_of_nested(self) -> None:
        """Says which folders below classes are taken as a part of these, as they could be the classes."""
        deep = {name: sorted({path[0] for path in self.files[name] if len(path) > 1}) for name in self.folders}
        nested = [name for name, below in deep.items() if below]
        if nested:
            name, more = nested[0], f"; so are those below {len(nested) - 1} more" if len(nested) > 1 else ""
            several = len(deep[name]) > 1
            logger.warning(
                "%s: images in the folder%s %s below %r are taken as %s%s. If %s, give %s.",
                self.place,
                "s" * several,
                _listed(deep[name]),
                name,
                name,
                more,
                "they are classes" if several else "it is a class",
                self.path(name),
            )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(map(repr, names[:MAX_LISTED])) + more
