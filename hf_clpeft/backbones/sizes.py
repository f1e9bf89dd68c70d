"""Input sizes other than the checkpoint's: interpolates position embeddings once."""

from typing import TYPE_CHECKING, Any

import torch

from .errors import BackboneError


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def native_size(config: "PretrainedConfig") -> int | None:
    """Side of the square input in a model's configuration, in pixels; `None` if it accepts any size.

    Raises:
        [`BackboneError`]: The input is not square.
    """
    size = getattr(config, "image_size", None)
    if isinstance(size, list | tuple):
        if len(set(size)) != 1:
            raise BackboneError(f"The backbone takes images of {list(size)} px; only square ones are supported.")
        size = size[0]
    return size


def patch_size_of(config: "PretrainedConfig") -> int:
    """Side of a patch in pixels; 1 if the model has no square patches."""
    size = getattr(config, "patch_size", 1)
    return size if isinstance(size, int) and size > 0 else 1


def interpolate_positions(model: "PreTrainedModel", image_size: int) -> None:
    """Adapts a model in place to `image_size` px by interpolating its position embeddings, with its own method.

    Architectures whose position embeddings do not depend on the size, or are interpolated in every forward pass, are
    not changed.

    Raises:
        `ValueError`: Its position embeddings cannot be interpolated.
    """
    config = model.config
    embeddings: Any = getattr(model, "embeddings", None)  # fields differ from class to class
    old = native_size(config)
    if old is None or old == image_size:
        return
    patch_size = patch_size_of(config)
    grid = (image_size // patch_size) ** 2
    table = getattr(embeddings, "position_embedding", None)
    positions = getattr(embeddings, "position_embeddings", None)
    if isinstance(table, torch.nn.Embedding):  # in CLIP and SigLIP
        new = _interpolated(embeddings, table.weight[None], grid, old // patch_size, image_size)[0]
        embeddings.position_embedding = torch.nn.Embedding.from_pretrained(new)
        numbers = torch.arange(len(new), device=new.device)[None]
        embeddings.register_buffer("position_ids", numbers, persistent=False)
        embeddings.num_positions = len(new)
    elif isinstance(positions, torch.nn.Parameter):
        new = _interpolated(embeddings, positions, grid, old // patch_size, image_size)
        embeddings.position_embeddings = torch.nn.Parameter(new, requires_grad=False)
    module: Any
    for module in (embeddings, getattr(embeddings, "patch_embeddings", None)):
        if hasattr(module, "num_patches"):
            module.num_patches = grid
        if hasattr(module, "image_size"):
            module.image_size = image_size if isinstance(module.image_size, int) else (image_size, image_size)
    config.image_size = image_size if isinstance(config.image_size, int) else [image_size, image_size]


@torch.no_grad()
def _interpolated(embeddings: Any, positions: torch.Tensor, grid: int, side: int, image_size: int) -> torch.Tensor:
    """Position embeddings of `grid` patches and the tokens before them, by the model's own method."""
    before = positions.shape[1] - side**2  # [CLS] and other special tokens
    tokens = positions.new_zeros(1, grid + before, positions.shape[2])
    try:
        new = embeddings.interpolate_pos_encoding(tokens, image_size, image_size)
    except (AttributeError, TypeError, RuntimeError) as error:
        raise ValueError("its position embeddings cannot be interpolated") from error
    return new.detach().clone().contiguous()
