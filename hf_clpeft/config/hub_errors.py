"""Errors of the Hub, translated into messages that say what to do."""

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

from .errors import HfClpeftError


# The base error of httpx or httpx2, whichever the installed huggingface_hub is built on.
HTTPError: type[Exception] = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
NOT_CACHED = (LocalEntryNotFoundError, RevisionResolutionError)  # their __cause__ says why the download failed

CLIENT_ERRORS = (HTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, *NOT_CACHED)


class HubError(HfClpeftError, RuntimeError):
    """The Hub cannot be reached, denies a request, or holds something unexpected.

    Args:
        message (`str`): What happened and what to do.
        transient (`bool`, *optional*, defaults to `False`): Whether a retry may succeed.

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
    """An upload to the Hub's storage, or a download from it, failed."""


@contextmanager
def transferring() -> Iterator[None]:
    """Inside of [`explained`], around calls that only upload or download: every error there is a failed transfer.

    hf-xet has no exceptions of its own; it raises builtin ones, even plain `RuntimeError`. By default it retries for
    eight minutes; here for half a minute, unless its variable is set before the first transfer.
    """
    os.environ.setdefault("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "3")
    try:
        yield
    except CLIENT_ERRORS:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error.__cause__, HTTPError):
            raise error.__cause__ from error  # the storage's answer
        of_this_disk = getattr(error, "errno", None) is not None
        if of_this_disk and not isinstance(error, ConnectionError | TimeoutError):
            raise
        raise _TransferError(str(error)) from error


@contextmanager
def explained(doing: str, repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Context manager: turns errors of `huggingface_hub` into [`HubError`] with the message "Cannot `doing` REPO"."""
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
    """The error in words, and whether a retry may succeed."""
    no_folder = "" if pushes else "there is no such folder, and "
    if isinstance(error, HFValidationError):
        return f"{no_folder}it is not a valid repo id. {error}", False
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token. Log in with `hf auth login` or pass token=.", False
    if isinstance(error, RevisionNotFoundError):
        return f"the repo has no revision {revision!r}.", False
    if isinstance(error, HfHubHTTPError):
        return _explain_answer(error, pushes, repo_id, no_folder)
    if pushes:
        hint = "so nothing was pushed. A saved model can be pushed later: hf-clpeft push FOLDER REPO."
    else:
        hint = "and the files are not in the cache. Try again online, or pass a folder."
    if isinstance(error, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE=1 forbids requests to {constants.ENDPOINT}, {hint}", False
    if isinstance(error, _TransferError):
        return (
            f"the storage of {constants.ENDPOINT} cannot be reached ({_first_line(error)}), {hint} If only Xet is "
            "blocked, set HF_HUB_DISABLE_XET=1."
        ), False
    if isinstance(error, HTTPError | ConnectionError | TimeoutError):
        return f"{constants.ENDPOINT} cannot be reached ({type(error).__name__}), {hint}", True
    if isinstance(error, NOT_CACHED):
        return "it is not in the cache, and local_files_only=True forbids a download.", False
    return f"{constants.ENDPOINT} does not answer like a Hub ({_first_line(error)}), {hint}", False


def _explain_answer(error: HfHubHTTPError, pushes: bool, repo_id: str, no_folder: str) -> tuple[str, bool]:
    status, sent_token = error.response.status_code, _sent_token(error)
    if isinstance(error, GatedRepoError):
        return (
            f"the repo is gated (the Hub answers {status}). Accept its terms on "
            f"{constants.ENDPOINT}/{repo_id}, and log in here as the same user with `hf auth login` or pass token=."
        ), False
    if isinstance(error, RepositoryNotFoundError) and not (sent_token and status == 401):
        access = "the token has no access to it" if sent_token else "you are not logged in"
        return (
            f"{no_folder}{constants.ENDPOINT} has no such model repo, or it is private and {access} (it answers "
            f"{status}). Check the name, or log in with `hf auth login` or pass token=."
        ), False
    return answer_in_words(error, pushes), status >= 500 or status in (408, 412, 429)


def answer_in_words(error: HfHubHTTPError, pushes: bool = False) -> str:
    """An HTTP error of the Hub, on a read or write request, in words: status, message, and what to do."""
    status = error.response.status_code
    said = f"the Hub answers {status} ({error.server_message or _first_line(error)})."
    if isinstance(error, DisabledRepoError):
        return f"{said} The repo has been disabled by the Hub."
    right = "write" if pushes else "read"
    valid = "The token is not valid; log in with `hf auth login`."
    hint = {
        401: valid if _sent_token(error) else "Log in with `hf auth login`.",
        403: f"The token has no {right} access; pass one that has, made in the Hub's settings.",
        412: "The branch has moved in the meantime.",
    }.get(status, "Try again later." if status >= 500 or status == 429 else "")
    return f"{said} {hint}".rstrip()


def _sent_token(error: HfHubHTTPError) -> bool:
    return "authorization" in error.response.request.headers


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
