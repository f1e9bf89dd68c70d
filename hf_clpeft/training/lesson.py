"""One task in training, alone or together with others: how its batches become losses."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator

from ..backbones.views import augment
from ..methods import Method
from ..model import ContinualModel
from ..streams import StreamedImages, TaskImages
from .checkpoints import Progress, random_state, set_random_state
from .processes import Stop
from .steps import StepLoop, TrainingStopped
from .trunk_cache import TrunkCaches


class Lesson:
    """The training of the current task of a model.

    Args:
        model ([`ContinualModel`]): The model, after `start_task`.
        images ([`TaskImages`] or [`StreamedImages`]): Training images.
        loop ([`StepLoop`]): Its optimizer steps.
        accelerator (`accelerate.Accelerator`): Provides the precision.
        caches ([`TrunkCaches`]): Caches of the run.
        queries (`torch.Tensor` of shape `(images, query_size)`, *optional*): Query features; computed in every step
            unless given.
    """

    def __init__(
        self,
        model: ContinualModel,
        images: TaskImages | StreamedImages,
        loop: StepLoop,
        accelerator: Accelerator,
        caches: TrunkCaches,
        queries: torch.Tensor | None = None,
    ):
        self.method, self.images, self.loop, self.accelerator = model.method, images, loop, accelerator
        self.caches, self.queries, self._normalize = caches, queries, model.backbone.transform.normalize
        self.numbers = torch.tensor(self.method.numbers).to(accelerator.device)

    def pixels(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Images of a batch: augmented and normalised."""
        return augment(self._normalize(batch["pixels"]), batch.get("view"))

    def recalling(self, batch: dict[str, Any], pixels: torch.Tensor) -> AbstractContextManager[None]:
        """Context manager: passes over `pixels` start above the layers below experts, where these are cached."""
        view = self.loop.view
        if view is None or not isinstance(self.images, TaskImages):
            return nullcontext()
        return self.caches.recalling(self.images, pixels, torch.from_numpy(batch["rows"]), view)

    def loss(self, batch: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the losses of a batch."""
        query = None
        if self.queries is not None:
            query = self.queries[batch["index"]]
        elif self.method.trains_by_query:
            with torch.no_grad():
                query = self.method.query(pixels)
        return self.loop.module(pixels, self.numbers[batch["label"]], query, batch["weight"])

    def run(self, after_step: Callable[[Progress, torch.Tensor], None], stop: Stop) -> None:
        """Trains this task alone; arguments as for [`StepLoop.run`]."""

        def loss_of(_: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            pixels = self.pixels(batch)
            with self.accelerator.autocast(), self.recalling(batch, pixels):
                return self.loss(batch, pixels)

        self.loop.run(loss_of, after_step, stop)


class ParkedLesson:
    """A task in training that is put aside, with what it has added to the method, while others train.

    Args:
        lesson ([`Lesson`]): The task, which the method has just begun.
        after_step (callable): See [`StepLoop.run`].
        stop ([`Stop`]): Stops after the current step when set.
        at_end (callable): Called with the seconds of training once all steps are done.

    Attributes:
        batch (`dict[str, torch.Tensor]`, *optional*): The batch whose loss comes next; `None` once all steps are
            done, or a signal asked to stop.
    """

    def __init__(
        self,
        lesson: Lesson,
        after_step: Callable[[Progress, torch.Tensor], None],
        stop: Stop,
        at_end: Callable[[float], None],
    ):
        self.lesson, self.at_end, self.seconds = lesson, at_end, 0.0
        self.slot = lesson.method.bank.slot
        self._steps = lesson.loop.steps(after_step, stop)
        self._park()
        self.batch: dict[str, torch.Tensor] | None = None
        self._go_on(lambda: next(self._steps))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context manager: the method is as it was left by this task, and so are random generators."""
        _put_back(self.lesson.method, self._kept)
        self.lesson.method.bank.slot = self.slot
        set_random_state(*self._random)
        try:
            yield
        finally:
            self._park()

    def step(self, loss: torch.Tensor, seconds: float) -> None:
        """Does an optimizer step with the gradients of the batch, and fetches the next one."""
        self.seconds += seconds
        self._go_on(lambda: self._steps.send(loss))

    def _go_on(self, to_next: Callable[[], dict[str, torch.Tensor]]) -> None:
        start, self.batch = time.perf_counter(), None
        with self.active():
            try:
                self.batch = to_next()
            except TrainingStopped:
                pass  # a checkpoint is saved
            except StopIteration:
                self.at_end(self.seconds + time.perf_counter() - start)
        self.seconds += time.perf_counter() - start

    def _park(self) -> None:
        self._kept = [dict(values) for values in _places(self.lesson.method)]
        self._random = random_state()


def _places(method: Method) -> list[dict]:
    """Where a method has its attributes."""
    return [vars(method), method._parameters, method._buffers, method._modules]


def _put_back(method: Method, kept: list[dict]) -> None:
    for values, before in zip(_places(method), kept, strict=True):
        # The snapshot to roll back to is the same for all tasks that are trained together.
        values.update({name: value for name, value in before.items() if name != "before"})
        for name in values.keys() - before.keys():
            del values[name]
