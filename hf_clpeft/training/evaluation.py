"""Evaluation after every task: routed and oracle-routed accuracy, and where images went."""

import math
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from ..modeling import ContinualModel
from ..streams import TaskImages
from .arguments import ContinualTrainingArguments
from .features import TestFeatures, extract, extract_queries


class TaskEvaluation(NamedTuple):
    """How the model does on one task's test split.

    Args:
        accuracy (`float`): Share of images with the right class, every image routed by its own features.
        oracle_accuracy (`float`): The same if every image went to its own task's expert; NaN if it has none.
        routed (integer array of shape `(experts,)`): How many images went to each expert; in a pool, each to
            several.
    """

    accuracy: float
    oracle_accuracy: float
    routed: np.ndarray


class Evaluator:
    """Evaluates a model on test splits again and again, each image passing the backbone as rarely as possible.

    Args:
        model ([`ContinualModel`]): The model.
        accelerator (`accelerate.Accelerator`): Shares out the images.
        args ([`ContinualTrainingArguments`]): Batch size and progress bars.
    """

    def __init__(self, model: ContinualModel, accelerator: Accelerator, args: ContinualTrainingArguments):
        self.model, self.accelerator, self.args = model, accelerator, args
        self._tests: dict[str, TestFeatures] = {}

    def add(self, name: str, images: TaskImages) -> None:
        """Registers a test split, and computes its query features."""
        if name not in self._tests:
            query = extract_queries(images, self.model, self.accelerator, self.args, desc=f"Querying {name}")
            layers = self.model.backbone.num_layers
            self._tests[name] = TestFeatures(images, query, (self.model.config.method.route_layer or layers) / layers)

    def forwards_per_image(self) -> float:
        """Forward passes so far per registered test image, query included."""
        tests = self._tests.values()
        return sum(test.forwards for test in tests) / max(1, sum(len(test.images) for test in tests))

    def expert_changed(self) -> None:
        """Tells that an expert was trained again, so that its features are stale."""
        for test in self._tests.values():
            test.forget()

    @torch.no_grad()
    def evaluate(self, name: str, classes: list[str], owner: int | None) -> TaskEvaluation:
        """Evaluates on one registered test split.

        Args:
            name (`str`): Name of the task.
            classes (`list[str]`): Its classes; labels are positions in it.
            owner (`int`, *optional*): Position of the task in the model, for oracle routing; `None` before that.

        Returns:
            [`TaskEvaluation`]
        """
        test, device, method = self._tests[name], self.model.device, self.model.config.method
        column = {label: number for number, label in enumerate(self.model.config.classes)}
        wanted = torch.tensor([column[label] for label in classes])[test.labels]

        def accuracy(selection: torch.Tensor) -> float:
            features = test.under(
                selection,
                lambda rows: extract(
                    test.images,
                    rows,
                    lambda pixels, index: self.model.bank(pixels, selection[index].to(device), method.readout),
                    self.model,
                    self.accelerator,
                    self.args,
                    desc=f"Evaluating {name}",
                ),
            )
            logits = self.model.heads(features.to(device), selection.to(device))
            return float((logits.argmax(dim=1).cpu() == wanted).float().mean())

        routed = self.model.route(test.query.to(device)).selection.cpu()
        oracle_accuracy = math.nan
        if owner is not None and method.experts == "per_task":
            oracle_accuracy = accuracy(torch.full_like(routed, owner))
        counts = np.bincount(routed.flatten().numpy(), minlength=len(self.model.bank))
        return TaskEvaluation(accuracy(routed), oracle_accuracy, counts)
