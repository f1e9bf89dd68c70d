"""The command `hf-clpeft`: one file a command, each a thin layer over a function of the library.

Heavy libraries are imported when a command runs, so that `--help` is there at once.
"""

import sys
from typing import Any

import typer

from ..errors import OptionError, told_in_one_line
from .combine import combine
from .demo import demo
from .env import env
from .export import export
from .info import info
from .migrate import migrate
from .predict import predict
from .push import push
from .test import test


UsageError: Any = typer.BadParameter.__base__  # of click, or of typer's own copy

app = typer.Typer(
    name="hf-clpeft",
    help="Continual learning with PEFT adapters on a frozen vision transformer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo, info, predict, combine, push, export, migrate, env, test):
    app.command()(command)


def main() -> None:
    """Runs the command line; what is refused becomes one line and exit status 1, or 2 where options are wrong."""
    with told_in_one_line():
        try:
            raise SystemExit(app(standalone_mode=False))
        except UsageError as error:
            if not sys.argv[1:]:
                print(error.format_message(), file=sys.stderr)  # the help
                raise SystemExit(2) from None
            raise OptionError(f"{error.format_message().rstrip('.')}. See --help.") from error
