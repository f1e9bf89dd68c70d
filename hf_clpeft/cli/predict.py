"""`hf-clpeft predict`: labels for pictures."""

from pathlib import Path
from typing import Annotated

import typer

from .common import AsJson, BackbonePath, Repo, Token, load_model, show


def predict(
    repo: Repo,
    images: Annotated[list[Path], typer.Argument(help="Pictures.", exists=True, dir_okay=False)],
    as_json: AsJson = False,
    backbone: BackbonePath = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per forward pass.")] = 32,
    token: Token = None,
):
    """Classify pictures: label, score, and the expert that each was routed to."""
    from dataclasses import asdict

    predictions = load_model(repo, backbone, token).predict(images, batch_size=batch_size)
    rows = [{"image": str(path), **asdict(found)} for path, found in zip(images, predictions, strict=True)]
    show(rows, as_json)
