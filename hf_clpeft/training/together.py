"""Several tasks trained in one pass over each mixed batch, every task as if it were alone."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext

import torch

from ..config import ConfigError
from ..experts.together import SlotsTogether
from .lesson import ParkedLesson
from .steps import Gradients


class TrainedTogether:
    """Trains independent tasks, several at once: each has its own batches, optimizer and random numbers.

    As soon as one has ended, the next one takes its place.

    Args:
        lessons (iterator of [`ParkedLesson`]): The tasks; the next one is begun when there is room.
        count (`int`): How many are trained at once; with 1, one after another, as they are alone.
    """

    def __init__(self, lessons: Iterator[ParkedLesson], count: int):
        self._lessons, self._count = lessons, count
        self._active: list[ParkedLesson] = []
        self._slots: SlotsTogether | None = None

    def run(self) -> None:
        """Trains all of them, or until a signal asks to stop, and all are saved.

        Raises:
            [`TrainingError`]: A loss is not finite, or batches do not fit into memory.
            [`ExpertError`], [`ConfigError`]: Experts of this kind cannot be trained together.
        """
        gradients = None
        while True:
            self._active = [one for one in self._active if one.batch is not None]
            while len(self._active) < self._count and (one := next(self._lessons, None)):
                self._active += [one] if one.batch is not None else []  # all its steps may have been done before
            if not self._active:
                return
            gradients = gradients or Gradients(self._losses_of, self._active[0].lesson.accelerator)
            start = time.perf_counter()
            trained = [parameter for one in self._active for parameter in one.lesson.loop.trained]
            losses = gradients([one.batch for one in self._active if one.batch is not None], trained)
            seconds = (time.perf_counter() - start) / len(self._active)
            for one, loss in zip(self._active, losses, strict=True):
                one.step(loss, seconds)

    def _losses_of(self, parts: dict[int, dict]) -> list[torch.Tensor]:
        """Losses of parts of the batches of some tasks, which share the forward pass."""
        some, batches = [self._active[place] for place in parts], list(parts.values())
        pixels = [one.lesson.pixels(batch) for one, batch in zip(some, batches, strict=True)]
        with some[0].lesson.accelerator.autocast(), ExitStack() as stack:
            for one, batch, images in zip(some, batches, pixels, strict=True):
                stack.enter_context(one.lesson.recalling(batch, images))
            known = [nullcontext()] if len(some) == 1 else self._run_together(some, pixels)
            losses = []
            for one, batch, images, features in zip(some, batches, pixels, known, strict=True):
                with one.active(), features:
                    losses.append(one.lesson.loss(batch, images))
        return losses

    def _run_together(self, some: list[ParkedLesson], pixels: list[torch.Tensor]) -> list:
        """Context managers in which the bank knows the features of the images of each task."""
        method = some[0].lesson.method
        bank, slots = method.bank, [one.slot for one in some if one.slot is not None]
        if len(slots) < len(some):
            raise ConfigError(
                f"{method.name} trains no PEFT expert, and others cannot be trained together. Train one task after "
                "another (together=1)."
            )
        self._slots = self._slots or SlotsTogether(bank, slots[0])
        found = self._slots(slots, pixels)
        return [bank.knowing(images, features) for images, features in zip(pixels, found, strict=True)]
