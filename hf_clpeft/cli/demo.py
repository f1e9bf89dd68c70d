"""`hf-clpeft demo`: the Gradio demo on this machine."""

from typing import Annotated

import typer

from ..backbones.bundled import DIGITS_MODEL
from .common import BackbonePath


def demo(
    repo: Annotated[str, typer.Argument(help="Repo id, repo@revision, or folder of a model.")] = DIGITS_MODEL,
    backbone: BackbonePath = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first that is free from 7860 on.")
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
    teaching: Annotated[
        bool, typer.Option(help="Let visitors teach new classes, each on a model of their own.")
    ] = True,
) -> None:
    """Try a model in the browser: upload, draw, look inside, teach it a new class. Needs no network."""
    from ..config.errors import ConfigError
    from ..config.repos import split_revision
    from ..training.progress import disable_progress_bars

    try:
        from ..demo import LAUNCH, build_demo
    except ModuleNotFoundError as error:
        raise ConfigError("The demo needs gradio; run `pip install 'hf-clpeft[demo]'`.") from error
    disable_progress_bars()
    source, revision = split_revision(repo)
    page = build_demo(source, revision, backbone, teaching=teaching)
    page.launch(server_name=host, server_port=port, inbrowser=browser, **LAUNCH)
