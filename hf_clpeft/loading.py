"""A saved model and its backbone come together again: the same weights, and the same pixels to the bit."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .backbones import Backbone, BackboneError, ImageTransform, load_backbone
from .backbones.bundled import bundled_folder
from .backbones.processors import read_processor
from .config.errors import ConfigError
from .config.model import BackboneConfig, ContinualConfig
from .hub.download import check_repo_id, fetch_model, split_revision
from .storage.model_files import as_saved, check_files, load_into


if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor

    from .model import ContinualModel

Model = TypeVar("Model", bound="ContinualModel")


def load_model(
    model_class: type[Model],
    name_or_path: str | Path,
    backbone: str | Backbone | None,
    revision: str | None,
    how: dict[str, Any],
    hub_options: dict[str, Any],
) -> Model:
    """Loads a model whole, or not at all: the body of [`ContinualModel.from_pretrained`].

    Args:
        model_class (`type`): [`ContinualModel`], or a class made from it.
        name_or_path (`str` or `Path`): Folder, or repo id on the Hub.
        backbone (`str` or [`Backbone`], *optional*): Where the backbone is now, or the backbone itself.
        revision (`str`, *optional*): Branch, tag or commit of the model's repo.
        how (`dict`): `dtype` and `attn_implementation` of the backbone.
        hub_options (`dict`): `token`, `cache_dir`, `local_files_only`.

    Returns:
        [`ContinualModel`]
    """
    bundled = bundled_folder(str(name_or_path)) if revision is None else None  # only the Hub has revisions
    folder = bundled or Path(name_or_path)
    local = folder.is_dir()
    folder = as_saved(folder) if local else fetch_model(str(name_or_path), revision, **hub_options)
    config = ContinualConfig.load(folder)
    if not local and backbone is None:
        check_repo_id(config.backbone.name_or_path, name_or_path)
    check_files(folder, config, config.expert_names)
    processor = read_processor(folder, str(name_or_path))
    if isinstance(backbone, Backbone):
        check_backbone(backbone, config.backbone, processor, name_or_path)
    else:
        backbone = load_saved_backbone(config.backbone, processor, backbone, name_or_path, **how, **hub_options)
    model = model_class(backbone, config)
    model.origin = f"{name_or_path}@{revision}" if revision else str(name_or_path)
    load_into(model, folder)
    return model


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
