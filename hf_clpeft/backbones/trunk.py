"""The trunk: the first layers of a backbone, which no expert adapts, so that passes share their outputs."""

from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary


class Hidden(NamedTuple):
    """The outputs of all tokens after some layers, where another forward pass can go on.

    Args:
        layers (`int`): Number of layers that have been run.
        tokens (`torch.Tensor` of shape `(batch, tokens, hidden_size)`): Output of the last of them.
        wrapped (`bool`): Whether layers of this backbone return a tuple.
    """

    layers: int
    tokens: torch.Tensor
    wrapped: bool

    @classmethod
    def of(cls, layers: int, output: Any) -> "Hidden":
        """What a layer has returned, after `layers` layers."""
        wrapped = isinstance(output, tuple)
        return cls(layers, output[0] if wrapped else output, wrapped)


class Trunk:
    """Outputs of the lower layers for the images of one call, as long as the tensors of these images live.

    Images are recognised by the tensor that holds them, not by their values: hand the same tensor to each pass.

    Args:
        depth (`int`): Number of first layers that are the same in all passes.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.backbones import load_backbone
    >>> from hf_clpeft.backbones.trunk import Trunk

    >>> backbone, trunk, pixels = load_backbone("hf-clpeft/vit-tiny-glyphs"), Trunk(depth=4), torch.zeros(2, 3, 32, 32)
    >>> features = backbone(pixels, trunk=trunk)  # runs 6 layers
    >>> torch.equal(features, backbone(pixels, trunk=trunk))  # runs the last 2
    True

    ```
    """

    def __init__(self, depth: int):
        self.depth = depth
        self._kept: Any = WeakTensorKeyDictionary()  # by the tensor of images and the number of layers

    def keep(self, pixels: torch.Tensor, hidden: Hidden) -> None:
        """Keeps outputs for images, unless they are of layers that passes do not share."""
        if hidden.layers <= self.depth:
            self._kept.setdefault(pixels, {})[hidden.layers] = hidden

    def find(self, pixels: torch.Tensor, most: int | None = None) -> Hidden | None:
        """The outputs of the most layers known for these images, up to `most`; default: of the whole trunk or none."""
        known = self._kept.get(pixels, {})
        if most is None:
            return known.get(self.depth)
        return known.get(max((layers for layers in known if layers <= most), default=0))


class Resume(torch.nn.Module):
    """Takes the place of the first layers of a backbone: returns what they would return."""

    def __init__(self, hidden: Hidden):
        super().__init__()
        self._hidden = hidden

    def forward(self, *args: Any, **options: Any) -> Any:
        """Ignores its input."""
        return (self._hidden.tokens,) if self._hidden.wrapped else self._hidden.tokens
