"""The command `hf-clpeft`: one file per command, each a thin wrapper of a function of the library.

Heavy libraries are imported when a command runs, so that `--help` is fast.
"""

import typer

from .card import card
from .combine import combine
from .compare import compare
from .demo import demo
from .env import env
from .evaluate import evaluate
from .export import export
from .info import info
from .learn import learn
from .migrate import migrate
from .predict import predict
from .push import push
from .remove import remove
from .run import SPELLINGS, run_app
from .test import test


app = typer.Typer(
    name="hf-clpeft",
    help="Continual learning with PEFT adapters on a frozen vision transformer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=SPELLINGS,
)
for parsing in (learn, compare):  # their words themselves, as options depend on the method
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(context_settings=settings, add_help_option=False)(parsing)
for command in (demo, info, predict, evaluate, remove, combine, push, card, export, migrate, env, test):
    app.command()(command)


def main() -> None:
    """Runs the command line; errors end it with one line and exit status 1, or 2 for wrong options."""
    run_app(app)
