"""Which expert an image goes to."""

from .prototypes import PrototypeRouter, Routing


__all__ = ["PrototypeRouter", "Routing"]
