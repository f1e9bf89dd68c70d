"""The frozen vision model that all experts share: its files, its weights, its pictures."""

from .backbone import Backbone
from .errors import BackboneError
from .loading import hash_weights, load_backbone
from .transform import ImageTransform


__all__ = ["Backbone", "BackboneError", "ImageTransform", "hash_weights", "load_backbone"]
