"""`hf-clpeft migrate`: renames the weights of adapters from before transformers 5.9 renamed the layers of ViT."""

from pathlib import Path
from typing import Annotated

import typer

from .common import AsJson, quieten, show


def migrate(
    adapter: Annotated[Path, typer.Argument(help="Folder of a PEFT adapter.", exists=True, file_okay=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Output folder.")],
    backbone: Annotated[str, typer.Option(help="Repo id or folder of the adapter's backbone.")],
    as_json: AsJson = False,
) -> None:
    """Rename the weights of an old ViT adapter to the current layer names, so that all of them load."""
    from ..backbones import load_backbone
    from ..experts.naming import migrate_adapter

    quieten()
    renamed = migrate_adapter(adapter, output, load_backbone(backbone))
    show(
        {"folder": str(output), "renamed": len(renamed), "example": " -> ".join(renamed[0]) if renamed else "–"},
        as_json,
    )
