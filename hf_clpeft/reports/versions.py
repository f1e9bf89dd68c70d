"""Versions of the libraries that results depend on."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

from .. import __version__


OURS = "hf-clpeft"
VERSIONED = (OURS, "torch", "transformers", "peft", "accelerate", "datasets", "huggingface-hub")


def library_versions() -> dict[str, str]:
    """Versions by library: the installed ones, or, for this package in a source tree, its own; "unknown" for others.

    Example:

    ```py
    >>> from hf_clpeft.reports.versions import library_versions

    >>> "torch" in library_versions()
    True

    ```
    """
    return {name: _version(name) for name in VERSIONED}


@cache
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return __version__ if name == OURS else "unknown"
