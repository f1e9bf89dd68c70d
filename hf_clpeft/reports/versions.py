"""Versions of the libraries that results depend on."""

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
    versions = {}
    for name in VERSIONED:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    return versions
