"""`hf-clpeft card`: the model card of a folder or repo, as it would be made now."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .common import Repo, Token


def card(
    repo: Repo,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write it to this file.")] = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Replace README.md in the folder; or in the repo, as a commit.")
    ] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="With --refresh: open a pull request.")] = False,
    token: Token = None,
) -> None:
    """Print the model card of a model: what it can do, how it was made, whom to cite."""
    from ..backbones.bundled import bundled_folder
    from ..config.errors import ConfigError
    from ..config.repos import split_revision
    from ..hub.card import fetch_card, push_card
    from ..reports.card import CARD_NAME, make_card_of
    from ..storage.files import as_saved

    bundled, (name, revision) = bundled_folder(repo), split_revision(repo)
    folder = bundled or Path(repo)
    if bundled is not None and refresh:
        raise ConfigError(f"{repo} is a part of the package and stays as it is; push it to a repo of yours first.")
    if folder.is_dir():
        made = make_card_of(as_saved(folder), repo if bundled else "path/to/this/folder", ask=True)
    else:
        made = fetch_card(name, revision, token)
    if refresh and folder.is_dir():
        output = output or folder / CARD_NAME
    elif refresh:
        address = push_card(made, name, revision, token, create_pr)
        print(f"{CARD_NAME} of {name} is refreshed: {address}", file=sys.stderr)
    if output is not None:
        output.write_text(str(made), encoding="utf-8")
        print(f"written to {output}", file=sys.stderr)
    elif not refresh:
        print(made, end="")
