"""Progress bars: of this library, in a terminal, a notebook or a log, and of other libraries."""

import sys
from typing import Any

from tqdm.asyncio import tqdm as plain
from tqdm.auto import tqdm


EVERY = 30  # seconds between the lines of a log, which nobody watches


class _Log:
    """Standard error with a line for each state of a bar, which would fill a log with control characters."""

    def write(self, text: str) -> None:
        state = text.replace("\x1b[A", "").strip()  # up a line, for a bar below another
        if state:
            print(state, file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(*args: Any, **options: Any) -> tqdm:
    """A bar of `tqdm`; where standard error is a file or a pipe, a line every half minute.

    Args:
        *args, **options: Those of `tqdm`.

    Example:

    ```py
    >>> from hf_clpeft.training.progress import progress_bar

    >>> sum(progress_bar([1, 2, 3], desc="Adding", leave=False))
    6

    ```
    """
    in_notebook = tqdm is not plain
    if sys.stderr.isatty() or in_notebook:
        return tqdm(*args, **options)
    in_lines = {"file": _Log(), "ncols": 100, "delay": EVERY, "mininterval": EVERY, "maxinterval": 2 * EVERY}
    return tqdm(*args, **in_lines, **options)


def disable_progress_bars(transfers: bool = True) -> None:
    """Disables the progress bars of datasets, transformers and huggingface_hub.

    Args:
        transfers (`bool`, *optional*, defaults to `True`): Also disable those of uploads and downloads.

    Example:

    ```py
    >>> from hf_clpeft.training.progress import disable_progress_bars

    >>> disable_progress_bars()

    ```
    """
    import datasets
    import huggingface_hub.utils
    from transformers.utils import logging

    datasets.disable_progress_bars()
    if transfers:
        huggingface_hub.utils.disable_progress_bars()
    logging.disable_progress_bar()
