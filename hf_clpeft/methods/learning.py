"""The training data that a method sees: batches of images, and features of all images of a task."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from ..config import ConfigError


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


def asked_for_views(features_of: FeaturesOf, method: str) -> FeaturesOf:
    """The same function, whose user is told what to write if the method asks it for views, and it has none.

    Args:
        features_of (callable): See [`FeaturesOf`]; perhaps a user's own.
        method (`str`): Name of the method, for error messages.
    """

    def checked(features: Features, *views: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if not views:
            return features_of(features)
        wish = (
            f"{method} looks at {views[0]} views of each training image: give finish_task a function of (features, "
            "views, augmentation) that returns features (images, views, width); see views_for_sums and augment in "
            "hf_clpeft.backbones.views. Or set views=1 and test_views=1."
        )
        try:
            inspect.signature(features_of).bind(features, *views)
        except TypeError as error:
            raise ConfigError(wish) from error
        found = features_of(features, *views)
        if views[0] > 1 and (found[0].dim() != 3 or found[0].shape[1] != views[0]):
            raise ConfigError(f"{wish} It returned features of shape {tuple(found[0].shape)}.")
        return found

    return checked


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
