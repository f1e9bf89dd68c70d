"""Metrics of a user's own, as `compute_metrics` of the trainer of `transformers`."""

import re
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch

from ..config.errors import ConfigError


# Names of what is logged for all tasks anyway; see StreamReport.summary.
TAKEN = {
    *("average_accuracy", "average_incremental_accuracy", "forgetting", "backward_transfer", "forward_transfer"),
    *("routing_accuracy", "oracle_accuracy", "calibration_error", "accuracy_and_routing"),
}
NAME = re.compile(r"[\w.@-]{1,100}")


class ComputedMetrics:
    """Calls a function of the user on what a model says of the test images of a task.

    Args:
        function (callable): Takes a `transformers.EvalPrediction`, whose `predictions` are logits `(images, classes)`,
            −inf for classes that do not come into question, and whose `label_ids` are class indices of the model;
            returns a mapping of names to numbers.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.training.computed import ComputedMetrics

    >>> wrong = ComputedMetrics(lambda found: {"wrong": (found.predictions.argmax(1) != found.label_ids).sum()})
    >>> wrong(torch.eye(3), torch.tensor([0, 1, 1]), "task-000")
    {'wrong': 1.0}

    ```
    """

    def __init__(self, function: Callable[[Any], Mapping[str, float]]):
        if not callable(function):
            raise TypeError(f"compute_metrics={function!r} is not callable; give a function of an EvalPrediction.")
        self.function = function

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor, task: str) -> dict[str, float]:
        """Values by name, for one task.

        Args:
            logits (`torch.Tensor` of shape `(images, classes)`): Of test images.
            labels (integer `torch.Tensor` of shape `(images,)`): Their classes.
            task (`str`): Name of the task, for error messages.

        Raises:
            [`ConfigError`]: A name is taken or odd, or a value is no number.
        """
        from transformers import EvalPrediction

        predictions = EvalPrediction(predictions=logits.float().cpu().numpy(), label_ids=labels.cpu().numpy())
        found = self.function(predictions)
        if not isinstance(found, Mapping):
            raise ConfigError(f"compute_metrics returned {type(found).__name__}; return a dict of names and numbers.")
        for name, value in found.items():
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise ConfigError(f"compute_metrics returned the name {name!r}; take letters, digits, _, -, . and @.")
            if name in TAKEN:
                raise ConfigError(f"compute_metrics returned {name!r}, which is measured already; rename yours.")
            if not isinstance(value, Real | np.number | np.ndarray | torch.Tensor) or np.size(value) != 1:
                raise ConfigError(f"compute_metrics returned {name}={value!r} for {task}; return a number.")
        return {name: float(value) for name, value in found.items()}
