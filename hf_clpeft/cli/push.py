"""`hf-clpeft push`: a saved model, or what a run could not push, to the Hub."""

import sys
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from .common import AsJson, Token, quieten, show


def push(
    model: Annotated[str, typer.Argument(help="Folder of a model, or one that comes with the package.")],
    repo: Annotated[str | None, typer.Argument(help="Repo id; default: where the run was to be pushed.")] = None,
    private: Annotated[bool | None, typer.Option(help="Make a new repo private.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; default: main.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="First line of the commit.")] = None,
    squash_history: Annotated[
        bool, typer.Option("--squash-history", help="Make this the only commit; drop what holds a removed task.")
    ] = False,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Push a model's folder as one commit; or, task by task, what a run could not push when it learnt it."""
    from dataclasses import replace

    from ..backbones.bundled import BUNDLED_MODELS, bundled_folder
    from ..config.errors import ConfigError
    from ..hub.outbox import Outbox
    from ..hub.push import PushTarget, push_folder
    from ..storage.files import as_saved

    quieten()
    folder = bundled_folder(model) or Path(model)
    if not folder.is_dir():
        raise ConfigError(f"{model} is no folder, and none of {', '.join(BUNDLED_MODELS)}.")
    target, waited, address = None, 0, None
    if repo is not None:
        target = PushTarget(repo, token, private, revision, create_pr)
    outbox = Outbox(folder) if target is None or Outbox.exists(folder) else None
    if outbox is not None:
        target, waited = target or replace(outbox.target, token=token), len(outbox.pending())
    assert target is not None
    # Said before, as it may take a while until a storage that does not answer is given up.
    print(f"Pushing {folder} to {target.repo_id} ...", file=sys.stderr, flush=True)
    if outbox is not None:
        address = outbox.flush(target)
    if address is None or squash_history:
        address = push_folder(as_saved(folder), target, message, squash_history=squash_history)
    then = f"hf-clpeft demo {quote(target.repo_id)}"
    show({"repo": target.repo_id, "tasks that had waited": waited, "address": address, "next": then}, as_json)
