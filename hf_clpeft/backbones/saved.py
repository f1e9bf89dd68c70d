"""Loads the backbone of a saved model, and checks that weights and preprocessing are bit-identical."""

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
    """Loads the backbone of a saved model, with the image processor of the model.

    Args:
        saved ([`BackboneConfig`]): The backbone in the model's configuration.
        processor (`transformers.BaseImageProcessor`): The image processor saved with the model.
        elsewhere (`str`, *optional*): Folder, repo id or `repo@revision` of the backbone, if it has moved.
        name_or_path (`str` or `Path`): The model, for error messages.
        options: As for [`load_backbone`].

    Raises:
        [`BackboneError`]: It cannot be loaded, or has other weights.
        [`ConfigError`]: The image sizes of the model's configuration and image processor differ.
    """
    name, revision = split_revision(elsewhere) if elsewhere else (saved.name_or_path, None)
    if (
        revision is None and name == saved.name_or_path
    ):  # commits are specific to a repo; elsewhere, the weight hash is checked
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
    """Raises [`BackboneError`] unless weights and preprocessing are those that a model was trained with."""
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
