"""Pictures that a model carries if its owner wants so: small ones to explain routes, and examples to try it with.

`thumbnails/<task>.jpg` is a strip of square training pictures; `examples/<task>-<number>.jpg` is one picture each.
They are listed and hashed in `config.json` as all other files, and go with their task when it is unlearnt or combined.
No picture is decoded here: they may come from a stranger, and only who shows them needs them.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..config import ConfigError, ContinualConfig


THUMBNAILS, EXAMPLES = "thumbnails", "examples"
LARGEST_PICTURE = 2**19  # bytes of a file
MOST_PICTURES = 10_000

Pictures = dict[str, bytes]  # content of files, by their path in the model's folder


def thumbnails_file(task: str) -> str:
    """Path of the strip of small training pictures of a task."""
    return f"{THUMBNAILS}/{task}.jpg"


def example_file(task: str, number: int) -> str:
    """Path of an example picture of a task."""
    return f"{EXAMPLES}/{task}-{number}.jpg"


def task_of(path: str) -> str | None:
    """Name of the task whose picture has this path; `None` if it is that of no picture.

    Example:

    ```py
    >>> from hf_clpeft.storage.pictures import task_of

    >>> task_of("thumbnails/task-000.jpg"), task_of("examples/task-000-7.jpg"), task_of("heads.safetensors")
    ('task-000', 'task-000', None)

    ```
    """
    found = re.fullmatch(rf"{THUMBNAILS}/([^/]+)\.jpg|{EXAMPLES}/([^/]+)-\d+\.jpg", path)
    return None if found is None else found[1] or found[2]


def of_tasks(pictures: Mapping[str, bytes], renamed: Mapping[str, str]) -> Pictures:
    """Pictures of some tasks, whose names may have changed.

    Args:
        pictures (`dict[str, bytes]`): Content by path.
        renamed (`dict[str, str]`): New names of the tasks to keep, by their old ones.

    Example:

    ```py
    >>> from hf_clpeft.storage.pictures import of_tasks

    >>> of_tasks({"thumbnails/a.jpg": b"1", "examples/b-0.jpg": b"2"}, {"b": "mine-b"})
    {'examples/mine-b-0.jpg': b'2'}

    ```
    """
    found = {}
    for path, content in pictures.items():
        task = task_of(path)
        if task is not None and task in renamed:
            folder, name = path.split("/")
            found[f"{folder}/{renamed[task]}{name[len(task) :]}"] = content
    return found


def check_listed(paths: Iterable[str]) -> None:
    """Raises [`ConfigError`] if a configuration lists more pictures than anyone would look at."""
    count = sum(task_of(path) is not None for path in paths)
    if count > MOST_PICTURES:
        raise ConfigError(f"The model lists {count:,} pictures; at most {MOST_PICTURES:,} are read.")


def check_size(path: str, size: int) -> None:
    """Raises [`ConfigError`] if a picture is too large for one that was made to be carried."""
    if task_of(path) is not None and size > LARGEST_PICTURE:
        raise ConfigError(
            f"{path} has {size:,} bytes, and a picture of a model at most {LARGEST_PICTURE:,}. Save it smaller."
        )


def read_pictures(folder: Path, config: ContinualConfig) -> Pictures:
    """Content of the pictures in a folder that [`check_files`] has accepted."""
    return {path: (folder / path).read_bytes() for path in config.files if task_of(path) is not None}
