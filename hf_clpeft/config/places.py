"""Where a model goes, as users write it: a folder of this machine, or a repo on the Hub."""

from pathlib import Path
from typing import NamedTuple

from .errors import ConfigError


class Place(NamedTuple):
    """A folder or a repo.

    Args:
        name (`str`): Path or repo id.
        is_repo (`bool`): Which of the two.
        why (`str`): Why it was taken for that.
    """

    name: str
    is_repo: bool
    why: str


def find_place(name: str) -> Place:
    """Decides whether a name is a folder or a repo. Nothing is requested.

    An existing path is a folder, and so is what looks like one: it begins with `.`, `/` or `~`, or does not have
    exactly one slash. `me/birds` is a repo unless there is such a folder.

    Raises:
        [`ConfigError`]: It looks like a repo id, and is not valid as one.

    Example:

    ```py
    >>> from hf_clpeft.config.places import find_place

    >>> find_place("me/birds")
    Place(name='me/birds', is_repo=True, why='it reads OWNER/NAME, and there is no such folder; for one: ./me/birds')
    >>> find_place("./birds").why
    "it begins with '.'"

    ```
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    path = Path(name).expanduser()
    if path.exists():
        what = "folder" if path.is_dir() else "file"
        return Place(str(path), False, f"there is such a {what} here")
    if name.startswith((".", "/", "~")):
        return Place(str(path), False, f"it begins with {name[0]!r}")
    if path.is_absolute() or "\\" in name or name.count("/") != 1 or name.endswith("/"):
        return Place(str(path), False, "it does not read OWNER/NAME, as a repo would")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"{name!r} is no valid repo id ({error}) For a folder, write ./{name}") from error
    return Place(name, True, f"it reads OWNER/NAME, and there is no such folder; for one: ./{name}")
