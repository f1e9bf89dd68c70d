"""A queue that batches the requests of many visitors."""

import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import PIL.Image

from ..model import ContinualModel
from ..prediction import Prediction, check_options, classify


LARGEST_BATCH = 64
BATCH_DELAY = 0.02  # seconds
T = TypeVar("T")


class Batcher:
    """One worker thread that runs the backbone: all queued requests become one mixed-expert batch.

    A forward pass of a few images takes about as long as one of a single image. A lone visitor is served at once;
    while there are several, a batch waits for `BATCH_DELAY` to fill up.

    Example:

    ```py
    >>> from PIL import Image
    >>> from hf_clpeft import ContinualModel
    >>> from hf_clpeft.demo.batching import Batcher

    >>> model = ContinualModel.from_pretrained("hf-clpeft/s-lora-digits")
    >>> len(Batcher().predict(model, [Image.new("RGB", (8, 8))] * 3, top_k=5))
    3

    ```
    """

    def __init__(self) -> None:
        self._waiting: SimpleQueue = SimpleQueue()
        self._process = os.getpid()
        threading.Thread(target=self._work, name="batcher", daemon=True).start()

    def submit(self, handle: Callable[[Sequence], Sequence[T]], item: Any) -> "Future[T]":
        """Queues a request.

        Args:
            handle (callable): Gets the items of all requests with an equal `handle` in a batch, and returns the result
                of each.
            item: What is requested.

        Returns:
            `concurrent.futures.Future`: Its result, or the exception of `handle`.
        """
        future: Future[T] = Future()
        if os.getpid() == self._process:
            self._waiting.put((handle, item, future))
        else:  # a copy of this process, as ZeroGPU makes one: it has no worker thread
            _resolve([future], handle, [item])
        return future

    def run(self, function: Callable[[], T]) -> T:
        """Runs a function on the worker thread, between two batches. Returns its result, or raises its exception."""
        return self.submit(lambda items: [function()], None).result()

    def predict(self, model: ContinualModel, images: Iterable[PIL.Image.Image], **options: Any) -> list[Prediction]:
        """Classifies a visitor's images, in batches shared with other visitors.

        Args:
            model ([`ContinualModel`]): The visitor's model.
            images (iterable of `PIL.Image.Image`): Images; each is resized before the next one is read.
            options: `reject_rate`, `expert`, `top_k`; see [`ContinualModel.predict`].

        Returns:
            `list[Prediction]`: One per image.

        Raises:
            [`ConfigError`]: The options do not fit the model. Other visitors are not affected.
        """
        check_options(model.method, **options)
        handle, resize = _Classifier(model, tuple(sorted(options.items()))), model.backbone.transform.resize
        # Queued one by one, so that hundreds of images do not block other visitors.
        futures = [self.submit(handle, resize([image])) for image in images]
        return [future.result() for future in futures]

    def _work(self) -> None:
        busy = False
        while True:
            requests = [self._waiting.get()]
            if busy:
                time.sleep(BATCH_DELAY)
            while len(requests) < LARGEST_BATCH and not self._waiting.empty():
                requests.append(self._waiting.get())
            busy = len(requests) > 1
            try:
                _answer(requests)
            except BaseException as error:  # no request may kill the thread
                _fail([future for _, _, future in requests], error)
            del requests  # do not hold a visitor's data while idle


@dataclass(frozen=True)
class _Classifier:
    """Classifies images with one model and one set of options."""

    model: ContinualModel
    options: tuple[tuple[str, Any], ...]

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Prediction]:
        return classify(self.model.method, np.concatenate(pixels), **dict(self.options))


def _answer(requests: Sequence[tuple[Callable, Any, Future]]) -> None:
    groups = defaultdict(list)
    for handle, item, future in requests:
        groups[handle].append((item, future))
    for handle, group in groups.items():
        items, futures = zip(*group, strict=True)
        _resolve(futures, handle, items)


def _resolve(futures: Sequence[Future], handle: Callable, items: Sequence) -> None:
    try:
        results = handle(items)
    except BaseException as error:  # raised again in the waiting threads
        _fail(futures, error)
        return
    for future, result in zip(futures, results, strict=True):
        future.set_result(result)


def _fail(futures: Sequence[Future], error: BaseException) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(error)
