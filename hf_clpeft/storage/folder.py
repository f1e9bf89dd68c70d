"""A folder that changes as a whole or not at all, whenever the process is killed.

A folder may come from a stranger. So nothing is touched that lies outside of it: names are checked, no symbolic link
inside it is followed, and who only reads it changes nothing.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from ..config.checks import check_path, read_json
from ..config.errors import ConfigError


STAGING, READY, LOCK = ".saving", ".saved", ".lock"
REMOVED = ".removed.json"
DEEPEST = 8  # folders in each other


@contextmanager
def atomic(folder: str | Path, num_bytes: int = 0) -> Iterator[Path]:
    """Gives an empty folder to write into; its files go to `folder` together, when the context ends without an error.

    What is written is complete on disk before its folder is renamed, and that rename is the moment of change: a
    process that dies before it leaves `folder` as it was, one that dies after it leaves the rest to [`recover`].

    Args:
        folder (`str` or `Path`): Made if needed. Files of other names in it stay.
        num_bytes (`int`, *optional*, defaults to 0): How much will be written; looked for before anything is.

    Yields:
        `Path`: Where to write. Paths inside are those in `folder`.

    Raises:
        `OSError`: It cannot be written, for example because the disk is full; `folder` is as it was.
        [`ConfigError`]: A symbolic link in `folder` is in the way.

    Example:

    ```py
    >>> from pathlib import Path
    >>> from hf_clpeft.storage.folder import atomic

    >>> with atomic("model") as staging:
    ...     _ = (staging / "config.json").write_text("{}")
    >>> Path("model/config.json").read_text()
    '{}'

    ```
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        recover(folder)
        staging = folder / STAGING
        _delete(staging)  # of a process that was killed
        free = shutil.disk_usage(folder).free
        if free < num_bytes:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {num_bytes:,} bytes needed, {free:,} free")
        staging.mkdir()
        yield staging
        _read_change(folder, staging)
        for name in _walk(staging):
            _to_disk(staging / name)
        os.rename(staging, folder / READY)
        _to_disk(folder)
        recover(folder)
    except (OSError, SafetensorError) as error:
        number, text = _why(error)
        raise OSError(number, f"{folder} could not be saved and stays as it was: {text}") from error
    finally:
        if _is_folder(folder / STAGING):
            shutil.rmtree(folder / STAGING, ignore_errors=True)


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keeps other processes out of a folder inside this context; the lock of a process that dies is free at once.

    Args:
        folder (`str` or `Path`): Made if needed.

    Raises:
        [`ConfigError`]: Another process has it, or its lock is a symbolic link.
        `OSError`: It cannot be written into.

    Example:

    ```py
    >>> from hf_clpeft.storage.folder import locked

    >>> with locked("out"):
    ...     pass

    ```
    """
    folder = Path(folder)
    lock = FileLock(safe_path(folder, LOCK), timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"Another run is writing into {folder}. Wait for it, stop it, or choose another output_dir."
        ) from None
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}. Nothing was begun; choose another output_dir", str(folder)
        ) from error
    try:
        yield
    finally:
        lock.release()


def safe_path(folder: str | Path, name: str) -> Path:
    """A place in a folder to write to or to delete in, which no symbolic link leads out of that folder.

    Args:
        folder (`str` or `Path`): May be a link itself: whoever named it meant it.
        name (`str`): Path in it.

    Returns:
        `Path`

    Raises:
        [`ConfigError`]: A part of the path is a symbolic link.

    Example:

    ```py
    >>> from hf_clpeft.storage.folder import safe_path

    >>> safe_path("out", "checkpoints").as_posix()
    'out/checkpoints'

    ```
    """
    path = Path(folder)
    for part in name.split("/"):
        path = path / part
        if path.is_symlink():
            raise ConfigError(
                f"{path} is a symbolic link, and nothing is written or deleted behind one. Put what it leads to in "
                "its place, or choose another folder."
            )
    return path


def remove_with(staging: Path, paths: Iterable[str]) -> None:
    """Lets a change take away files, or folders, that `folder` has."""
    (staging / REMOVED).write_text(json.dumps({"removed": sorted(paths)}), encoding="utf-8")


def unfinished_change(folder: str | Path) -> tuple[list[str], list[str]] | None:
    """What a change that a killed process had begun still has to do; `None` where there is none.

    Args:
        folder (`str` or `Path`): Only looked at.

    Returns:
        Paths in `folder` that are to go, and those of the files that are to come.

    Raises:
        [`ConfigError`]: It is no change of ours: it would reach out of the folder.

    Example:

    ```py
    >>> from hf_clpeft.storage.folder import atomic, unfinished_change

    >>> with atomic("model") as staging:
    ...     _ = (staging / "config.json").write_text("{}")
    >>> unfinished_change("model") is None
    True

    ```
    """
    folder, ready = Path(folder), Path(folder, READY)
    if not os.path.lexists(ready):
        return None
    try:
        return _read_change(folder, ready)
    except ConfigError as error:
        raise ConfigError(
            f"{ready} cannot be used and nothing was touched: {error} If you do not know what it is, delete it."
        ) from error


def recover(folder: str | Path) -> None:
    """Ends a change that a killed process had begun. For those who write into `folder`; who reads it takes
    [`hf_clpeft.storage.model_files.as_saved`].

    Raises:
        [`ConfigError`]: It is no change of ours: it would reach out of the folder. Nothing is touched.
    """
    folder, ready = Path(folder), Path(folder, READY)
    change = unfinished_change(folder)
    if change is None:
        return
    removed, names = change
    for name in removed:
        _delete(folder / name)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(ready / name, folder / name)
    shutil.rmtree(ready)


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_change(folder: Path, change: Path) -> tuple[list[str], list[str]]:
    """Names to remove and names to put in place, once each is known to stay inside the folder and find its place."""
    if not _is_folder(change):
        raise ConfigError(f"{change.name} is no folder.")
    names = list(_walk(change))
    removed: Any = []
    if REMOVED in names:
        names.remove(REMOVED)
        removed = read_json(change / REMOVED).get("removed")
        if not isinstance(removed, list) or not all(isinstance(path, str) for path in removed):
            raise ConfigError(f"{REMOVED} holds no list of paths.")
    for name in [*removed, *names]:
        parents = [parent.as_posix() for parent in Path(check_path(name)).parents][:-1]
        for parent in parents:
            if safe_path(folder, parent).exists() and not (folder / parent).is_dir():
                raise ConfigError(f"{folder / parent} is a file where a folder is needed.")
    for name in names:
        if _is_folder(folder / name):
            raise ConfigError(f"{folder / name} is a folder where a file is to be written.")
    return removed, names


def _walk(folder: Path, prefix: str = "") -> Iterator[str]:
    """Paths of the files below a folder, in order. There must be nothing but files and folders."""
    for path in sorted(folder.iterdir()):
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode) and prefix.count("/") < DEEPEST:
            yield from _walk(path, f"{prefix}{path.name}/")
        elif stat.S_ISREG(mode):
            yield prefix + path.name
        else:
            raise ConfigError(f"{prefix}{path.name} is neither a file nor a folder near the top.")


def _is_folder(path: Path) -> bool:
    """Whether it is a folder itself, not a link to one."""
    return path.is_dir() and not path.is_symlink()


def _delete(path: Path) -> None:
    """Deletes a file, a folder, or a link, but never what a link leads to."""
    if _is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _why(error: OSError | SafetensorError) -> tuple[int | None, str]:
    """Number and text of what the system said; safetensors wraps it in an error of its own."""
    if isinstance(error, OSError):
        return error.errno, error.strerror or str(error)
    number = re.search(r"\(os error (\d+)\)", str(error))
    return (None, str(error)) if number is None else (int(number[1]), os.strerror(int(number[1])))


def _to_disk(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # where folders cannot be opened
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
