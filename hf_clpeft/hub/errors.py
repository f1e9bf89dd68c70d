"""What can go wrong between here and the Hub, in words that say what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import HfClpeftError


class HubError(HfClpeftError, RuntimeError):
    """The Hub cannot be reached, refuses, or holds something else.

    Args:
        message (`str`): What happened and what to do.
        transient (`bool`, *optional*, defaults to `False`): The same call may work a little later.

    Example:

    ```py
    >>> from hf_clpeft import HubError

    >>> HubError("The Hub cannot be reached.", transient=True).transient
    True

    ```
    """

    def __init__(self, message: str, transient: bool = False):
        super().__init__(message)
        self.transient = transient


@contextmanager
def explained(doing: str, repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turns the errors of `huggingface_hub` inside this context into [`HubError`].

    Args:
        doing (`str`): What is being done, for the message: `"push to"`, `"load"`.
        repo_id (`str`): The repo.
        revision (`str`, *optional*): Its revision.
    """
    from httpx2 import TransportError
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        RevisionResolutionError,
    )

    where = f"{repo_id}@{revision}" if revision else repo_id
    try:
        yield
    except HFValidationError as error:
        raise HubError(f"Cannot {doing} {where!r}: there is no such folder, and it is no repo id. {error}") from error
    except RevisionNotFoundError as error:
        raise HubError(f"Cannot {doing} {where}: the repo has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"Cannot {doing} {where}: there is no such folder, and {constants.ENDPOINT} has no such model repo, or "
            "it is private and the token has no access to it. Log in with `hf auth login` or pass token=."
        ) from error
    except (RevisionResolutionError, LocalEntryNotFoundError, OfflineModeIsEnabled, TransportError) as error:
        hint = "and what is needed is not in the cache. Try again with a network, or pass a folder."
        if doing == "push to":
            hint = "so nothing was pushed. What is in a folder can be pushed later: hf-clpeft push FOLDER REPO."
        raise HubError(
            f"Cannot {doing} {where}: {constants.ENDPOINT} cannot be reached ({type(error).__name__}), {hint}",
            transient=isinstance(error, TransportError),
        ) from error
    except RuntimeError as error:  # how the client reports an upload that has failed
        if not isinstance(error.__cause__, HfHubHTTPError | TransportError):
            raise
        raise HubError(f"Cannot {doing} {where}: {error} Try again later.", transient=True) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = {
            401: "The token is not valid; log in with `hf auth login`.",
            403: "The token may not write there; make one with write access at the Hub's settings and pass it.",
            412: "Somebody else has pushed in the meantime.",
        }.get(status, "Try again later." if status >= 500 or status == 429 else "")
        said = error.server_message or str(error).splitlines()[0]
        raise HubError(
            f"Cannot {doing} {where}: the Hub answers {status} ({said}). {hint}".rstrip(),
            transient=status >= 500 or status in (408, 412, 429),
        ) from error
