"""What a task costs in time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Notes how long something takes.

    Args:
        seconds (`dict[str, float]`): Where to note it.
        part (`str`): Under which name.
    """
    start = time.perf_counter()
    yield
    seconds[part] = round(time.perf_counter() - start, 3)
