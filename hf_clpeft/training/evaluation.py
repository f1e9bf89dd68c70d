"""Evaluation after every task: accuracy with routing and with oracle routing, and routing counts."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from ..methods import ContinualOutput
from ..metrics.continual import reliability_table
from ..model import ContinualModel
from ..reports.report import StreamReport, margin_bins
from ..streams import TaskImages
from .arguments import ContinualTrainingArguments
from .computed import ComputedMetrics
from .features import TestFeatures, extract, extract_all
from .trunk_cache import TrunkCaches


class TaskEvaluation(NamedTuple):
    """Results on one task's test split.

    Args:
        accuracy (`float`): Accuracy, with every image routed by its own features.
        oracle_accuracy (`float`): Accuracy with oracle routing, to the task's own expert; NaN if it has none.
        routed (integer array): Number of images routed to each expert, without trailing zeros; in a pool, each image
            counts for several.
        reliability (array of shape `(15, 3)`): Of each bin of confidence, the number of images, the sum of their
            confidences, and the number of images that were right.
        margins (array of shape `(3, 2)`, *optional*): See [`StreamReport`]; `None` if experts do not belong to tasks.
        computed (`dict[str, float]`): Values of the user's own metrics by name.
    """

    accuracy: float
    oracle_accuracy: float
    routed: np.ndarray
    reliability: np.ndarray
    margins: np.ndarray | None
    computed: dict[str, float]


def reliability_of(logits: torch.Tensor, wanted: torch.Tensor) -> np.ndarray:
    """Images by the confidence of their likeliest class, in bins of equal width; see [`TaskEvaluation`].

    Args:
        logits (`torch.Tensor` of shape `(images, classes)`): May hold −inf.
        wanted (integer `torch.Tensor` of shape `(images,)`): Class index of each image.
    """
    confidence, likeliest = logits.cpu().double().softmax(dim=1).max(dim=1)
    return reliability_table(confidence.numpy(), (likeliest == wanted).numpy())


def margins_of(distances: torch.Tensor | None, right: torch.Tensor) -> np.ndarray | None:
    """Routes by how clear they are, `(3, 2)`: how many, and how many right; `None` without a choice.

    Args:
        distances (`torch.Tensor` of shape `(images, experts)`, *optional*): From the router.
        right (boolean `torch.Tensor` of shape `(images,)`): Whether each image came to the expert of its task.
    """
    if distances is None or distances.shape[1] < 2:
        return None
    bins = margin_bins(distances.cpu().double().numpy())
    return np.stack([np.bincount(bins[kept], minlength=3)[:3] for kept in (bins >= 0, (bins >= 0) & right.numpy())], 1)


class Evaluator:
    """Evaluates a model repeatedly on test splits, with cached features to save forward passes.

    Args:
        model ([`ContinualModel`]): The model.
        accelerator (`accelerate.Accelerator`): Shards the images.
        args ([`ContinualTrainingArguments`]): Batch size and progress bars.
        caches ([`TrunkCaches`], *optional*): Caches of the run.
        compute ([`ComputedMetrics`], *optional*): The user's own metrics.

    Attributes:
        before (`float`): [`~Evaluator.forwards_per_image`] when the model was last saved.
    """

    def __init__(
        self,
        model: ContinualModel,
        accelerator: Accelerator,
        args: ContinualTrainingArguments,
        caches: TrunkCaches | None = None,
        compute: ComputedMetrics | None = None,
    ):
        self.model, self.accelerator, self.args = model, accelerator, args
        self.caches, self.compute = caches, compute
        self.before = 0.0
        self._tests: dict[str, TestFeatures] = {}
        self._recalled: set[str] = set()

    @torch.no_grad()
    def add(self, name: str, images: TaskImages, measured: int | None = None) -> None:
        """Registers a test split, and computes its query features.

        Args:
            name (`str`): Name of the task.
            images ([`TaskImages`]): Its test images.
            measured (`int`, *optional*): Index of the task, if an earlier run has evaluated this model on it, so that
                its forward passes are counted in `before`.
        """
        if name in self._tests:
            return
        test, method = TestFeatures(images, self._queries(images, name)), self.model.method
        self._tests[name] = test
        if measured is not None:
            self._recalled.add(name)
            if method.independent and method.reads:
                self._predict(name, measured)  # computes what the earlier run remembered, and has counted
                test.forwards = 0
                test.drop_unused()

    def forwards(self) -> dict[str, int]:
        """Number of expert forward passes so far, by test split."""
        return {name: test.forwards for name, test in self._tests.items()}

    def forget(self, owner: int, forwards: dict[str, int]) -> None:
        """Rolls back after a failed task.

        Args:
            owner (`int`): Index of the task in the model.
            forwards (`dict[str, int]`): [`~Evaluator.forwards`] before the task.
        """
        self._tests = {name: test for name, test in self._tests.items() if name in forwards}
        expert = self.model.method.expert_of(owner) if self.model.method.independent else owner
        for name, test in self._tests.items():
            test.forget(owner if expert is None else expert, forwards[name])

    def _queries(self, images: TaskImages, name: str) -> torch.Tensor:
        method = self.model.method
        if not method.query_layers:
            return torch.zeros(len(images), 0)
        desc = f"Querying {name}"
        return extract_all(images, method.query, self.model, self.accelerator, self.args, desc, caches=self.caches)

    def forwards_per_image(self) -> float:
        """Forward passes so far per test image, including query features; unaffected by an interruption.

        The layers below all experts count once for an image whose outputs of them are cached.
        """
        depth, method = self.model.backbone.num_layers, self.model.method
        last = max(method.query_layers, default=0)
        layers, images, recalled = 0, 0, 0  # integers, so that sums are exact
        for name, test in self._tests.items():
            below = 0 if self.caches is None else self.caches.depth_for(test.images)
            of_query = method.query_passes * last - (below if last >= below else 0)
            layers += (depth - below) * test.forwards
            layers += 0 if name in self._recalled else (below + of_query) * len(test.images)
            images += len(test.images)
            recalled += len(test.images) * (name in self._recalled)
        return (layers + round(self.before * depth * recalled)) / (depth * max(1, images))

    @torch.no_grad()
    def evaluate(self, name: str, classes: Sequence[str], owner: int | None) -> TaskEvaluation:
        """Evaluates on one registered test split.

        Args:
            name (`str`): Name of the task.
            classes (sequence of `str`): Its classes, which labels index.
            owner (`int`, *optional*): Index of the task in the model, for oracle routing; `None` if not yet learnt.
        """
        test, method = self._tests[name], self.model.method
        column = {label: number for number, label in enumerate(self.model.config.classes)}
        wanted = torch.tensor([column[label] for label in classes])[test.labels]
        if not method.fixed_query:
            test.query = self._queries(test.images, name)
        for expert in method.remade:
            if expert in method.bank.names:
                test.evict(method.bank.names.index(expert))
        output, oracle = self._predict(name, owner)

        def accuracy(output: ContinualOutput) -> float:
            assert output.logits is not None
            return float((output.logits.argmax(dim=1).cpu() == wanted).float().mean())

        assert output.selection is not None and output.logits is not None
        chosen = output.selection.cpu()
        if method.independent:
            chosen = chosen.reshape(len(chosen), -1)[:, 0]  # the nearest of several
        counts = np.bincount(chosen.flatten().numpy())
        oracle_accuracy = math.nan if oracle is None else accuracy(oracle)
        own = None if owner is None or not (method.routes and method.independent) else method.expert_of(owner)
        margins = None if own is None else margins_of(output.distances, chosen == own)
        reliability = reliability_of(output.logits, wanted)
        asked = self.compute is not None and owner is not None
        computed = self.compute(output.logits, wanted, name) if self.compute is not None and asked else {}
        result = TaskEvaluation(accuracy(output), oracle_accuracy, counts, reliability, margins, computed)
        test.drop_unused()
        return result

    def _predict(self, name: str, owner: int | None) -> tuple[ContinualOutput, ContinualOutput | None]:
        """Outputs with routing; and with oracle routing, if experts belong to tasks and the task has been learnt."""
        test, method, device = self._tests[name], self.model.method, self.model.device
        query, oracle = test.query.to(device), None

        def read(_: TaskImages, selection: torch.Tensor) -> torch.Tensor:
            return self._read(test, selection.cpu(), name).to(device)

        output = method(test.images, query, read)
        if method.independent and owner is not None:
            oracle = method(test.images, query, read, expert=method.expert_of(owner))
        return output, oracle

    def _read(self, test: TestFeatures, selection: torch.Tensor, name: str) -> torch.Tensor:
        """Features with the selected experts applied; cached if experts are independent and thus never change."""
        method = self.model.method

        def compute(rows: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
            def features(pixels: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
                read: Any = method.read
                given = {"query": test.query} if method.reads_by_query else {}
                more = {name: tensor[index].to(pixels.device, non_blocking=True) for name, tensor in given.items()}
                return read(pixels, experts[index].to(pixels.device, non_blocking=True), **more)

            desc = f"Evaluating {name}"
            return extract(test.images, rows, features, self.model, self.accelerator, self.args, desc, self.caches)

        if not method.independent:
            test.forwards += len(selection)
            return compute(torch.arange(len(selection)), selection)
        columns = selection.reshape(len(selection), -1).T
        features = [test.under(column, partial(compute, experts=column)) for column in columns]
        return features[0] if selection.dim() == 1 else torch.stack(features, dim=1)


def note_results(
    report: StreamReport, model: ContinualModel, results: dict[int, TaskEvaluation], before: float | None
) -> None:
    """Writes an evaluation after the last task into a report.

    Args:
        report ([`StreamReport`]): The report, which has a row for that task.
        model ([`ContinualModel`]): The model.
        results (`dict[int, TaskEvaluation]`): Results by index of the task.
        before (`float`, *optional*): Accuracy on the last task before it was learnt.
    """
    method, count = model.method, len(model.config.tasks)
    if before is not None and count > 1:
        report.accuracy_matrix[-2][-1] = before
    for position, result in results.items():
        report.accuracy_matrix[-1][position] = result.accuracy
    tables = [result.reliability for result in results.values()]
    report.reliability = np.sum(tables, axis=0).round(6).tolist() if tables else []
    report.temperature = method.temperature()
    names = dict.fromkeys(name for result in results.values() for name in result.computed)
    report.computed = {
        name: [results[place].computed.get(name, math.nan) if place in results else math.nan for place in range(count)]
        for name in names
    }
    margins = [result.margins for result in results.values() if result.margins is not None]
    report.route_margins = np.sum(margins, axis=0).tolist() if margins else []
    if method.routes:
        shared = len(method.bank) and not method.independent
        report.experts = method.bank.names if shared else list(report.titles)
        confusion = np.zeros((count, len(report.experts)), dtype=int)
        for position, result in results.items():
            confusion[position, : len(result.routed)] = result.routed
        report.routing_confusion = confusion.tolist()
    if method.independent:
        report.oracle_accuracy = [
            results[position].oracle_accuracy if position in results else math.nan for position in range(count)
        ]
