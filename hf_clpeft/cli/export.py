"""`hf-clpeft export`: exports an expert for use without this library."""

from pathlib import Path
from typing import Annotated

import typer

from .common import AsJson, BackbonePath, Device, Overwrite, Repo, Token, load_model, show


def export(
    repo: Repo,
    task: Annotated[str, typer.Argument(help="Name of a task; `hf-clpeft info` lists them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Output folder.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge it into the backbone.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    backbone: BackbonePath = None,
    token: Token = None,
    device: Device = None,
) -> None:
    """Export one expert as a plain PEFT adapter, or merged into the backbone as a plain transformers classifier."""
    from ..export import export_adapter, export_merged

    model = load_model(repo, backbone, token, device)
    (export_merged if merge else export_adapter)(model, task, output, overwrite)
    what = "transformers image classifier" if merge else "PEFT adapter"
    then = f'pipeline("image-classification", "{output}")' if merge else f'PeftModel.from_pretrained(vit, "{output}")'
    show({"folder": str(output), "task": task, "what": what, "next": then}, as_json)
