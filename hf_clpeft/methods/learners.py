"""What is trained in one task: an expert of its own, or a pool and its keys; and the head rows of its classes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from ..backbones import Backbone
from ..config.errors import ConfigError
from ..config.model import ContinualConfig, TaskConfig
from ..experts import ExpertBank
from ..routing import KeyRouter


class TaskLearner(torch.nn.Module, ABC):
    """The part of a model that is trained in one task.

    Args:
        config ([`TaskConfig`]): The task.
        head (`torch.nn.Linear`): The rows to train.
        classes (`list[int]`): Number of the class of each row.
        targets (`torch.Tensor` of shape `(len(config.classes),)`): Row of each class of the task.
    """

    targets: torch.Tensor

    def __init__(self, config: TaskConfig, head: torch.nn.Linear, classes: list[int], targets: torch.Tensor):
        super().__init__()
        self.config, self.head, self.classes = config, head, classes
        self.register_buffer("targets", targets)

    def expert_parameters(self) -> list[torch.nn.Parameter]:
        """Everything that is trained besides the head."""
        head = set(self.head.parameters())
        return [parameter for parameter in self.parameters() if parameter.requires_grad and parameter not in head]

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor,
        query: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss over the rows that are trained, which masks the classes that are not.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): Normalised images.
            labels (integer `torch.Tensor` of shape `(batch,)`): Positions in the task's classes.
            query (`torch.Tensor` of shape `(batch, hidden_size)`, *optional*): Query features, if experts come from a
                pool.
            weight (`torch.Tensor` of shape `(batch,)`, *optional*): What each image counts for; default: one share of
                the mean.

        Returns:
            The loss, and the logits of shape `(batch, len(classes))`.
        """
        features, penalty = self._features(pixel_values, query)
        logits = self.head(features.to(self.head.weight.dtype))
        losses = torch.nn.functional.cross_entropy(logits.float(), self.targets[labels], reduction="none") + penalty
        return (losses.mean() if weight is None else losses @ weight), logits

    @abstractmethod
    def _features(
        self, pixel_values: torch.Tensor, query: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | float]:
        """What the head classifies, of shape `(batch, hidden_size)`, and what is added to each image's loss."""


class FrozenLearner(TaskLearner):
    """Trains no expert: the backbone stays as it is, or as the first task left it."""

    def expert_parameters(self) -> list[torch.nn.Parameter]:
        """None."""
        return []

    def _features(self, pixel_values: torch.Tensor, query: torch.Tensor | None) -> tuple[torch.Tensor, float]:
        assert query is not None
        return query, 0.0


class ExpertLearner(TaskLearner):
    """Trains one expert in the bank's slot.

    Args:
        peft_model (`peft.PeftModel`): The backbone with the expert.
        backbone ([`Backbone`]): Says what of its output is the feature.
        args: As for [`TaskLearner`].
    """

    def __init__(self, peft_model: PeftModel, backbone: Backbone, *args: Any):
        super().__init__(*args)
        self.peft_model, self.pool = peft_model, backbone.pool

    def train(self, mode: bool = True) -> "ExpertLearner":
        """Keeps the backbone in evaluation mode: it is frozen, with its dropout and the statistics of its norms."""
        super().train(mode)
        self.peft_model.eval()
        for layer in self.peft_model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.training = mode
                for name, part in layer.named_children():
                    part.train(mode and name != "base_layer")
        return self

    def _features(self, pixel_values: torch.Tensor, query: torch.Tensor | None) -> tuple[torch.Tensor, float]:
        pixel_values = pixel_values.to(self.peft_model.dtype)
        return self.pool(self.peft_model(pixel_values=pixel_values).last_hidden_state), 0.0


class PoolLearner(TaskLearner):
    """Trains all experts of a pool and their keys, each image those that it selects.

    The loss gains λ · Σ (1 − cos(query, key)) over an image's selected keys (arXiv 2112.08654, equation 5).

    Args:
        bank ([`ExpertBank`]): The pool.
        router ([`KeyRouter`]): Its keys.
        readout (`str`): What the head classifies: `"cls"` or `"prompts"`.
        pull (`float`): λ.
        args: As for [`TaskLearner`].
    """

    def __init__(self, bank: ExpertBank, router: KeyRouter, readout: str, pull: float, *args: Any):
        super().__init__(*args)
        self.bank, self.router, self.readout, self.pull = bank, router, readout, pull
        bank.train_pool(router.keys)

    def finish(self) -> None:
        """Fixes the pool and its keys again."""
        self.bank.keep_pool()

    def _features(self, pixel_values: torch.Tensor, query: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        assert query is not None
        routing = self.router(query)
        features = self.bank(pixel_values, routing.selection, self.readout)
        return features, self.pull * routing.selection.shape[1] * routing.distance


def check_routes(router: Any, config: ContinualConfig) -> None:
    """Raises [`ConfigError`] if the router of a model does not know all of its tasks and classes.

    Args:
        router ([`Router`]): The model's.
        config ([`ContinualConfig`]): What the model has learnt.
    """
    if not config.method.routed:
        return
    names, known = [task.name for task in config.tasks], router.num_owners
    add = "model.router.add(model.query_features(pixel_values), " + ("numbers)" if router.knows_classes else "k)")
    if known != len(names):
        missing = f"not {', '.join(names[known:][:3])}" if known < len(names) else "more than that"
        raise ConfigError(
            f"The router has learnt {known} of {len(names)} tasks, {missing}. Call {add} once for each task, after "
            "finish_task and with its training images."
        )
    unknown = set(range(len(config.classes))) - set(router.classes.tolist()) if router.knows_classes else set()
    if unknown:
        labels = [config.classes[number] for number in sorted(unknown)]
        raise ConfigError(
            f"The router knows no image of {len(labels)} of the classes, {labels[:3]}: every class of a task needs "
            "one among its training images."
        )


def rows_to_train(classes: Sequence[str], known: Sequence[str], mask: bool) -> tuple[list[int], torch.Tensor]:
    """Which rows of the head a task trains.

    Args:
        classes (sequence of `str`): Classes of the task.
        known (sequence of `str`): All classes so far, those of the task included.
        mask (`bool`): Leave out those that the task does not have.

    Returns:
        `list[int]` with the number of the class of each row, and a tensor with the row of each class of the task.

    Example:

    ```py
    >>> from hf_clpeft.methods.learners import rows_to_train

    >>> rows_to_train(["dog", "cat"], ["bird", "cat", "dog"], mask=True)
    ([2, 1], tensor([0, 1]))

    ```
    """
    number_of = {label: number for number, label in enumerate(known)}
    rows = [number_of[label] for label in (classes if mask else known)]
    row_of = {number: row for row, number in enumerate(rows)}
    return rows, torch.tensor([row_of[number_of[label]] for label in classes])
