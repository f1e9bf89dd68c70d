"""Which pictures a command is given: files, folders, patterns, and lists on standard input."""

import glob
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import typer


STDIN = "-"


def find_pictures(sources: list[str]) -> Iterator[Path]:
    """Paths of pictures, found as they are needed.

    Args:
        sources (`list[str]`): Files; folders, of which all pictures are taken, those of folders in them too, sorted;
            patterns such as `"photos/*.jpg"`, for shells that do not expand them; or `-` for paths on standard input,
            one a line.

    Yields:
        `Path`: Existing files, but for those named on standard input.

    Raises:
        `typer.BadParameter`: There is no such file, or nothing in a folder is a picture. It is raised at the call,
            before the first path.
    """
    found = [_found(source) for source in sources]
    return (path for paths in found for path in paths)


def _found(source: str) -> Iterable[Path]:
    path = Path(source)
    if source == STDIN:
        return (Path(line.rstrip("\r\n")) for line in sys.stdin if line.strip())
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        return [path]
    matches = sorted(map(Path, glob.iglob(source, recursive=True))) if glob.has_magic(source) else []
    files = [match for match in matches if match.is_file()]
    if not files:
        raise typer.BadParameter(f"{source} is no file, no folder, and no pattern that a file matches.")
    return files


def _in_folder(folder: Path) -> list[Path]:
    from ..streams.folders import is_picture

    files = sorted(path for path in folder.rglob("*") if is_picture(path.name) and path.is_file())
    if not files:
        raise typer.BadParameter(f"There is no picture in the folder {folder}.")
    return files
