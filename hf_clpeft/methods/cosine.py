"""Cosine classifiers, which compare directions of features and not their norms."""

import torch
from torch.nn.functional import linear, normalize


def cosines(features: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Cosine similarities of features `(..., width)` and rows `(classes, width)`, of shape `(..., classes)`."""
    return linear(normalize(features, dim=-1), normalize(rows, dim=-1))


class CosineHead(torch.nn.Linear):
    """A linear layer without a bias on normalised features and rows: `scale` times their cosine similarity.

    Args:
        rows (`torch.Tensor` of shape `(classes, width)`): Its initial weight.
        scale (`float`): Scale of the logits.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.methods.cosine import CosineHead

    >>> CosineHead(torch.tensor([[3.0, 0.0], [1.0, 1.0]]), scale=10)(torch.tensor([[0.0, 5.0]]))
    tensor([[0.0000, 7.0711]], grad_fn=<MulBackward0>)

    ```
    """

    def __init__(self, rows: torch.Tensor, scale: float):
        super().__init__(rows.shape[1], len(rows), bias=False, dtype=torch.float32)
        self.weight, self.scale = torch.nn.Parameter(rows.detach().clone()), scale

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.scale * cosines(features, self.weight)
