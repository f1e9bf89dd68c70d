"""Output of a forward pass."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class ContinualOutput(ModelOutput):
    """Output of a forward pass, as `transformers.pipeline` expects it.

    Args:
        logits (`torch.Tensor` of shape `(batch, classes)`): −inf for classes unknown to the selected experts.
        selection (integer `torch.Tensor` of shape `(batch,)` or `(batch, N)`): Experts of each image, nearest first.
        distances (`torch.Tensor` of shape `(batch, experts)`): Distance of the query features to every expert.
    """

    logits: torch.Tensor | None = None
    selection: torch.Tensor | None = None
    distances: torch.Tensor | None = None
