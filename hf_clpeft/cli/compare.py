"""`hf-clpeft compare`: methods side by side on one's own pictures or a benchmark."""

import typer


ABOUT = """Measure methods side by side: a table, plots, and a CSV that later runs add to.

DATA is a folder with a folder for each class, the id of a data set on the Hub, or the name of a benchmark; its classes
are split into tasks that are learnt one after another. The same command goes on where it was stopped.

    hf-clpeft compare my/pictures --methods slda_pp ncm s_lora --seeds 0 1 2"""


def compare(context: typer.Context) -> None:
    """Measure methods side by side on your pictures or a benchmark: table, plots and a CSV."""
    from ..comparing import compare as run

    run(context.args, program="hf-clpeft compare", about=ABOUT)
