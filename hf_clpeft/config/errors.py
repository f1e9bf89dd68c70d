"""What the library refuses, in words that say what to do."""

import re
import signal
import sys
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

    exit_status = 1  # of a program that ends with it

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


class OptionError(ConfigError):
    """A command line, or a file of options, that cannot be meant. The message names the option and what is allowed.

    Example:

    ```py
    >>> from hf_clpeft.config.errors import OptionError
    >>> from hf_clpeft.training.options import StreamArguments, parse

    >>> try:
    ...     parse((StreamArguments,), ["--bench", "digits"])
    ... except OptionError as error:
    ...     print(error)
    There is no option --bench; did you mean --benchmark? See --help.

    ```
    """

    exit_status = 2  # as every parser of command lines ends


@contextmanager
def refusing_options() -> Iterator[None]:
    """Turns every [`ConfigError`] inside this context into an [`OptionError`]: its values came from a command line."""
    try:
        yield
    except OptionError:
        raise
    except ConfigError as error:
        raise OptionError(*error.args) from error


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """For programs: ends with one line and an exit status, rather than a traceback, on what the library refuses.

    The status is 2 where the command line is wrong, 130 and 143 after SIGINT and SIGTERM, as shells have it, else 1.

    Raises:
        `SystemExit`: Something was refused, a file cannot be read or written, or the program was interrupted.

    Example:

    ```py
    >>> from hf_clpeft import s_lora
    >>> from hf_clpeft.config.errors import errors_in_one_line

    >>> with errors_in_one_line():
    ...     s_lora(k=0)
    Traceback (most recent call last):
        ...
    SystemExit: error: k=0 must be a whole number of prototypes per task, 1 or more, or 'auto'.

    ```
    """
    try:
        yield
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(128 + getattr(error, "signal", signal.SIGINT)) from None
    except (HfClpeftError, OSError) as error:
        line = one_line(re.sub(r"^\[Errno -?\d+\] ", "", str(error)))
        status = getattr(error, "exit_status", 1)
        if status == 1:
            raise SystemExit(f"error: {line}") from error
        print(f"error: {line}", file=sys.stderr, flush=True)
        raise SystemExit(status) from error
