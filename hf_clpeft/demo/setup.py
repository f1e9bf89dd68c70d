"""The page of a Space whose model cannot be loaded: it says to its owner what to set, where visitors look."""

import os
from typing import Any

import gradio as gr

from ..config.errors import HfClpeftError
from .app import build_demo
from .names import bdi


def build_or_explain(source: str, **options: Any) -> gr.Blocks:
    """Builds the page for one model; if the model cannot be loaded, a page that says why and what to set.

    Args:
        source (`str`): Repo id or folder of the model.
        options: Further arguments of [`build_demo`].

    Returns:
        `gradio.Blocks`: To be launched with [`launch_options`], too.

    Example:

    ```py
    >>> from hf_clpeft.demo.setup import build_or_explain

    >>> build_or_explain("no model").title
    'The model is not there yet'

    ```
    """
    try:
        return build_demo(source, **options)
    except HfClpeftError as error:
        with gr.Blocks(title="The model is not there yet", analytics_enabled=False) as page:
            gr.HTML(explanation(source, options.get("revision"), options.get("backbone"), error))
        return page


def explanation(source: str, revision: str | None, backbone: str | None, error: HfClpeftError) -> str:
    """Why a model cannot be shown, and what its owner can set, as HTML. No value of a secret is part of it."""
    token = "set" if os.environ.get("HF_TOKEN") else "not set"
    settings = [
        ("CL_REPO_ID", source, "Is the name right, and was the model pushed to the end? Push it again if not."),
        ("CL_REVISION", revision, "Branch, tag or commit. Leave it out for the latest state."),
        ("CL_BACKBONE", backbone, "Repo id of the backbone, if the model was trained with one in a local folder."),
        ("HF_TOKEN", token, "A secret, not a variable: a token that may read the repo, if that is private or gated."),
    ]
    rows = "".join(
        f"<tr><th scope=row><code>{name}</code></th><td>{bdi(value or 'not set')}</td><td>{advice}</td></tr>"
        for name, value, advice in settings
    )
    return (
        f'<div id="setup"><h1>The model is not there yet</h1><p>{bdi(str(error))}</p>'
        "<p>If this Space is yours, look at these in its settings, under “Variables and secrets”, and restart it:</p>"
        f'<div class="files" role=region tabindex=0 aria-label="Settings"><table>{rows}</table></div></div>'
    )
