"""`hf-clpeft predict`: classifies pictures."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .common import AsJson, BackbonePath, Device, Repo, Token, load_model, show


def predict(
    repo: Repo,
    images: Annotated[list[Path], typer.Argument(help="Pictures.", exists=True, dir_okay=False)],
    as_json: AsJson = False,
    backbone: BackbonePath = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per forward pass.")] = 32,
    reject_rate: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=1,
            help="Withhold the label of out-of-distribution pictures; at most this share of in-distribution ones is "
            "withheld by mistake.",
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Likeliest classes and nearest experts in the JSON.")] = 1,
    token: Token = None,
    device: Device = None,
) -> None:
    """Classify pictures: label, score, and expert of each."""
    from dataclasses import asdict

    model = load_model(repo, backbone, token, device)
    predictions = model.predict(
        images,
        batch_size=batch_size,
        reject_rate=reject_rate,
        top_k=top_k,
        show_progress_bar=sys.stderr.isatty() and len(images) > batch_size,
    )
    rows = [{"image": str(path), **asdict(found)} for path, found in zip(images, predictions, strict=True)]
    if not as_json:
        hidden = {"classes", "experts"} if model.can_reject else {"classes", "experts", "typicality"}
        rows = [{name: value for name, value in row.items() if name not in hidden} for row in rows]
    show(rows, as_json)
