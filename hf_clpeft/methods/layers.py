"""Layers of a backbone that options choose, and those of the papers, in proportion to its depth."""

from ..config import ConfigError


PAPER = 12  # layers of the ViT-B/16 that papers choose layers of


def scaled(count: int, num_layers: int) -> int:
    """As many of the first layers as `count` of 12, at least one; half a layer counts as one.

    Example:

    ```py
    >>> from hf_clpeft.methods.layers import scaled

    >>> [scaled(5, num_layers) for num_layers in (2, 6, 12, 24)]
    [1, 3, 5, 10]

    ```
    """
    return max(1, (2 * count * num_layers + PAPER) // (2 * PAPER))


def check_chosen(option: str, chosen: list[int] | None, num_layers: int | None = None) -> None:
    """Raises [`ConfigError`] unless the layers of an option rise from 1, up to the last of the backbone if known."""
    if chosen is None:
        return
    if not chosen or chosen[0] < 1 or chosen != sorted(set(chosen)):
        raise ConfigError(f"{option}={chosen} must be layers from 1, rising.")
    if num_layers is not None and chosen[-1] > num_layers:
        raise ConfigError(f"{option}={chosen}, but the backbone has {num_layers} layers.")


def check_layers(option: str, layers: list[int] | None) -> None:
    """Raises [`ConfigError`] unless the layers of an option rise."""
    if layers is not None and (not layers or 0 in layers or layers != sorted(set(layers))):
        raise ConfigError(f"{option}={layers} must be layers from 1, or from -1 down, rising.")
