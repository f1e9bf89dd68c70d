"""Which expert an image goes to."""

from .keys import KeyRouter
from .prototypes import PrototypeRouter, Routing


__all__ = ["KeyRouter", "PrototypeRouter", "Routing"]
