"""Versions of the libraries that results depend on."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version


VERSIONED = ("hf-clpeft", "torch", "transformers", "peft", "accelerate", "datasets", "huggingface-hub")


def library_versions() -> dict[str, str]:
    """Installed versions by library; "unknown" for a source tree that is not installed.

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
        return "unknown"
