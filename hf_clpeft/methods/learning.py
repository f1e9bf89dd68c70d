"""What a method learns from: batches of images, and features of all images of a task."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch


Features = Callable[[torch.Tensor], torch.Tensor]


class FeaturesOf(Protocol):
    """What [`~Method.end`] gets: features of all training images, over all processes, each computed once."""

    def __call__(self, features: Features, /) -> tuple[torch.Tensor, torch.Tensor]:
        """Applies a function to all training images of the task.

        Args:
            features (callable): Takes normalised images `(batch, 3, height, width)`, gives `(batch, width)`.

        Returns:
            Features `(images, width)` in `float32` and class numbers `(images,)`, on the CPU.
        """


class Batch(NamedTuple):
    """Training images.

    Args:
        pixels (`torch.Tensor` of shape `(batch, 3, height, width)`): Augmented and normalised.
        labels (integer `torch.Tensor` of shape `(batch,)`): Numbers of their classes in the model.
        query (`torch.Tensor` of shape `(batch, query_size)`, *optional*): Query features, where the method says
            `trains_by_query`.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft import Batch

    >>> Batch(torch.zeros(2, 3, 32, 32), labels=torch.tensor([4, 5])).query is None
    True

    ```
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    query: torch.Tensor | None = None
