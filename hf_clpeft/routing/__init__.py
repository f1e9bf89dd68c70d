"""Which expert an image goes to."""

from .classes import ClassMeanRouter, ClassRouter
from .gaussian import GaussianRouter
from .keys import KeyRouter
from .prototypes import PrototypeRouter
from .ridge import RidgeRouter
from .routing import Routing


__all__ = [
    "ClassMeanRouter",
    "ClassRouter",
    "GaussianRouter",
    "KeyRouter",
    "PrototypeRouter",
    "RidgeRouter",
    "Routing",
]
