"""Errors about backbones."""

from ..config.errors import HfClpeftError


class BackboneError(HfClpeftError, ValueError):
    """A backbone that cannot be used, or does not match the one requested.

    Example:

    ```py
    >>> from hf_clpeft import BackboneError, load_backbone

    >>> try:
    ...     load_backbone("hf-clpeft/vit-tiny-glyphs", image_size=33)
    ... except BackboneError as error:
    ...     print(error)
    image_size=33 is not a multiple of the patch size 8; try 32.

    ```
    """


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 300 characters of it."""
    return (str(error).strip() or repr(error)).splitlines()[0][:300]
