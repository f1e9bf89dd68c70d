"""Fingerprints of training and test data, so that a run is not resumed on other images."""

import xxhash

from ..config.text import get_logger
from ..streams import StreamedImages, Task, TaskImages


logger = get_logger(__name__)


def fingerprint(images: TaskImages | StreamedImages) -> str:
    """Hash of the resized images of a split, their labels and their order.

    All pixels are hashed, as the fingerprints of `datasets` differ between processes for data in memory, and do not
    notice edited files. xxHash runs at memory speed, while SHA-256 would cost some percent of an epoch; it is not
    cryptographic, and detects accidental changes only.

    For streamed images, only their number and the cached sample of at most 20,000 images are hashed, so that a few
    edited images may not be noticed.

    Args:
        images ([`TaskImages`] or [`StreamedImages`]): Training or test images of a task.

    Returns:
        `str`: 32 hexadecimal digits, the same in every process.

    Example:

    ```py
    >>> from hf_clpeft.backbones import load_backbone
    >>> from hf_clpeft.streams import cache_images, load_benchmark
    >>> from hf_clpeft.training.fingerprint import fingerprint

    >>> transform, (first, second, *_) = load_backbone("hf-clpeft/vit-tiny-glyphs").transform, load_benchmark("digits")
    >>> of = [fingerprint(cache_images(split, transform)) for split in (first.test, first.test, second.test)]
    >>> of[0] == of[1] != of[2]
    True

    ```
    """
    stored = images.sample if isinstance(images, StreamedImages) else images
    digest = xxhash.xxh3_128(repr((type(images).__name__, len(images), stored.shape)).encode())
    digest.update(stored.labels.tobytes())
    for table in stored.dataset.select_columns(["pixels"]).with_format("arrow").iter(batch_size=256):
        for pixels in table["pixels"]:
            digest.update(pixels.as_buffer())
    return digest.hexdigest()


def describe(task: Task, position: int, images: TaskImages | StreamedImages) -> dict:
    """What the training of a task depends on besides arguments and model, JSON-serialisable.

    The task's index in the model is included, as it determines random seeds.
    """
    return {"classes": [list(task.classes), task.domain], "position": position, "data": fingerprint(images)}


def note_pictures(environment: dict, task: str, trained_on: dict, test: TaskImages | None) -> None:
    """Adds the fingerprints of a task's training and test images to a report's `environment`."""
    tested_on = None if test is None else fingerprint(test)
    environment["pictures"][task] = {"train": trained_on["data"], "test": tested_on}


def same_pictures(environment: dict, task: str, test: TaskImages) -> bool:
    """Whether a task's test images have the fingerprint in a report's `environment`, which is then updated."""
    noted = environment["pictures"].get(task)
    if not isinstance(noted, dict):
        return True
    before, noted["test"] = noted.get("test"), fingerprint(test)
    if before in (None, noted["test"]):
        return True
    logger.warning(
        "%s was tested on other images before: its accuracies then and from now on do not compare, and what it has "
        "learnt of the images that were there stays.",
        task,
    )
    return False
