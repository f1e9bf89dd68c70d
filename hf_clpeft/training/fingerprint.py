"""What a task is trained on, in a few characters: so that nothing is gone on with on other pictures."""

import xxhash

from ..config.text import get_logger
from ..streams import StreamedImages, Task, TaskImages


logger = get_logger(__name__)


def fingerprint(images: TaskImages | StreamedImages) -> str:
    """Hash of the images of a split as a backbone sees them, of their labels, and of their order.

    It is of the resized pixels, all of them: `datasets` gives data in memory a new fingerprint in every process, and
    says nothing of files that were edited underneath. xxHash is as fast as the memory, where SHA-256 would cost some
    percent of an epoch; it finds what has changed, and is no protection against somebody who wants to fool it.

    Of images that are streamed, which no disk holds, it is the number and the sample that teaches the router, up to
    20,000 of them: another data set is found, a few edited pictures may not be.

    Args:
        images ([`TaskImages`] or [`StreamedImages`]): What a task is trained or tested on.

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
    """What the training of a task depends on besides the arguments and the model, ready for JSON.

    Args:
        task ([`Task`]): The task.
        position (`int`): Its place in the model; seeds follow from it.
        images ([`TaskImages`] or [`StreamedImages`]): What it is trained on.
    """
    return {"classes": [list(task.classes), task.domain], "position": position, "data": fingerprint(images)}


def note_pictures(environment: dict, task: str, trained_on: dict, test: TaskImages | None) -> None:
    """Writes into a report's `environment` what a task was trained and tested on."""
    tested_on = None if test is None else fingerprint(test)
    environment["pictures"][task] = {"train": trained_on["data"], "test": tested_on}


def same_pictures(environment: dict, task: str, test: TaskImages) -> bool:
    """Whether a task is tested again on the images that a report's `environment` says; notes those that it is."""
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
