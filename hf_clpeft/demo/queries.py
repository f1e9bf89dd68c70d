"""Query features of single pictures, which the map and lessons look at."""

import PIL.Image
import torch

from ..model import ContinualModel


def query_of(model: ContinualModel, image: PIL.Image.Image) -> torch.Tensor:
    """Query features of one picture, of shape `(1, query_size)`; of several views the first."""
    pixels = torch.from_numpy(model.backbone.transform.resize([image])).to(model.device)
    with torch.no_grad():
        query = model.method.query(model.backbone.transform.normalize(pixels))
    return query if query.dim() == 2 else query[:, 0]
