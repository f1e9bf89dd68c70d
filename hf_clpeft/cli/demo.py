"""`hf-clpeft demo`: the Gradio demo on this machine."""

from importlib.util import find_spec
from typing import Annotated

import typer

from .common import BackbonePath


def demo(
    repo: Annotated[str | None, typer.Argument(help="Repo id, repo@revision or folder; default: digits.")] = None,
    backbone: BackbonePath = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860 on.")
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
    teaching: Annotated[
        bool, typer.Option(help="Let visitors teach new classes, each to a model of their own.")
    ] = True,
    mcp: Annotated[
        bool, typer.Option(help="Also offer the functions as tools to AI assistants (Model Context Protocol).")
    ] = False,
) -> None:
    """Try a model in the browser: classify pictures, inspect its tasks, teach it a new class. Works offline."""
    from ..backbones.bundled import DIGITS_MODEL
    from ..config.errors import ConfigError
    from ..config.repos import split_revision
    from ..training.progress import disable_progress_bars

    try:
        from ..demo import build_demo, launch_options
    except ModuleNotFoundError as error:
        raise ConfigError("The demo needs gradio; run `pip install 'hf-clpeft[demo]'`.") from error
    if mcp and find_spec("mcp") is None:
        raise ConfigError("--mcp needs the package mcp; run `pip install 'gradio[mcp]'`.")
    disable_progress_bars()
    source, revision = split_revision(repo or DIGITS_MODEL)
    page = build_demo(source, revision, backbone, teaching=teaching)
    page.launch(server_name=host, server_port=port, inbrowser=browser, mcp_server=mcp, **launch_options())
