"""What a forward pass gives."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class ContinualOutput(ModelOutput):
    """What a forward pass gives, in the form that `transformers.pipeline` reads.

    Args:
        logits (`torch.Tensor` of shape `(batch, classes)`): −inf where an expert knows no such class.
        selection (integer `torch.Tensor` of shape `(batch,)` or `(batch, N)`): Experts of each image, nearest first.
        distances (`torch.Tensor` of shape `(batch, experts)`): How far every expert is from the image's query
            features.
    """

    logits: torch.Tensor | None = None
    selection: torch.Tensor | None = None
    distances: torch.Tensor | None = None
