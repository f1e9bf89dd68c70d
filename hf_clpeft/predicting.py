"""From pictures to predictions: what may be asked of a model is checked, pictures are read, answers put in words."""

from collections.abc import Iterable, Iterator
from itertools import islice
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
from tqdm.auto import tqdm

from .backbones.pictures import KINDS, PictureError, is_picture, open_image
from .config.errors import ConfigError
from .prediction import Prediction, read_output


if TYPE_CHECKING:
    from .model import ContinualModel

ALL_AT_ONCE = -1  # as a batch size, as in `datasets`


def check_options(
    model: "ContinualModel", batch_size: Any = 1, reject_rate: Any = None, expert: Any = None, top_k: Any = 1
) -> None:
    """Checks what [`ContinualModel.predict`] is asked, of whatever type it is.

    Raises:
        [`ConfigError`]: The model cannot do that.

    Example:

    ```py
    >>> from hf_clpeft import ContinualModel
    >>> from hf_clpeft.predicting import check_options

    >>> check_options(ContinualModel.from_pretrained("hf-clpeft/s-lora-digits"), batch_size=0)
    Traceback (most recent call last):
        ...
    hf_clpeft.config.errors.ConfigError: batch_size=0 must be a whole number, 1 or more, or -1 for all images at once.

    ```
    """
    if not model.config.tasks:
        raise ConfigError("This model has learnt no task yet; call ContinualTrainer(model, ...).learn(task) first.")
    for name, value in (("batch_size", batch_size), ("top_k", top_k)):
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not whole or value < 1 and (name, value) != ("batch_size", ALL_AT_ONCE):
            or_all = f", or {ALL_AT_ONCE} for all images at once" if name == "batch_size" else ""
            raise ConfigError(f"{name}={_brief(value)} must be a whole number, 1 or more{or_all}.")
    if reject_rate is not None:
        _check_reject_rate(model, reject_rate)
    if expert is not None:
        _check_expert(model, expert)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _check_reject_rate(model: "ContinualModel", reject_rate: Any) -> None:
    method = model.config.method
    if model.router.knows_classes or not method.routed:
        raise ConfigError(
            f"reject_rate needs prototypes, and {method.name} has none: choose an S-X method with router='prototypes'."
        )
    if not model.can_reject:
        calibrated = zip(model.config.tasks, model.router.calibrated(), strict=True)
        unknown = [task.name for task, known in calibrated if not known]
        raise ConfigError(
            f"reject_rate needs to know how far a task's images lie from its prototypes, but {unknown[:3]} had a "
            "single image, or were saved before that was measured. Learn them again, or remove them."
        )
    number = isinstance(reject_rate, Real) and not isinstance(reject_rate, bool)
    if not number or not 0.01 <= reject_rate <= 1:
        raise ConfigError(f"reject_rate={_brief(reject_rate)} must be a number between 0.01 and 1.")


def _check_expert(model: "ContinualModel", expert: Any) -> None:
    method, names = model.config.method, model.bank.names
    if method.experts == "pool":
        raise ConfigError(f"expert={_brief(expert)}: {method.name} selects from a pool; none can be chosen by hand.")
    if not method.uses_experts:
        raise ConfigError(f"expert={_brief(expert)}: no expert judges images in {method.name}.")
    if not isinstance(expert, str) or expert not in names:
        raise ConfigError(f"expert={_brief(expert)} is not one of {', '.join(names)}.")


def best_device() -> torch.device:
    """The accelerator of this machine, such as `cuda` or `mps`, or the CPU where there is none.

    Example:

    ```py
    >>> from hf_clpeft.predicting import best_device

    >>> best_device().type in ("cpu", "cuda", "mps", "xpu", "npu", "hpu")
    True

    ```
    """
    # Without the first, a torch that was built for GPUs names one on a machine that has none.
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def read_batches(images: Any, batch_size: int, show_progress_bar: bool = False) -> Iterator[Iterable[PIL.Image.Image]]:
    """Pictures in batches, each read when it is asked for.

    Args:
        images (one picture, or an iterable of them): See [`open_image`].
        batch_size (`int`): Pictures per batch; -1: all in one.
        show_progress_bar (`bool`, *optional*, defaults to `False`): Show how far it is.

    Yields:
        Iterable of RGB images: read it to its end before the next one.

    Raises:
        [`PictureError`]: Something is no picture; the message says which.
    """
    if is_picture(images):
        yield [open_image(images)]
        return
    try:
        pictures = enumerate(images)
    except TypeError:
        pictures = None
    if pictures is None or isinstance(images, set | frozenset):  # a set has no order in which to answer
        raise PictureError(f"images is of type {type(images).__name__}; give {KINDS}, or several of them in a list.")
    count = len(images) if hasattr(images, "__len__") else None
    with tqdm(total=count, desc="Predicting", unit="image", disable=not show_progress_bar) as bar:
        while batch := list(islice(pictures, None if batch_size == ALL_AT_ONCE else batch_size)):
            yield (open_image(picture, f"images[{number}]") for number, picture in batch)
            bar.update(len(batch))


@torch.no_grad()
def classify(
    model: "ContinualModel",
    pixels: np.ndarray,
    reject_rate: float | None = None,
    expert: str | None = None,
    top_k: int = 1,
) -> list[Prediction]:
    """Classifies images that have been read and resized, in one forward pass. Options are checked already.

    Args:
        model ([`ContinualModel`]): A model that has learnt a task.
        pixels (`uint8` array of shape `(batch, 3, height, width)`): What [`ImageTransform.resize`] gives.
        reject_rate, expert, top_k: See [`ContinualModel.predict`].

    Returns:
        `list[Prediction]`: One per image.
    """
    values = model.backbone.transform.normalize(torch.from_numpy(pixels).to(model.device))
    with model.bank.reading():  # a batch is answered from one state of the model, whatever other threads do
        check_options(model, reject_rate=reject_rate, expert=expert)
        output = model(values, None if expert is None else model.bank.names.index(expert))
        typicality = None
        if model.can_reject:
            assert output.distances is not None
            typicality = model.router.typicality(output.distances).amax(dim=1)
        experts = model.bank.names if model.config.method.uses_experts else []
        return read_output(output, model.config.classes, experts, typicality, reject_rate or 0.0, top_k)
