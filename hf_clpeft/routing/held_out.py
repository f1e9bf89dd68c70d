"""How well a router tells images apart that it has not learnt: to choose options, and to calibrate its confidence."""

from copy import deepcopy

import torch
from torch.nn.functional import cross_entropy

from ..backbones.precision import without_autocast
from .classes import ClassRouter
from .confidence import TEMPERATURES


SHARE = 5  # a fifth of the images is held out


def held_out_scores(
    router: ClassRouter, features: torch.Tensor, classes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Scores of a held-out fifth of images, by a copy of the router that has learnt the others of them.

    Args:
        router ([`ClassRouter`]): It does not change.
        features (`torch.Tensor` of shape `(images, views, query_size)`): Query features. Of a held-out image, the
            first view counts.
        classes (integer `torch.Tensor` of shape `(images,)`): Class index of each image.

    Returns:
        Scores of classes of shape `(held out, classes)`, `float64`, on the CPU, and the class index of each image;
        `None` if there is nothing to tell apart.
    """
    features, classes = features.cpu() if features.dim() == 3 else features.cpu()[:, None], classes.cpu()
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    held_out, fitted = order.tensor_split([len(order) // SHARE])
    held_out = held_out[torch.isin(classes[held_out], classes[fitted])]
    if not len(held_out):
        return None
    learner = deepcopy(router)
    learner.measures = False
    learner.learn(features[fitted], classes[fitted])
    with without_autocast(learner.prototypes.device):
        scores = learner.class_scores(learner.scores(features[held_out, 0].to(learner.prototypes))).cpu().double()
    return (scores, classes[held_out]) if len(learner.classes.unique()) > 1 else None


def held_out_loss(router: ClassRouter, features: torch.Tensor, classes: torch.Tensor) -> float:
    """Cross entropy on a held-out fifth of images, at the temperature that suits them best.

    It does not depend on the scale of a router's scores, and, unlike the accuracy, tells options apart that make no
    mistake.

    Args:
        router ([`ClassRouter`]): One that has learnt nothing; it stays so.
        features, classes: As for [`held_out_scores`].

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
    found = held_out_scores(router, features, classes.unique(return_inverse=True)[1])
    if found is None:
        return 0.0
    return min(cross_entropy(found[0] / temperature, found[1]).item() for temperature in TEMPERATURES)
