"""SSIAT: one adapter tuned by all tasks; class Gaussians follow the drift of features, and a cosine head them."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.nn.functional import cross_entropy, normalize, one_hot

from ..config import TaskConfig
from ..config.checks import check_ranges
from ..routing import Routing
from .alignment import align
from .cosine import CosineHead
from .learning import Batch, FeaturesOf
from .options import LoraOptions
from .single import EXPERT
from .slca import Aligned


RIDGE = 1e-4  # penalty of the linear map, for features of norm 1: the code of SLDC


class Ssiat(Aligned, name="ssiat"):
    """SSIAT, semantically shifted incremental adapter tuning; arXiv 2403.19979, with the drift map of 2511.09926.

    **Trains** one LoRA adapter on all tasks without a constraint, and a cosine head on the classes of each task alone.
    Then Gaussians of old classes are moved by the drift of the current images, and the rows of all classes are trained
    on features sampled from them. **Stores** adapter and head once, and a Gaussian per class and task, `hidden_size`
    squared numbers. **Costs** one forward pass per image.

    It differs from the papers in this:

    - The adapter is LoRA, where SSIAT has a bottleneck beside each MLP.
    - [`mean_drift`] weighs images by their distance in units of their own spread, so that it does not depend on the
      scale of a backbone's features, and [`ridge_drift`] leaves alone what no image tells of.
    - Means of old classes are not scaled. The code of SSIAT shortens them by up to a tenth, of which a cosine sees
      little.
    - SLDC's weakly nonlinear map, its distillation and its auxiliary images are left out.
    - Covariances are shrunk, as [`ClassGaussians`] says, and the head is aligned faster, as [`align`] says.
    """

    title, paper = "SSIAT", "2403.19979"

    @dataclass
    class Config(LoraOptions):
        drift: Literal["mean", "ridge", "none"] = field(
            default="mean",
            metadata={"help": "Old Gaussians follow the mean drift nearby (SSIAT), a linear map (SLDC), or nothing."},
        )
        scale: float = field(default=20.0, metadata={"help": "Scale of the cosine logits."})
        margin: float = field(
            default=0.0, metadata={"help": "Subtracted from the cosine of the true class in training."}
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            check_ranges(self, scale=(1, 1e3), margin=(0, 1))

    def classify(self, features: torch.Tensor, routing: Routing) -> torch.Tensor:
        return self.options.scale * self.heads(normalize(features, dim=-1), routing.selection)

    def begin(self, task: TaskConfig) -> None:
        rows = self.heads.start(self.numbers).weight
        new = normalize(torch.randn_like(rows), dim=-1)  # a cosine has no gradient at zero
        rows = torch.where(rows.any(dim=1, keepdim=True), rows, new)
        self.train_expert(EXPERT, CosineHead(rows, self.options.scale))

    def loss(self, batch: Batch) -> torch.Tensor:
        logits = self._head(self.bank.under_training(batch.pixels).to(self._head.weight.dtype)).float()
        targets = self.rows(batch.labels)
        margin = self.options.scale * self.options.margin * one_hot(targets, len(self.numbers))
        return cross_entropy(logits - margin, targets, reduction="none")

    def end(self, features_of: FeaturesOf) -> None:
        moves = self.options.drift != "none" and self.config.tasks
        before = features_of(self.features)[0] if moves else None  # while the bank holds the old adapter
        self.bank.finish(EXPERT)
        after, labels = features_of(self.features)
        if before is not None and self.options.drift == "mean":
            self.gaussians.move(mean_drift(self.gaussians.means, before, after, labels))
        elif before is not None:
            self.gaussians.transform(ridge_drift(before, after))
        self.gaussians.learn(after, labels)
        rows, bias = normalize(self._head.weight, dim=-1), torch.zeros(len(self.numbers))
        head = CosineHead(self.heads.extended(rows, bias, self.numbers).weight, self.options.scale)
        del self._head
        if self.config.tasks:
            align(head, self.gaussians, self.seed)
        rows = normalize(head.weight, dim=-1)
        self.heads.write(rows, torch.zeros(len(rows)), list(range(len(rows))))


def mean_drift(means: torch.Tensor, before: torch.Tensor, after: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How far old class means have drifted: the mean drift of the current images, of which those nearby weigh most.

    An image at distance `d` from a mean weighs `exp(-d² / s²)`, where `s²` is the mean squared distance of the images
    from the means of their own classes. The paper has 2 · 4² in its place, for features of ViT-B/16.

    Args:
        means (`torch.Tensor` of shape `(entries, width)`): Old means.
        before (`torch.Tensor` of shape `(images, width)`): Features of the current images before training.
        after (`torch.Tensor` of shape `(images, width)`): Features of the same images after training.
        labels (integer `torch.Tensor` of shape `(images,)`): Class index of each image.

    Returns:
        `torch.Tensor` of shape `(entries, width)`: To be added to the means.

    Source: SSIAT, arXiv 2403.19979.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.methods.ssiat import mean_drift

    >>> before = torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 0.0], [9.0, 1.0]])
    >>> after = before + torch.tensor([[1.0], [1.0], [2.0], [2.0]])
    >>> mean_drift(torch.tensor([[0.0, 2.0], [9.0, 2.0]]), before, after, torch.tensor([0, 0, 1, 1])).round().tolist()
    [[1.0, 1.0], [2.0, 2.0]]

    ```
    """
    _, classes = labels.unique(return_inverse=True)
    members = one_hot(classes).to(before)
    own = members.T @ before / members.sum(dim=0)[:, None]
    spread = (before - members @ own).square().sum(dim=1).mean().clamp(min=1e-6)
    weights = (-torch.cdist(means.to(before), before).square() / spread).softmax(dim=1)
    return weights @ (after - before)


def ridge_drift(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """The linear map from old to new features, by ridge regression of the drift of the current images.

    Every image is scaled to a norm of 1 before training. The ridge penalty pulls the map towards the identity, as does
    a factor of `1 - exp(-images / width)`, so that directions of which no image tells stay as they were.

    Args:
        before (`torch.Tensor` of shape `(images, width)`): Features of the current images before training.
        after (`torch.Tensor` of shape `(images, width)`): Features of the same images after training.

    Returns:
        `torch.Tensor` of shape `(width, width)`: New features are `features @ map`.

    Source: SLDC, arXiv 2511.09926, its linear variant. There the penalty pulls towards zero.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.methods.ssiat import ridge_drift

    >>> before = torch.eye(2).repeat(50, 1)
    >>> ridge_drift(before, 3 * before)
    tensor([[3.0000, 0.0000],
            [0.0000, 3.0000]])

    ```
    """
    norms = before.norm(dim=1, keepdim=True).clamp(min=1e-6)
    inputs, drift = (before / norms).double(), ((after - before) / norms).double()
    identity = torch.eye(before.shape[1], dtype=torch.float64)
    slope = torch.linalg.solve(inputs.T @ inputs + RIDGE * identity, inputs.T @ drift)
    return (identity - torch.tensor(-len(inputs) / len(identity)).exp().sub(1) * slope).float()
