"""Runs typer programs, and reports their errors in one line."""

import sys
from collections.abc import Callable
from typing import Any

import typer

from ..config.errors import OptionError, errors_in_one_line


UsageError: Any = typer.BadParameter.__base__  # of click, or of the copy vendored by typer
SPELLINGS = {"token_normalize_func": lambda name: name.replace("_", "-")}
"""Settings of a program, and so of all its commands: `--top_k` is `--top-k`."""


def run_app(app: typer.Typer) -> None:
    """Runs a command line; errors end it with one line and exit status 1, or 2 for wrong options.

    Raises:
        `SystemExit`: Always, with the exit status.
    """
    with errors_in_one_line():
        try:
            raise SystemExit(app(standalone_mode=False))
        except typer.Abort:  # Ctrl-C or Ctrl-D at a question
            raise KeyboardInterrupt from None
        except UsageError as error:
            if not sys.argv[1:] and app.info.no_args_is_help is True:
                print(error.format_message(), file=sys.stderr)  # the help
                raise SystemExit(2) from None
            raise OptionError(f"{error.format_message().rstrip('.')}. See --help.") from error


def run_program(main: Callable) -> None:
    """Runs a script with a single function, whose arguments become options, like [`run_app`]."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=SPELLINGS)
    app.command()(main)
    run_app(app)
