"""`hf-clpeft push`: pushes a saved model, or a run's outbox, to the Hub."""

import sys
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from .common import AsJson, Token, quieten, show


def push(
    model: Annotated[str, typer.Argument(help="Folder of a model, or name of a bundled one.")],
    repo: Annotated[str | None, typer.Argument(help="Repo id; default: that of the run's outbox.")] = None,
    private: Annotated[bool | None, typer.Option(help="Make a new repo private.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; default: main.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Title of the commit.")] = None,
    squash_history: Annotated[
        bool, typer.Option("--squash-history", help="Squash the branch; delete tags and files of removed tasks.")
    ] = False,
    handler: Annotated[
        bool, typer.Option("--handler", help="Add handler.py and requirements.txt, for Inference Endpoints.")
    ] = False,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Push a model's folder as one commit; or, if a run could not push, its queued tasks, one commit each."""
    from dataclasses import replace

    from ..backbones.bundled import BUNDLED_MODELS, bundled_folder
    from ..config.errors import ConfigError
    from ..hub.outbox import Outbox
    from ..hub.push import PushTarget, push_folder
    from ..storage.files import as_saved

    quieten()
    folder = bundled_folder(model) or Path(model)
    if not folder.is_dir():
        raise ConfigError(f"{model} is neither a folder nor one of {', '.join(BUNDLED_MODELS)}.")
    target, queued, address = None, 0, None
    if repo is not None:
        target = PushTarget(repo, token, private, revision, create_pr)
    outbox = Outbox(folder) if target is None or Outbox.exists(folder) else None
    if outbox is not None:
        target, queued = target or replace(outbox.target, token=token), len(outbox.pending())
    assert target is not None
    # Printed first, as timeouts and retries may take a while.
    print(f"Pushing {folder} to {target.repo_id} ...", file=sys.stderr, flush=True)
    if outbox is not None:
        address = outbox.flush(target)
    if address is None or squash_history or handler:
        address = push_folder(as_saved(folder), target, message, squash_history=squash_history, handler=handler)
    then = f"hf-clpeft demo {quote(target.repo_id)}"
    show({"repo": target.repo_id, "tasks that had waited": queued, "address": address, "next": then}, as_json)
