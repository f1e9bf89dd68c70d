"""The training data that a method sees: batches of images, and features of all images of a task."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch


Features = Callable[[torch.Tensor], torch.Tensor]


class FeaturesOf(Protocol):
    """Argument of [`~Method.prepare`] and [`~Method.end`]: extracts features of all training images.

    The images are sharded over the processes.
    """

    def __call__(
        self, features: Features, views: int = 1, augmentation: str = "none", /
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Applies a function to all training images of the task.

        Args:
            features (callable): Maps normalised images `(batch, 3, height, width)` to `(batch, width)`.
            views (`int`, *optional*, defaults to 1): Number of views of each image, of which the first is the image.
            augmentation (`str`, *optional*, defaults to `"none"`): Kind of the others; see [`views_for_sums`].

        Returns:
            Features `(images, width)`, or `(images, views, width)` if there are several views, in `float32`; and class
            indices `(images,)`, on the CPU.
        """


class Batch(NamedTuple):
    """A batch of training images.

    Args:
        pixels (`torch.Tensor` of shape `(batch, 3, height, width)`): Augmented and normalised.
        labels (integer `torch.Tensor` of shape `(batch,)`): Class indices of the model.
        query (`torch.Tensor` of shape `(batch, query_size)`, *optional*): Query features, if the method has
            `trains_by_query = True`.

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
