"""What the library refuses, in words that say what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from .text import one_line


class HfClpeftError(Exception):
    """The base of every error of this library: a mistake or a mishap that has a way out, which the message tells.

    Example:

    ```py
    >>> from hf_clpeft import HfClpeftError, s_lora

    >>> try:
    ...     s_lora(k=0)
    ... except HfClpeftError as error:
    ...     print(type(error).__name__)
    ConfigError

    ```
    """

    def __str__(self) -> str:
        return one_line(super().__str__())  # it may quote a stranger


class ConfigError(HfClpeftError, ValueError):
    """A configuration that cannot work. The message says which field, what it was and what it may be.

    Example:

    ```py
    >>> from hf_clpeft import ConfigError, s_lora

    >>> try:
    ...     s_lora(k=0)
    ... except ConfigError as error:
    ...     print(error)
    k=0 must be a whole number of prototypes per task, 1 or more, or 'auto'.

    ```
    """


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """For programs: ends with one line and exit code 1, rather than a traceback, on what the library refuses.

    Raises:
        `SystemExit`: Something was refused, or a file cannot be read or written.

    Example:

    ```py
    >>> from hf_clpeft import s_lora
    >>> from hf_clpeft.errors import told_in_one_line

    >>> with told_in_one_line():
    ...     s_lora(k=0)
    Traceback (most recent call last):
        ...
    SystemExit: error: k=0 must be a whole number of prototypes per task, 1 or more, or 'auto'.

    ```
    """
    try:
        yield
    except (HfClpeftError, OSError) as error:
        raise SystemExit(f"error: {one_line(error)}") from error
