"""Options and output shared by several commands."""

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ..config.text import printable, printable_json
from ..reports.tables import print_table


if TYPE_CHECKING:
    from ..model import ContinualModel


MOST_NAMED = 20  # files that cannot be read

Repo = Annotated[str, typer.Argument(help="Repo id, repo@revision, or folder of a model.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a different model in the folder.")]
AsJson = Annotated[bool, typer.Option("--json", "--as-json", help="Print JSON.")]
Token = Annotated[str | None, typer.Option(help="Access token; default: the one saved by `hf auth login`.")]
BackbonePath = Annotated[str | None, typer.Option("--backbone", help="Repo or folder of the backbone, if moved.")]

Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: a GPU if there is one.")]


def show(values: dict | list[dict], as_json: bool, title: str = "") -> None:
    """Prints a mapping as lines, a list of mappings as a table, or either as JSON."""
    if as_json:
        print(printable_json(json.dumps(values, indent=2, ensure_ascii=False)))
    elif isinstance(values, dict):
        width = max(map(len, values), default=0)
        for name, value in values.items():
            print(f"{name:<{width}}  {printable(value)}")
    else:
        rows = [[f"{cell:.3f}" if isinstance(cell, float) else cell for cell in row.values()] for row in values]
        print_table(title, list(values[0]) if values else [], rows)


def quieten() -> None:
    """Disables the libraries' progress bars; in a terminal, those of uploads and downloads stay."""
    from ..training.progress import disable_progress_bars  # which loads torch

    disable_progress_bars(transfers=not sys.stderr.isatty())


def load_model(repo: str, backbone: str | None, token: str | None, device: str | None) -> "ContinualModel":
    """Loads the [`ContinualModel`] of a command's arguments to a device."""
    from ..config.repos import split_revision
    from ..model import ContinualModel
    from ..prediction import best_device

    quieten()
    place, (name, revision) = best_device(device), split_revision(repo)
    return ContinualModel.from_pretrained(name, backbone=backbone, revision=revision, token=token).to(place)


def end_with(bad: list[str]) -> None:
    """Names pictures that could not be read, if any, and ends the command with exit status 1."""
    if not bad:
        return
    more = [f"... and {len(bad) - MOST_NAMED} more"] if len(bad) > MOST_NAMED else []
    several = [f"error: {len(bad)} pictures cannot be read:", *bad[:MOST_NAMED], *more]
    print(*([f"error: {bad[0]}"] if len(bad) == 1 else several), sep="\n", file=sys.stderr)
    raise typer.Exit(1)
