"""How a program of typer is run: what it refuses is told in one line."""

import sys
from collections.abc import Callable
from typing import Any

import typer

from ..config.errors import OptionError, errors_in_one_line


UsageError: Any = typer.BadParameter.__base__  # of click, or of typer's own copy


def run_app(app: typer.Typer) -> None:
    """Runs a command line; what is refused becomes one line and exit status 1, or 2 where options are wrong.

    Args:
        app (`typer.Typer`): Its commands.

    Raises:
        `SystemExit`: Always, as programs end.
    """
    with errors_in_one_line():
        try:
            raise SystemExit(app(standalone_mode=False))
        except UsageError as error:
            if not sys.argv[1:] and app.info.no_args_is_help is True:
                print(error.format_message(), file=sys.stderr)  # the help
                raise SystemExit(2) from None
            raise OptionError(f"{error.format_message().rstrip('.')}. See --help.") from error


def run_program(main: Callable) -> None:
    """The same for a script that is a single function.

    Args:
        main (callable): Its arguments are those of the command line, as for `typer.run`.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    run_app(app)
