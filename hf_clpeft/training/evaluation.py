"""Evaluation after every task: routed and oracle-routed accuracy, and where images went."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from ..model import ContinualModel
from ..routing import Routing
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

    Attributes:
        before (`float`): What [`~Evaluator.forwards_per_image`] was when the model was saved last.
    """

    def __init__(self, model: ContinualModel, accelerator: Accelerator, args: ContinualTrainingArguments):
        self.model, self.accelerator, self.args = model, accelerator, args
        self.before = 0.0
        self._tests: dict[str, TestFeatures] = {}
        self._recalled: set[str] = set()

    def add(self, name: str, images: TaskImages, measured: int | None = None) -> None:
        """Registers a test split, and computes its query features.

        Args:
            name (`str`): Name of the task.
            images ([`TaskImages`]): Its test images.
            measured (`int`, *optional*): Position of the task, if an earlier process has tested this model on it: what
                that took is part of `before`.
        """
        if name in self._tests:
            return
        query = extract_queries(images, self.model, self.accelerator, self.args, desc=f"Querying {name}")
        test = self._tests[name] = TestFeatures(images, query)
        if measured is not None:
            self._recalled.add(name)
            routing, method = self.model.route(query.to(self.model.device)), self.model.config.method
            routings = [routing, routing.sent_to(measured)] if method.experts == "per_task" else [routing]
            for each in routings if method.uses_experts and method.experts != "pool" else []:
                for selection in each.selection.cpu().reshape(len(query), -1).T:
                    test.recall(selection)

    def forwards_per_image(self) -> float:
        """Forward passes so far per registered test image, query included; the same after a run that was killed."""
        depth, of_query = self.model.backbone.num_layers, self.model.query_layers[-1]
        layers, images, recalled = 0, 0, 0  # whole numbers, so that nothing is lost in adding up
        for name, test in self._tests.items():
            layers += depth * test.forwards + (0 if name in self._recalled else of_query * len(test.images))
            images += len(test.images)
            recalled += len(test.images) * (name in self._recalled)
        return (layers + round(self.before * depth * recalled)) / (depth * max(1, images))

    def expert_changed(self) -> None:
        """Tells that an expert was trained again, so that its features are stale."""
        for test in self._tests.values():
            test.forget()

    @torch.no_grad()
    def evaluate(self, name: str, classes: Sequence[str], owner: int | None) -> TaskEvaluation:
        """Evaluates on one registered test split.

        Args:
            name (`str`): Name of the task.
            classes (sequence of `str`): Its classes; labels are positions in it.
            owner (`int`, *optional*): Position of the task in the model, for oracle routing; `None` before that.

        Returns:
            [`TaskEvaluation`]
        """
        test, model = self._tests[name], self.model
        column = {label: number for number, label in enumerate(model.config.classes)}
        wanted = torch.tensor([column[label] for label in classes])[test.labels]
        routing = model.route(test.query.to(model.device))

        def accuracy(routing: Routing) -> float:
            features = self._features(test, routing.selection.cpu(), name).to(model.device)
            return float((model.classify(features, routing).argmax(dim=1).cpu() == wanted).float().mean())

        oracle_accuracy, chosen = math.nan, routing.selection.cpu()
        if model.config.method.experts == "per_task":
            chosen = chosen.reshape(len(chosen), -1)[:, 0]  # where several judge, the first is the likeliest
            if owner is not None:
                oracle_accuracy = accuracy(routing.sent_to(owner))
        counts = np.bincount(chosen.flatten().numpy(), minlength=len(model.bank))
        result = TaskEvaluation(accuracy(routing), oracle_accuracy, counts)
        test.drop_unused()
        return result

    def _features(self, test: TestFeatures, selection: torch.Tensor, name: str) -> torch.Tensor:
        """What is classified; see [`ContinualModel.classify`]."""
        method = self.model.config.method
        if not method.uses_experts:
            return test.query
        if method.classifier == "both":
            return torch.stack([self._under(test, column, name) for column in selection.T], dim=1)
        return self._under(test, selection, name)

    def _under(self, test: TestFeatures, selection: torch.Tensor, name: str) -> torch.Tensor:
        model, readout = self.model, self.model.config.method.readout
        return test.under(
            selection,
            lambda rows: extract(
                test.images,
                rows,
                lambda pixels, index: model.bank(pixels, selection[index].to(model.device), readout),
                model,
                self.accelerator,
                self.args,
                desc=f"Evaluating {name}",
            ),
        )
