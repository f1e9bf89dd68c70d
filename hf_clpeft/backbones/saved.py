"""The backbone of a saved model: the same weights, and the same pixels to the bit."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import BackboneConfig, ConfigError
from ..config.repos import split_revision
from .backbone import Backbone
from .errors import BackboneError
from .loading import load_backbone
from .transform import ImageTransform


if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor


def load_saved_backbone(
    saved: BackboneConfig,
    processor: "BaseImageProcessor",
    elsewhere: str | None,
    name_or_path: str | Path,
    **options: Any,
) -> Backbone:
    """The backbone that a model was trained on, with the image processor that it was trained with.

    Args:
        saved ([`BackboneConfig`]): What the model says of it.
        processor (`transformers.BaseImageProcessor`): What the model was saved with.
        elsewhere (`str`, *optional*): Where the backbone is now, when not where it was; `@` and a revision may follow.
        name_or_path (`str` or `Path`): The model, for the message.
        options: As for [`load_backbone`].

    Returns:
        [`Backbone`]

    Raises:
        [`BackboneError`]: It cannot be loaded, or has other weights.
        [`ConfigError`]: The model's own files disagree about the size of pictures.
    """
    name, revision = split_revision(elsewhere) if elsewhere else (saved.name_or_path, None)
    if revision is None and name == saved.name_or_path:  # no other repo has that commit: there the weights vouch
        revision = saved.revision
    backbone = load_backbone(name, revision, processor=processor, **options)
    if backbone.config.image_size != saved.image_size:
        raise ConfigError(
            f"{name_or_path} contradicts itself: its configuration says image_size={saved.image_size}, and its image "
            f"processor makes pictures of {backbone.config.image_size} px."
        )
    check_backbone(backbone, saved, processor, name_or_path)
    return backbone


def check_backbone(
    backbone: Backbone, saved: BackboneConfig, processor: "BaseImageProcessor", name_or_path: str | Path
) -> None:
    """Raises [`BackboneError`] unless a backbone is the one that a model was trained on, pixel for pixel.

    Args:
        backbone ([`Backbone`]): The one at hand.
        saved ([`BackboneConfig`]): What the model says of its own.
        processor (`transformers.BaseImageProcessor`): What the model was saved with.
        name_or_path (`str` or `Path`): The model, for the message.
    """
    if backbone.config.weight_hash != saved.weight_hash:
        raise BackboneError(
            f"The weights of backbone {backbone.config.name_or_path!r} hash to "
            f"{backbone.config.weight_hash[:12]}…, but {name_or_path} was trained on "
            f"{saved.name_or_path!r} with {saved.weight_hash[:12]}…. Pass the right one with backbone=."
        )
    if backbone.config.image_size != saved.image_size:
        raise BackboneError(
            f"{name_or_path} was trained on images of {saved.image_size} px, but the backbone takes "
            f"{backbone.config.image_size} px."
        )
    other = backbone.transform.differs_from(ImageTransform(processor, backbone.transform.channels))
    if other:
        raise BackboneError(
            f"{name_or_path} was trained on pictures that were resized or normalised in another way than the "
            f"backbone does that was passed: {', '.join(other)} differ. Pass the backbone's name or folder in its "
            "place, and it gets the image processor that was saved."
        )
