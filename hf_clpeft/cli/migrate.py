"""`hf-clpeft migrate`: an adapter from before transformers renamed the layers of ViT."""

from pathlib import Path
from typing import Annotated

import typer

from .common import AsJson, quieten, show


def migrate(
    adapter: Annotated[Path, typer.Argument(help="Folder of a PEFT adapter.", exists=True, file_okay=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write into.")],
    backbone: Annotated[str, typer.Option(help="Repo id or folder of the backbone that it adapts.")],
    as_json: AsJson = False,
) -> None:
    """Rename the weights of an old ViT adapter, so that all of them are used again."""
    from ..backbones import load_backbone
    from ..experts.naming import migrate_adapter

    quieten()
    renamed = migrate_adapter(adapter, output, load_backbone(backbone))
    show(
        {"folder": str(output), "renamed": len(renamed), "example": " -> ".join(renamed[0]) if renamed else "–"},
        as_json,
    )
