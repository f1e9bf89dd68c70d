"""How well a router tells images apart that it has not learnt, to choose among options without test images."""

from copy import deepcopy

import torch
from torch.nn.functional import cross_entropy

from .classes import ClassRouter


SHARE = 5  # a fifth of the images is held out
TEMPERATURES = [10.0 ** (exponent / 4) for exponent in range(-12, 13)]


def held_out_loss(router: ClassRouter, features: torch.Tensor, classes: torch.Tensor) -> float:
    """Cross entropy on a held-out fifth of images, at the temperature that suits them best.

    It does not depend on the scale of a router's scores, and, unlike the accuracy, tells options apart that make no
    mistake.

    Args:
        router ([`ClassRouter`]): One that has learnt nothing; it stays so.
        features (`torch.Tensor` of shape `(images, views, query_size)`): Query features. Of a held-out image, the
            first view counts.
        classes (integer `torch.Tensor` of shape `(images,)`): Class index of each image.

    Returns:
        `float`: 0 or more; 0 if there is nothing to tell apart.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing import GaussianRouter
    >>> from hf_clpeft.routing.held_out import held_out_loss

    >>> features, classes = torch.eye(2).repeat(50, 1)[:, None], torch.arange(2).repeat(50)
    >>> held_out_loss(GaussianRouter(query_size=2), features, classes) < 0.01
    True

    ```
    """
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    held_out, fitted = order.tensor_split([len(order) // SHARE])
    numbers, targets = classes.unique(return_inverse=True)
    held_out = held_out[torch.isin(classes[held_out], classes[fitted])]
    if not len(held_out) or len(numbers) < 2:
        return 0.0
    learner = deepcopy(router)
    learner.learn(features[fitted], targets[fitted])
    scores = learner.class_scores(learner.scores(features[held_out, 0].to(learner.prototypes))).cpu().double()
    losses = [cross_entropy(scores * scale, targets[held_out]).item() for scale in TEMPERATURES]
    return min(losses)
