"""What is refused about a backbone."""

from ..config.errors import HfClpeftError


class BackboneError(HfClpeftError, ValueError):
    """A backbone that cannot be used, or is not the one that was asked for.

    Example:

    ```py
    >>> from hf_clpeft import BackboneError, load_backbone

    >>> try:
    ...     load_backbone("hf-clpeft/vit-tiny-glyphs", image_size=33)
    ... except BackboneError as error:
    ...     print(error)
    image_size=33 is no multiple of the patch size 8; try 32.

    ```
    """
