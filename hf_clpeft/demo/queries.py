"""Query features of single pictures, which the map and lessons look at."""

from collections.abc import Callable
from functools import partial
from typing import Any

import PIL.Image
import torch

from ..backbones.views import augment, views_for_sums
from ..methods.views import ManyViews
from ..model import ContinualModel


Run = Callable[[Callable[[], Any]], Any]


def query_of(model: ContinualModel, image: PIL.Image.Image) -> torch.Tensor:
    """Query features of one picture, of shape `(1, query_size)`; of several views the first."""
    query = views_of(model, image)
    return query if query.dim() == 2 else query[:, 0]


@torch.no_grad()
def views_of(model: ContinualModel, image: PIL.Image.Image) -> torch.Tensor:
    """What a prediction sees of one picture: `(1, query_size)`, or `(1, test_views, query_size)`."""
    return model.method.query(_pixels(model, image))


def lesson_of(model: ContinualModel, image: PIL.Image.Image, run: Run = lambda function: function()) -> torch.Tensor:
    """What a router learns from one picture, of shape `(1, views, query_size)`, or `(1, query_size)` without views.

    Args:
        model ([`ContinualModel`]): The model.
        image (`PIL.Image.Image`): The picture.
        run (callable, *optional*): Calls the function that looks at one view, such as [`Batcher.run`].
    """
    method, pixels = model.method, _pixels(model, image)
    count = getattr(method.options, "views", 1)
    if not isinstance(method, ManyViews) or count == 1:
        return run(partial(query_of, model, image))

    @torch.no_grad()
    def look(view: torch.Tensor | None) -> torch.Tensor:
        return method.look(augment(pixels, view))

    views = views_for_sums(1, count, method.options.view_kind, seed=0)
    return torch.stack([run(partial(look, view)) for view in views], dim=1)


def _pixels(model: ContinualModel, image: PIL.Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(model.backbone.transform.resize([image])).to(model.device)
    return model.backbone.transform.normalize(pixels)
