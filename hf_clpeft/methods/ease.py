"""EASE: features of the experts of all tasks side by side, and class means of which some are inferred."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import normalize

from ..backbones import Backbone
from ..config import ConfigError, ContinualConfig, TaskConfig
from ..config.checks import check_ranges
from ..routing import Routing
from .all_experts import AllExperts
from .learning import FeaturesOf
from .options import LoraOptions


class Ease(AllExperts, name="ease"):
    """EASE: features of the experts of all tasks side by side, classified by their cosine to class means.

    **Trains** an adapter per task, with a temporary head. **Stores** the adapters, and the mean of every class with
    each of them. **Costs** one forward pass per image and task.

    There is one *entry* per class and task. Its means with the experts of its own and of earlier tasks are measured;
    those with the experts of later tasks, for which its images are gone, are inferred by [`complete`]. The score of an
    entry is its cosine with the expert of its own task, plus `alpha` times the average cosine with all others. The
    score of a class is that of its best entry. In the paper, whose tasks have different classes, it has only one.

    As in the code of the paper, and other than in its text, all inferred means are computed anew after each task, and
    `alpha` is divided by the number of other experts. So the result depends on which tasks were learnt, not on when
    they were, and a task is unlearnt as if it had never been learnt. Other than in the paper, adapters are LoRA rather
    than AdaptFormer, and the temporary head is linear rather than a cosine, so that S-LoRA models can give experts.
    """

    title, paper = "EASE", "2403.12030"
    which_head = "none: class means with every expert"
    means: torch.Tensor

    @dataclass
    class Config(LoraOptions):
        alpha: float = field(default=0.1, metadata={"help": "Weight of the experts of all tasks but a class's own."})

        def __post_init__(self) -> None:
            super().__post_init__()
            check_ranges(self, alpha=(0, 1))

    def __init__(self, backbone: Backbone, config: ContinualConfig):
        super().__init__(backbone, config)
        self.register_buffer("means", torch.zeros(0, 0, backbone.hidden_size))  # (entries, experts, hidden_size)

    def classify(self, features: torch.Tensor, routing: Routing) -> torch.Tensor:
        own, num_experts = _entries(self.config.tasks), self.means.shape[1]
        weights = torch.full((len(own[0]), num_experts, 1), self.options.alpha / max(1, num_experts - 1))
        weights[torch.arange(len(weights)), own[0]] = 1.0
        owners, classes, weights = (tensor.to(features.device, non_blocking=True) for tensor in (*own, weights))
        # Side by side, in the order of the bank; zero where an expert has not read an image.
        place = routing.selection[..., None].expand_as(features)
        beside = features.new_zeros(features.shape[0], num_experts, features.shape[-1])
        beside = beside.scatter(1, place, normalize(features, dim=-1))
        scores = beside.flatten(1) @ (normalize(self.means.to(features), dim=-1) * weights).flatten(1).T
        known = (routing.selection[..., None] == owners).any(dim=1)  # whether the expert of its own task was selected
        scores = scores.masked_fill(~known, -torch.inf)
        logits = scores.new_full((scores.shape[0], len(self.config.classes)), -torch.inf)
        return logits.scatter_reduce(1, classes.expand_as(scores), scores, "amax")

    def end(self, features_of: FeaturesOf) -> None:
        super().end(features_of)
        measured = []
        for expert in range(len(self.bank)):
            features, labels = self.under(expert, features_of)
            measured.append(torch.stack([features[labels == number].mean(dim=0) for number in self.numbers]))
        new = torch.stack(measured, dim=1)
        if new.isnan().any():
            raise ConfigError(f"Each class of {self.tasks[-1].name} needs a training image, to have a mean.")
        old = torch.nn.functional.pad(self.means.cpu(), (0, 0, 0, 1))
        self.means = complete(torch.cat([old, new]), _entries(self.tasks)[0])

    def check(self) -> None:
        wanted = (len(_entries(self.config.tasks)[0]), len(self.config.tasks))
        if self.means.shape[:2] != wanted:
            raise ConfigError(
                f"method.safetensors has {len(self.means)} class means with {self.means.shape[1]} experts, but the "
                f"model has {wanted[0]} classes of all tasks, and {wanted[1]} experts."
            )

    def remove(self, position: int, number_of: dict[int, int]) -> None:
        tasks = self.config.tasks
        kept = _entries(tasks)[0] != position
        means = torch.cat([self.means[:, :position], self.means[:, position + 1 :]], dim=1).cpu()[kept]
        self.means = complete(means, _entries([*tasks[:position], *tasks[position + 1 :]])[0]).to(self.means)
        self.bank.remove(tasks[position].name)

    def alike(self) -> dict[str, Any]:
        raise ConfigError("has class means with its own experts alone, which cannot be inferred for those of others")


def complete(means: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
    """Infers the means of classes with the experts of later tasks.

    An entry of task `i` is compared, with the expert of task `i`, to all entries of task `j` and later, by cosine
    similarity; its mean with the expert of a later task `j` is the average of theirs, weighted by the softmax of the
    similarities.

    Args:
        means (`torch.Tensor` of shape `(entries, experts, hidden_size)`): Means of entries, one expert per task;
            measured where the expert is not of a later task than the entry.
        owners (integer `torch.Tensor` of shape `(entries,)`): Task of each entry.

    Returns:
        `torch.Tensor` of shape `(entries, experts, hidden_size)`.

    Source: EASE, arXiv 2403.12030, section 4.2.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.methods.ease import complete

    >>> means = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 4.0]], [[0.0, 2.0], [0.0, 8.0]]])
    >>> complete(means, owners=torch.tensor([0, 1, 1]))[0]  # 4 and 8, weighted by the softmax of 1 and 0
    tensor([[1.0000, 0.0000],
            [0.0000, 5.0758]])

    ```
    """
    means = means.clone()
    for later in range(means.shape[1]):
        measured = means[owners >= later]
        for own in range(later):
            rows = owners == own
            similarities = normalize(means[rows, own], dim=-1) @ normalize(measured[:, own], dim=-1).T
            means[rows, later] = similarities.softmax(dim=-1) @ measured[:, later]
    return means


def _entries(tasks: Sequence[TaskConfig]) -> tuple[torch.Tensor, torch.Tensor]:
    """Task and class index of each entry: in the order of tasks, and of classes within a task."""
    number_of: dict[str, int] = {}
    pairs = [
        (i, number_of.setdefault(label, len(number_of))) for i, task in enumerate(tasks) for label in task.classes
    ]
    owners, classes = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
    return owners, classes
