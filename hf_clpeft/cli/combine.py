"""`hf-clpeft combine`: merges the experts of several models into one model."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from .common import AsJson, BackbonePath, Overwrite, Token, quieten, show


def combine(
    sources: Annotated[list[str], typer.Argument(help="Repo ids, repo@revision, or folders; two or more.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the combined model into.")],
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    backbone: BackbonePath = None,
    token: Token = None,
) -> None:
    """Combine the experts of several models into one model, without training."""
    from ..combining import combine as combine_models

    quieten()
    model = combine_models(sources, backbone=backbone, token=token)
    model.save_pretrained(output, overwrite)
    show(
        {
            "folder": str(output),
            "tasks": [task.name for task in model.config.tasks],
            "classes": len(model.config.classes),
            "next": f"hf-clpeft push {quote(str(output))} REPO",
        },
        as_json,
    )
