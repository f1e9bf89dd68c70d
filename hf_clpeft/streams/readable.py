"""Leaves out images that cannot be decoded, before a data set is split into tasks."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice

from ..backbones.pictures import PictureError, open_image
from ..config.text import get_logger
from .source import ROW, ImageSource, StreamError


logger = get_logger(__name__)

AT_ONCE = 64  # encoded images in memory
MOST_LISTED = 5  # images in a message


def leave_out_unreadable(sources: Sequence[ImageSource], most: int | float) -> None:
    """Leaves images out of splits that cannot be decoded, and names them.

    Args:
        sources (sequence of [`ImageSource`]): Splits of a data set, not streamed; they are modified.
        most (`int` or `float`): How many may be left out of all of them together; or which share, but always one.

    Raises:
        [`StreamError`]: There are more, or a class of the first split has no others.

    Example:

    ```py
    >>> from datasets import Dataset, Image as ImageColumn
    >>> from PIL import Image
    >>> from hf_clpeft.streams import ImageSource
    >>> from hf_clpeft.streams.readable import leave_out_unreadable

    >>> Image.new("RGB", (8, 8)).save("good.png")
    >>> rows = Dataset.from_dict({"image": ["good.png", "bad.png"], "label": ["cat", "cat"]})
    >>> source = ImageSource(rows.cast_column("image", ImageColumn()), name="pets", split="train")
    >>> leave_out_unreadable([source], most=0.1)
    >>> len(source.dataset)
    1

    ```
    """
    found = [_unreadable(source) for source in sources]
    problems, total = [each for bad in found for each in bad.values()], sum(len(each.dataset) for each in sources)
    if not problems:
        return
    what = f"{len(problems)} of {total} images cannot be read: {'; '.join(problems[:MOST_LISTED])}"
    what += f"; and {len(problems) - MOST_LISTED} more" * (len(problems) > MOST_LISTED)
    name = sources[0].title.partition(", split ")[0]
    name = name[0].upper() + name[1:]
    allowed = max(1, int(most * total)) if isinstance(most, float) else most
    if len(problems) > allowed:
        limit = f"{allowed} may be left out" + f", {most:.0%} of them" * isinstance(most, float)
        raise StreamError(
            f"{name}: {what}. Only {limit}: mend or delete them, or allow --max_bad_images {len(problems)}."
        )
    before = sources[0].present()
    for source, bad in zip(sources, found, strict=True):
        source.leave_out(bad)
    lost = sorted(set(before) - set(sources[0].present())) if len(sources[0].dataset) else before
    if lost:
        raise StreamError(f"{name}: {what}. No image of {', '.join(lost)} is left: mend them, or take the class out.")
    logger.warning("%s: %s. They are left out.", name, what)


def _unreadable(source: ImageSource) -> dict[int, str]:
    """What is wrong with images, by their position."""
    rows, said = iter(source.dataset.select_columns([source.image_column, ROW])), list[str]()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        while some := list(islice(rows, AT_ONCE)):  # threads take up all that they are given, before the first is done
            said += threads.map(partial(_problem, source.image_column), some)
    return {position: problem for position, problem in enumerate(said) if problem}


def _problem(column: str, row: dict) -> str:
    encoded = row[column]
    try:
        open_image(encoded)
    except PictureError as error:
        path = encoded.get("path") if isinstance(encoded, dict) else None
        return str(error).rstrip(".") if path else f"row {row[ROW]} ({str(error).rstrip('.')})"
    return ""
