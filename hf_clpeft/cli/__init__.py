"""The command `hf-clpeft`: one file a command, each a thin layer over a function of the library.

Heavy libraries are imported when a command runs, so that `--help` is there at once.
"""

import typer

from ..errors import told_in_one_line
from .combine import combine
from .demo import demo
from .env import env
from .export import export
from .info import info
from .migrate import migrate
from .predict import predict
from .push import push
from .test import test


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
    """Runs the command line; what the library refuses becomes one line and exit code 1."""
    with told_in_one_line():
        app()
