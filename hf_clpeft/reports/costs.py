"""Wall-clock time of the parts of a task."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Context manager: stores its duration in `seconds[part]`."""
    start = time.perf_counter()
    yield
    seconds[part] = round(time.perf_counter() - start, 3)
