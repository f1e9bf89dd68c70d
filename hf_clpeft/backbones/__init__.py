"""The frozen vision backbone that all experts share: loading, image reading and preprocessing."""

from .backbone import Backbone
from .errors import BackboneError
from .loading import hash_weights, load_backbone
from .transform import ImageTransform


__all__ = ["Backbone", "BackboneError", "ImageTransform", "hash_weights", "load_backbone"]
