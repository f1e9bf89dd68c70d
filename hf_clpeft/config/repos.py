"""Names of repos on the Hub, as users and strangers write them."""

from pathlib import Path

from .errors import ConfigError


def split_revision(name: str) -> tuple[str, str | None]:
    """Splits `me/model@task-003` into repo id and revision. The path of an existing folder is returned as it is.

    Example:

    ```py
    >>> from hf_clpeft.config.repos import split_revision

    >>> split_revision("me/model@task-003")
    ('me/model', 'task-003')

    ```
    """
    if Path(name).exists() or "@" not in name:
        return name, None
    repo_id, revision = name.rsplit("@", 1)
    return repo_id, revision


def check_repo_id(name: str, where: str | Path) -> None:
    """Checks that a downloaded model names its backbone by repo id: a path would lead to a folder of this machine.

    Raises:
        [`ConfigError`]: The name is not a repo id.

    Example:

    ```py
    >>> from hf_clpeft.config.repos import check_repo_id

    >>> check_repo_id("google/vit-base-patch16-224-in21k", "me/digits")

    ```
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ConfigError(
            f"{where} names its backbone by a path, {name!r}, which is on its author's disk. Pass backbone= "
            "(--backbone on a command line) with the repo id or folder where you have it."
        ) from None
