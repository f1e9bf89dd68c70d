"""Base errors of the library, and how command-line programs report them."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from .text import one_line


CLOSED_PIPE = 13  # SIGPIPE, which Windows has not


class HfClpeftError(Exception):
    """Base class of all errors that this library raises. The message says what is wrong and what to do.

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

    exit_status = 1  # of a command-line program

    def __str__(self) -> str:
        return one_line(super().__str__())  # it may quote untrusted text


class ConfigError(HfClpeftError, ValueError):
    """An invalid configuration. The message names the field, its value, and the values allowed.

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


class NoModelError(ConfigError, FileNotFoundError):
    """A folder that holds no model.

    Example:

    ```py
    >>> from pathlib import Path

    >>> from hf_clpeft import ContinualModel
    >>> from hf_clpeft.config.errors import NoModelError

    >>> Path("photos").mkdir()
    >>> try:
    ...     ContinualModel.from_pretrained("photos")
    ... except NoModelError as error:
    ...     print(error)
    photos holds no config.json, so it is no hf_clpeft model.

    ```
    """


class OptionError(ConfigError):
    """An invalid command line or options file. The message names the option and the values allowed.

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

    exit_status = 2  # as with argparse and click


@contextmanager
def refusing_options() -> Iterator[None]:
    """Turns every [`ConfigError`] inside this context into an [`OptionError`]: its values come from a command line."""
    try:
        yield
    except OptionError:
        raise
    except ConfigError as error:
        raise OptionError(*error.args) from error


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """For command-line programs: reports errors as one line and an exit status, instead of a traceback.

    The status is 2 for a wrong command line; 130 after SIGINT, 143 after SIGTERM, and 141 without a word if nobody
    reads the output any more (`| head -1`), as in shells; else 1.

    Raises:
        `SystemExit`: On an error of this library, an `OSError`, or an interrupt.

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
        try:
            yield
        finally:
            _flush()
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(128 + getattr(error, "signal", signal.SIGINT)) from None
    except BrokenPipeError:
        _end_unread()
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # by click or rich, with 1
            _end_unread()
        raise
    except (HfClpeftError, OSError) as error:
        line = one_line(re.sub(r"^\[Errno -?\d+\] ", "", str(error)))
        status = getattr(error, "exit_status", 1)
        if status == 1:
            raise SystemExit(f"error: {line}") from error
        print(f"error: {line}", file=sys.stderr, flush=True)
        raise SystemExit(status) from error


def _flush() -> None:
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()


def _end_unread() -> NoReturn:
    """Ends a program whose output nobody reads; what Python still has of it goes nowhere."""
    if sys.stdout is not None:
        with suppress(OSError, ValueError):  # of an output that is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(128 + CLOSED_PIPE)
