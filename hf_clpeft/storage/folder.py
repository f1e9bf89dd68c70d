"""Atomic changes of a folder: either all of its files change or none, even if the process is killed.

The folder may come from a stranger. So nothing outside of it is touched: paths are checked, symlinks inside it are not
followed, and reading it changes nothing.
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
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from ..config.checks import check_path, read_json
from ..config.errors import ConfigError


STAGING, READY, LOCK = ".saving", ".saved", ".lock"
REMOVED = ".removed.json"
DEEPEST = 8  # nested folders


class Version(NamedTuple):
    """What changes whenever a file does, and not if it is moved."""

    device: int
    inode: int
    size: int
    modified: int


@contextmanager
def atomic(folder: str | Path, num_bytes: int = 0) -> Iterator[Path]:
    """Yields an empty staging folder, whose files move to `folder` atomically if the context ends without an error.

    The files are synced to disk, then the staging folder is renamed, which commits the change: a process killed before
    leaves `folder` as it was; if it is killed after, [`recover`] finishes the change.

    Args:
        folder (`str` or `Path`): Created if missing. Its other files are kept.
        num_bytes (`int`, *optional*, defaults to 0): Free space to require before anything is written.

    Yields:
        `Path`: The staging folder; paths in it are those in `folder`.

    Raises:
        `OSError`: Writing failed, for example because the disk is full; `folder` is as it was.
        [`ConfigError`]: A path to write leads through a symlink in `folder`.

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
        _delete(staging)  # left by a killed process
        check_free_space(folder, num_bytes)
        staging.mkdir()
        yield staging
        _read_change(folder, staging)
        for name in _walk(staging):
            _fsync(staging / name)
        os.rename(staging, folder / READY)
        _fsync(folder)
        recover(folder)
    except (OSError, SafetensorError) as error:
        number, text = _errno_and_text(error)
        raise OSError(number, f"{folder} could not be saved and stays as it was: {text}") from error
    finally:
        if _is_folder(folder / STAGING):
            shutil.rmtree(folder / STAGING, ignore_errors=True)


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Context manager: holds the lock file of a folder, which is created if missing, until exit or process death.

    Raises:
        [`ConfigError`]: Another process holds the lock, or the lock file is a symlink.
        `OSError`: The folder is not writable.

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
    """Joins a folder and a path in it that is to be written or deleted. Only the folder itself may be a symlink.

    Raises:
        [`ConfigError`]: A part of the path is a symlink.

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
                f"{path} is a symbolic link, and nothing is written or deleted behind one. Replace it "
                "with its target, or choose another folder."
            )
    return path


def remove_with(staging: Path, paths: Iterable[str]) -> None:
    """Lists the files and folders that a change deletes."""
    (staging / REMOVED).write_text(json.dumps({"removed": sorted(paths)}), encoding="utf-8")


def unfinished_change(folder: str | Path) -> tuple[list[str], list[str]] | None:
    """The rest of a committed change whose process was killed; `None` if there is none.

    Returns:
        Paths in `folder` to delete, and paths of the files to move into it.

    Raises:
        [`ConfigError`]: The change is invalid or leads outside of the folder.

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
    """Finishes a committed change whose process was killed. For writers of `folder`; readers use
    [`hf_clpeft.storage.model_files.as_saved`].

    Raises:
        [`ConfigError`]: The change is invalid or leads outside of the folder. Nothing is touched.
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


def check_free_space(folder: Path, num_bytes: int) -> None:
    """Raises `OSError` as on a full disk if there is not enough free space."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {num_bytes:,} bytes needed, {free:,} free")


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_hash(path: str | Path) -> str:
    """SHA-256 of a file, cached until the file changes, so that a save does not read all earlier experts again.

    Empty if it is no file.
    """
    version = version_of(path)
    if version is None:
        return ""
    if version not in _hashes:
        _hashes[version] = hash_file(path)
    return _hashes[version]


def version_of(path: str | Path) -> Version | None:
    """The [`Version`] of a file; `None` if it is none."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    is_file = stat.S_ISREG(status.st_mode)
    return Version(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns) if is_file else None


_hashes: dict[Version, str] = {}


def _read_change(folder: Path, change: Path) -> tuple[list[str], list[str]]:
    """Paths to delete and paths to move in, after checking that all stay inside the folder and can be written."""
    if not _is_folder(change):
        raise ConfigError(f"{change.name} is not a folder.")
    names = list(_walk(change))
    removed: Any = []
    if REMOVED in names:
        names.remove(REMOVED)
        removed = read_json(change / REMOVED).get("removed")
        if not isinstance(removed, list) or not all(isinstance(path, str) for path in removed):
            raise ConfigError(f"{REMOVED} does not hold a list of paths.")
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
    """Sorted paths of all files in a folder. Raises on anything but regular files and folders."""
    for path in sorted(folder.iterdir()):
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode) and prefix.count("/") < DEEPEST:
            yield from _walk(path, f"{prefix}{path.name}/")
        elif stat.S_ISREG(mode):
            yield prefix + path.name
        else:
            raise ConfigError(f"{prefix}{path.name} is neither a regular file nor a folder, or is nested too deeply.")


def _is_folder(path: Path) -> bool:
    """Whether a path is a folder and not a symlink to one."""
    return path.is_dir() and not path.is_symlink()


def _delete(path: Path) -> None:
    """Deletes a file, a folder or a symlink, never the target of a symlink."""
    if _is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _errno_and_text(error: OSError | SafetensorError) -> tuple[int | None, str]:
    """Error number and text of the operating system, also if safetensors wraps them in its own error."""
    if isinstance(error, OSError):
        return error.errno, error.strerror or str(error)
    number = re.search(r"\(os error (\d+)\)", str(error))
    return (None, str(error)) if number is None else (int(number[1]), os.strerror(int(number[1])))


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
