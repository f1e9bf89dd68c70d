"""Prediction: validates options, decodes images in batches, and converts logits to predictions."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Integral, Real
from typing import Any

import numpy as np
import PIL.Image
import torch
from tqdm.auto import tqdm

from .backbones.pictures import KINDS, PictureError, is_picture, open_image
from .config import ConfigError
from .methods import ContinualOutput, Method


ALL_AT_ONCE = -1  # a batch size, as in `datasets`


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image.

    Args:
        label (`str`, *optional*): Name of the likeliest class; `None` if the image is rejected as out-of-distribution.
        score (`float`): Softmax score of the likeliest class, in [0, 1]; 1 for a single-class task.
        expert (`str`, *optional*): Name of the expert used, the nearest one if there are several; `None` if the method
            has none.
        distance (`float`): Distance of the query features to that expert, or to the nearest task, as the router
            measures it: in [0, 2] for prototypes and keys.
        typicality (`float`, *optional*): Conformal p-value: how many of a task's own images are at least as far from
            its prototypes or classes, in steps of 0.01; see [`Router.typicality`]. `None` if the model is not
            calibrated.
        classes (`dict[str, float]`): Scores of the `top_k` likeliest classes, in descending order.
        experts (`dict[str, float]`): Distances of the `top_k` nearest experts, in ascending order.

    Example:

    ```py
    >>> from hf_clpeft import Prediction

    >>> Prediction("cat", 0.98, "task-000", 0.41, 0.38, {"cat": 0.98}, {"task-000": 0.41}).label
    'cat'

    ```
    """

    label: str | None
    score: float
    expert: str | None
    distance: float
    typicality: float | None
    classes: dict[str, float]
    experts: dict[str, float]


def read_output(
    output: ContinualOutput,
    classes: Sequence[str],
    experts: Sequence[str],
    typicality: torch.Tensor | None,
    reject_rate: float,
    top_k: int,
) -> list[Prediction]:
    """Converts the output of a batch to one [`Prediction`] per image.

    Args:
        output ([`ContinualOutput`]): Output of the model.
        classes (sequence of `str`): Class names, in the order of the logits.
        experts (sequence of `str`): Expert names, in the order of the distances.
        typicality (`torch.Tensor` of shape `(batch,)`, *optional*): Conformal p-values.
        reject_rate (`float`): The label of images with a lower p-value is withheld.
        top_k (`int`): Number of classes and of experts in each prediction.
    """
    assert output.logits is not None and output.selection is not None and output.distances is not None
    scores, likeliest = output.logits.softmax(dim=1).topk(min(top_k, len(classes)))
    nearest_distances, nearest = output.distances.topk(min(top_k, len(experts)), largest=False)
    chosen = output.selection.reshape(len(scores), -1)[:, 0]
    distance = output.distances.gather(1, chosen[:, None])[:, 0]
    columns = [scores, likeliest, nearest_distances, nearest, chosen, distance]
    given = on_host(columns if typicality is None else [*columns, typicality])
    predictions = []
    for image_scores, image_classes, far, near, expert, its_distance, *typicalities in zip(*given, strict=True):
        # Rounded, as 0.05 in float32 differs from 0.05 in Python.
        typical = round(typicalities[0], 2) if typicalities else None
        rejected = typical is not None and typical < reject_rate
        predictions.append(
            Prediction(
                label=None if rejected else classes[image_classes[0]],
                score=image_scores[0],
                expert=experts[expert] if experts else None,
                distance=its_distance,
                typicality=typical,
                classes={classes[number]: score for number, score in zip(image_classes, image_scores, strict=True)},
                experts={experts[number]: value for number, value in zip(near, far, strict=True)},
            )
        )
    return predictions


def on_host(columns: Sequence[torch.Tensor]) -> list[list]:
    """Tensors with a row for each image as lists, by one copy: with one for each, a GPU is waited for as often.

    Indices up to 2²⁴ stay exact.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.prediction import on_host

    >>> on_host([torch.tensor([7, 8]), torch.tensor([[0.5], [0.25]])])
    [[7, 8], [[0.5], [0.25]]]

    ```
    """
    flat = [column.flatten(1) if column.dim() > 1 else column[:, None] for column in columns]
    parts = torch.cat([part.float() for part in flat], dim=1).cpu().split([part.shape[1] for part in flat], dim=1)
    return [part.to(of.dtype).reshape(of.shape).tolist() for part, of in zip(parts, columns, strict=True)]


def check_options(
    method: Method, batch_size: Any = 1, reject_rate: Any = None, expert: Any = None, top_k: Any = 1
) -> None:
    """Validates the options of [`ContinualModel.predict`].

    Raises:
        [`ConfigError`]: An option has a wrong type or value, or is not supported by the method.

    Example:

    ```py
    >>> from hf_clpeft import ContinualModel
    >>> from hf_clpeft.prediction import check_options

    >>> check_options(ContinualModel.from_pretrained("hf-clpeft/s-lora-digits").method, batch_size=0)
    Traceback (most recent call last):
        ...
    hf_clpeft.config.errors.ConfigError: batch_size=0 must be a whole number, 1 or more, or -1 for all images at once.

    ```
    """
    if not method.config.tasks:
        raise ConfigError("This model has learnt no task yet; call ContinualTrainer(model, ...).learn(task) first.")
    for name, value in (("batch_size", batch_size), ("top_k", top_k)):
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not whole or value < 1 and (name, value) != ("batch_size", ALL_AT_ONCE):
            or_all = f", or {ALL_AT_ONCE} for all images at once" if name == "batch_size" else ""
            raise ConfigError(f"{name}={_brief(value)} must be a whole number, 1 or more{or_all}.")
    if reject_rate is not None:
        why_not = method.why_no_reject()
        if why_not is not None:
            raise ConfigError(why_not)
        number = isinstance(reject_rate, Real) and not isinstance(reject_rate, bool)
        if not number or not 0.01 <= reject_rate <= 1:
            raise ConfigError(f"reject_rate={_brief(reject_rate)} must be a number between 0.01 and 1.")
    if expert is not None:
        method.choose(expert if isinstance(expert, str) else _brief(expert))


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def best_device(name: str | None = None) -> torch.device:
    """The accelerator of this machine, such as `cuda` or `mps`; the CPU if there is none.

    Args:
        name (`str`, *optional*): Another device to use, for example `"cpu"` or `"cuda:1"`.

    Raises:
        [`ConfigError`]: This machine has no such device.

    Example:

    ```py
    >>> from hf_clpeft.prediction import best_device

    >>> best_device().type in ("cpu", "cuda", "mps", "xpu", "npu", "hpu")
    True

    ```
    """
    # `current_accelerator` alone returns `cuda` on any machine with a CUDA build of torch.
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    best = accelerator or torch.device("cpu")
    if name is None:
        return best
    try:
        torch.ones(1).to(name).cpu()  # on "meta", which every machine knows, there is nothing to copy
        return torch.device(name)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ConfigError(
            f"device={_brief(name)} is not a device that this machine has; it has {best.type}. Leave it out for that."
        ) from error


def read_batches(images: Any, batch_size: int, show_progress_bar: bool = False) -> Iterator[Iterable[PIL.Image.Image]]:
    """Decodes images lazily in batches; arguments as for [`ContinualModel.predict`].

    Yields:
        Iterable of RGB images, to be exhausted before the next one.

    Raises:
        [`PictureError`]: An input is not an image; the message says which.
    """
    if is_picture(images):
        yield [open_image(images)]
        return
    try:
        pictures = enumerate(images)
    except TypeError:
        pictures = None
    if pictures is None or isinstance(images, set | frozenset):  # a set has no order
        raise PictureError(f"images is of type {type(images).__name__}; give {KINDS}, or several of them in a list.")
    count = len(images) if hasattr(images, "__len__") else None
    with tqdm(total=count, desc="Predicting", unit="image", disable=not show_progress_bar) as bar:
        while batch := list(islice(pictures, None if batch_size == ALL_AT_ONCE else batch_size)):
            yield (open_image(picture, f"images[{number}]") for number, picture in batch)
            bar.update(len(batch))


@torch.no_grad()
def classify(
    method: Method,
    pixels: np.ndarray,
    reject_rate: float | None = None,
    expert: str | None = None,
    top_k: int = 1,
) -> list[Prediction]:
    """Classifies decoded images in one forward pass; returns one [`Prediction`] per image.

    Args:
        method ([`Method`]): Method of a model that has learnt a task.
        pixels (`uint8` array of shape `(batch, 3, height, width)`): From [`ImageTransform.resize`].
        reject_rate, expert, top_k: See [`ContinualModel.predict`].
    """
    values = method.backbone.transform.normalize(
        torch.from_numpy(pixels).to(method.backbone.device, non_blocking=True)
    )
    with method.bank.reading(), method.bank.sharing():  # no other thread changes the model within a batch
        check_options(method, reject_rate=reject_rate, expert=expert)
        query = method.query(values)
        output = method(values, query, expert=None if expert is None else method.choose(expert))
        typicality = method.typicality(query, output.distances) if method.why_no_reject() is None else None
        measured = method.reads and output.distances.shape[1] == len(method.bank)
        experts = method.bank.names if measured else []
        return read_output(output, method.config.classes, experts, typicality, reject_rate or 0.0, top_k)
