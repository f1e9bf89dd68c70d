"""A folder that changes as a whole or not at all, whenever the process is killed."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import ConfigError


STAGING, READY, LOCK = ".saving", ".saved", ".lock"
REMOVED = ".removed.json"


@contextmanager
def changing(folder: str | Path, num_bytes: int = 0) -> Iterator[Path]:
    """Gives an empty folder to write into; its files go to `folder` together, when the context ends without an error.

    What is written is complete on disk before its folder is renamed, and that rename is the moment of change: a
    process that dies before it leaves `folder` as it was, one that dies after it leaves the rest to [`settle`].

    Args:
        folder (`str` or `Path`): Made if needed. Files of other names in it stay.
        num_bytes (`int`, *optional*, defaults to 0): How much will be written; looked for before anything is.

    Yields:
        `Path`: Where to write. Paths inside are those in `folder`.

    Raises:
        `OSError`: It cannot be written, for example because the disk is full; `folder` is as it was.

    Example:

    ```py
    >>> from pathlib import Path
    >>> from hf_clpeft.folder import changing

    >>> with changing("model") as staging:
    ...     _ = (staging / "config.json").write_text("{}")
    >>> Path("model/config.json").read_text()
    '{}'

    ```
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        settle(folder)
        staging = folder / STAGING
        shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
        free = shutil.disk_usage(folder).free
        if free < num_bytes:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {num_bytes:,} bytes needed, {free:,} free")
        staging.mkdir()
        yield staging
        for path in _files(staging):
            _to_disk(path)
        os.rename(staging, folder / READY)
        _to_disk(folder)
        settle(folder)
    except OSError as error:
        raise OSError(
            error.errno, f"{folder} could not be saved and stays as it was: {error.strerror or error}"
        ) from error
    finally:
        shutil.rmtree(folder / STAGING, ignore_errors=True)


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keeps other processes out of a folder inside this context; the lock of a process that dies is free at once.

    Args:
        folder (`str` or `Path`): Made if needed.

    Raises:
        [`ConfigError`]: Another process has it.
        `OSError`: It cannot be written into.

    Example:

    ```py
    >>> from hf_clpeft.folder import locked

    >>> with locked("out"):
    ...     pass

    ```
    """
    folder = Path(folder)
    lock = FileLock(folder / LOCK, timeout=0)
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


def remove_with(staging: Path, paths: Iterable[str]) -> None:
    """Lets a change take away files, or folders, that `folder` has."""
    (staging / REMOVED).write_text(json.dumps(sorted(paths)), encoding="utf-8")


def settle(folder: str | Path) -> None:
    """Ends a change that a killed process had begun. To be called before `folder` is read."""
    folder, ready = Path(folder), Path(folder, READY)
    if not ready.is_dir():
        return
    removed = ready / REMOVED
    for name in json.loads(removed.read_text(encoding="utf-8")) if removed.is_file() else []:
        target = folder / name
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
    for path in _files(ready):
        if path != removed:
            target = folder / path.relative_to(ready)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    shutil.rmtree(ready)


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _to_disk(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # where folders cannot be opened
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
