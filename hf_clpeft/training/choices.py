"""What `hf-clpeft learn` chooses where nothing is said."""

import math
import re
from collections.abc import Collection

from accelerate.utils.memory import should_reduce_batch_size

from ..backbones.bundled import BUNDLED_BACKBONES
from ..config.checks import LONGEST_NAME
from ..config.hub_client import hub_client
from ..config.hub_errors import HubError, explained
from ..config.text import get_logger


logger = get_logger(__name__)

RECOMMENDED = "slda_pp"  # see docs/slda_pp.md
USUAL_BACKBONE = "google/vit-base-patch16-224-in21k"
GLYPHS_BACKBONE = next(iter(BUNDLED_BACKBONES))
FILES = ("config.json", "model.safetensors")
BATCHES = 8  # of an epoch, at least
SMALLEST_BATCH, LARGEST_BATCH = 8, 128
STEPS = 100
FEWEST_EPOCHS, MOST_EPOCHS = 5, 20


def choose_backbone(token: str | None = None) -> tuple[str, str]:
    """The usual ViT-B/16 if it is in the cache or on a Hub that can be reached; else the bundled one. And why."""
    from huggingface_hub import try_to_load_from_cache

    if all(isinstance(try_to_load_from_cache(USUAL_BACKBONE, name), str) for name in FILES):
        return USUAL_BACKBONE, "the usual one, which is in the cache"
    try:
        with explained("look for", USUAL_BACKBONE):
            found = hub_client(token).file_exists(USUAL_BACKBONE, FILES[0])
        why = "is not on this Hub"
    except HubError as error:
        logger.info("%s", error)
        found, why = False, "is not in the cache, and the Hub cannot be asked for it"
    if found:
        return USUAL_BACKBONE, "the usual one, from the Hub"
    return GLYPHS_BACKBONE, f"bundled, as {USUAL_BACKBONE} {why}"


def choose_name(title: str, taken: Collection[str]) -> str:
    """Name of a task: that of its folder or data set, as far as it can be a tag, and with a number if it is taken.

    Example:

    ```py
    >>> from hf_clpeft.training.choices import choose_name

    >>> choose_name("Birds of May!", []), choose_name("new", ["new", "new-2"])
    ('Birds-of-May', 'new-3')

    ```
    """
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", title)[: LONGEST_NAME - 8].strip("-_") or "task"
    names, number, name = {each.lower() for each in taken}, 1, stem
    while name.lower() in names:
        number += 1
        name = f"{stem}-{number}"
    return name


def choose_batch_size(images: int) -> int:
    """A power of two with eight batches or more in an epoch, from 8 to 128.

    Example:

    ```py
    >>> from hf_clpeft.training.choices import choose_batch_size

    >>> choose_batch_size(60), choose_batch_size(300), choose_batch_size(50_000)
    (8, 32, 128)

    ```
    """
    return min(LARGEST_BATCH, max(SMALLEST_BATCH, 2 ** int(math.log2(max(images, BATCHES) / BATCHES))))


def choose_epochs(images: int, batch_size: int) -> int:
    """As many as make a hundred steps, from 5 to 20.

    Example:

    ```py
    >>> from hf_clpeft.training.choices import choose_epochs

    >>> choose_epochs(60, 8), choose_epochs(50_000, 128)
    (13, 5)

    ```
    """
    return min(MOST_EPOCHS, max(FEWEST_EPOCHS, math.ceil(STEPS / math.ceil(max(images, 1) / batch_size))))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a smaller batch may help."""
    return should_reduce_batch_size(error) or "out of memory" in str(error)
