"""Requests of many visitors in shared batches."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import PIL.Image

from ..model import ContinualModel
from ..prediction import Prediction, check_options, classify


LARGEST_BATCH = 64
MOMENT = 0.02  # seconds
T = TypeVar("T")


class Batcher:
    """One thread that runs the backbone: whatever waits when it is free becomes one mixed-expert batch.

    Threads may share a model, but a forward pass costs much the same for one image and for a few. A visitor who is
    alone waits for nobody; while there are several, a batch waits a moment for the rest of them.

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
        threading.Thread(target=self._work, name="batcher", daemon=True).start()

    def run(self, function: Callable[[], T]) -> T:
        """Calls a function of no arguments between two batches; returns what it returns, or raises what it raises."""
        future: Future = Future()
        self._waiting.put((function, None, future))
        return future.result()

    def predict(self, model: ContinualModel, images: Iterable[PIL.Image.Image], **options: Any) -> list[Prediction]:
        """Classifies images of one visitor, together with those of others.

        Args:
            model ([`ContinualModel`]): The visitor's model.
            images (iterable of `PIL.Image.Image`): Images, each of which is resized before the next one is asked for.
            options: `reject_rate`, `expert`, `top_k`; see [`ContinualModel.predict`].

        Returns:
            `list[Prediction]`: One per image.

        Raises:
            [`ConfigError`]: The model cannot do what is asked. Nobody else hears of it.
        """
        check_options(model.method, **options)
        job = (model, tuple(sorted(options.items())))
        futures: list[Future] = []
        for image in images:  # one by one, so that a visitor with hundreds does not keep the others waiting
            pixels = model.backbone.transform.resize([image])
            futures.append(Future())
            self._waiting.put((job, pixels, futures[-1]))
        return [future.result() for future in futures]

    def _work(self) -> None:
        several = False
        while True:
            requests = [self._waiting.get()]
            if several:
                time.sleep(MOMENT)
            while len(requests) < LARGEST_BATCH and not self._waiting.empty():
                requests.append(self._waiting.get())
            several = len(requests) > 1
            try:
                _answer(requests)
            except BaseException as error:  # the thread must live, whatever a request holds
                _fail([future for _, _, future in requests], error)
            del requests  # nothing of a visitor's stays here while nobody asks


def _answer(requests: Sequence[tuple[Any, np.ndarray | None, Future]]) -> None:
    groups = defaultdict(list)
    for job, pixels, future in requests:
        if pixels is None:
            _settle([future], lambda job=job: [job()])
        else:
            groups[job].append((pixels, future))
    for (model, options), group in groups.items():
        pixels, futures = zip(*group, strict=True)
        _settle(futures, lambda m=model, p=pixels, o=options: classify(m.method, np.concatenate(p), **dict(o)))


def _settle(futures: Sequence[Future], compute: Callable) -> None:
    try:
        results = compute()
    except BaseException as error:  # whoever asked shall hear of it
        _fail(futures, error)
        return
    for future, result in zip(futures, results, strict=True):
        future.set_result(result)


def _fail(futures: Sequence[Future], error: BaseException) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(error)
