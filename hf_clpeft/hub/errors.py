"""What can go wrong between here and the Hub, in words that say what to do."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from ..config.errors import HfClpeftError


# Of the library that the installed client is built on: httpx or httpx2.
HTTPError: type[Exception] = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
NOT_CACHED = (LocalEntryNotFoundError, RevisionResolutionError)  # their cause says why not from the Hub either

CLIENT_ERRORS = (HTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, *NOT_CACHED)


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


class _TransferError(Exception):
    """Files could not be carried to the Hub's storage or from it."""


@contextmanager
def transferring() -> Iterator[None]:
    """Inside of [`explained`], around calls that do nothing but move files: there, any error is one of moving them.

    hf-xet has no errors of its own: it raises builtin ones, plain `RuntimeError` among them. By itself it tries again
    for eight minutes; here for half a minute, unless its variable says otherwise when its first transfer begins.
    """
    os.environ.setdefault("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "3")
    try:
        yield
    except CLIENT_ERRORS:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error.__cause__, HTTPError):
            raise error.__cause__ from error  # what the storage said
        of_this_disk = getattr(error, "errno", None) is not None
        if of_this_disk and not isinstance(error, ConnectionError | TimeoutError):
            raise
        raise _TransferError(str(error)) from error


@contextmanager
def explained(doing: str, repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turns the errors of `huggingface_hub` inside this context into [`HubError`].

    Args:
        doing (`str`): What is being done, for the message: `"push to"`, `"load"`.
        repo_id (`str`): The repo.
        revision (`str`, *optional*): Its revision.
    """
    try:
        yield
    except (*CLIENT_ERRORS, ConnectionError, TimeoutError, _TransferError) as error:
        reason: BaseException = error
        while isinstance(reason, NOT_CACHED) and reason.__cause__ is not None:
            reason = reason.__cause__
        where = f"{repo_id}@{revision}" if revision else repo_id
        what, transient = _explain(reason, doing == "push to", repo_id, revision)
        raise HubError(f"Cannot {doing} {where}: {what}", transient) from error


def _explain(error: BaseException, pushes: bool, repo_id: str, revision: str | None) -> tuple[str, bool]:
    """What an error means, and whether it may pass."""
    no_folder = "" if pushes else "there is no such folder, and "
    if isinstance(error, HFValidationError):
        return f"{no_folder}it is no repo id. {error}", False
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token. Log in with `hf auth login` or pass token=.", False
    if isinstance(error, RevisionNotFoundError):
        return f"the repo has no revision {revision!r}.", False
    if isinstance(error, HfHubHTTPError):
        return _explain_answer(error, pushes, repo_id, no_folder)
    if pushes:
        hint = "so nothing was pushed. What is in a folder can be pushed later: hf-clpeft push FOLDER REPO."
    else:
        hint = "and what is needed is not in the cache. Try again with a network, or pass a folder."
    if isinstance(error, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE=1 forbids to ask {constants.ENDPOINT}, {hint}", False
    if isinstance(error, _TransferError):
        return (
            f"the storage of {constants.ENDPOINT} cannot be reached ({_first_line(error)}), {hint} Where only Xet is "
            "kept out, HF_HUB_DISABLE_XET=1 goes another way."
        ), False
    if isinstance(error, HTTPError | ConnectionError | TimeoutError):
        return f"{constants.ENDPOINT} cannot be reached ({type(error).__name__}), {hint}", True
    if isinstance(error, NOT_CACHED):
        return "it is not in the cache, and local_files_only=True forbids to ask the Hub.", False
    return f"{constants.ENDPOINT} does not answer as a Hub does ({_first_line(error)}), {hint}", False


def _explain_answer(error: HfHubHTTPError, pushes: bool, repo_id: str, no_folder: str) -> tuple[str, bool]:
    status, sent_token = error.response.status_code, _sent_token(error)
    if isinstance(error, GatedRepoError):
        return (
            f"its owners ask everybody to accept their terms (the Hub answers {status}). Do so on "
            f"{constants.ENDPOINT}/{repo_id}, and log in here as the same user with `hf auth login` or pass token=."
        ), False
    if isinstance(error, RepositoryNotFoundError) and not (sent_token and status == 401):
        access = "the token has no access to it" if sent_token else "you are not logged in"
        return (
            f"{no_folder}{constants.ENDPOINT} has no such model repo, or it is private and {access} (it answers "
            f"{status}). Look at the name; log in with `hf auth login` or pass token=."
        ), False
    return answer_in_words(error, pushes), status >= 500 or status in (408, 412, 429)


def answer_in_words(error: HfHubHTTPError, pushes: bool = False) -> str:
    """What the Hub's refusal means, whatever was asked for.

    Args:
        error (`HfHubHTTPError`): The refusal.
        pushes (`bool`, *optional*, defaults to `False`): Whether something was to be written.
    """
    status = error.response.status_code
    said = f"the Hub answers {status} ({error.server_message or _first_line(error)})."
    if isinstance(error, DisabledRepoError):
        return f"{said} The repo has been disabled by the Hub."
    right = "write there; make one with write access" if pushes else "read it; make one that may"
    valid = "The token is not valid; log in with `hf auth login`."
    hint = {
        401: valid if _sent_token(error) else "Log in with `hf auth login`.",
        403: f"The token may not {right} at the Hub's settings and pass it.",
        412: "Somebody else has pushed in the meantime.",
    }.get(status, "Try again later." if status >= 500 or status == 429 else "")
    return f"{said} {hint}".rstrip()


def _sent_token(error: HfHubHTTPError) -> bool:
    return "authorization" in error.response.request.headers


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
