"""`hf-clpeft remove`: unlearns a task exactly."""

import sys
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from .common import AsJson, BackbonePath, Repo, Token, load_model, show


def remove(
    repo: Repo,
    task: Annotated[str, typer.Argument(help="Name of the task; `hf-clpeft info` lists them.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    squash_history: Annotated[
        bool, typer.Option("--squash-history", help="Of a repo: delete it from earlier commits and tags as well.")
    ] = False,
    backbone: BackbonePath = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Unlearn a task exactly: in a folder, or on the Hub by one commit. Everything else stays as it is, to the bit."""
    from ..backbones.bundled import bundled_folder
    from ..config.errors import ConfigError, OptionError
    from ..config.repos import split_revision

    local, (_, revision) = Path(repo).is_dir(), split_revision(repo)
    if bundled_folder(repo) is not None or revision is not None:
        what = "is bundled with the package" if revision is None else "names a revision"
        raise ConfigError(f"{repo} {what}: a task is removed from a folder, or from the main branch of a repo.")
    if squash_history and local:
        raise OptionError("--squash-history: a folder has no history.")
    model = load_model(repo, backbone, token, "cpu")
    classes = next((known.classes for known in model.config.tasks if known.name == task), [])
    model.remove(task)  # in memory: whether it can be is known before anybody is asked
    lost = [label for label in classes if label not in model.config.classes]
    if not yes:
        if not sys.stdin.isatty():
            raise OptionError(f"There is no terminal to ask whether {task} may be removed from {repo}; add --yes.")
        if not typer.confirm(f"Remove {task} from {repo}? It forgets {', '.join(lost) or 'no class'}.", err=True):
            raise typer.Exit(1)
    done: dict[str, Any] = {"removed": task, "forgotten": lost}
    if local:
        model.save_pretrained(repo)
        done |= {"folder": repo}
    else:
        done |= {"address": model.push_to_hub(repo, squash_history=squash_history, token=token)}
    done |= {"tasks": [known.name for known in model.config.tasks], "next": f"hf-clpeft info {quote(repo)}"}
    show(done if as_json else {**done, "forgotten": ", ".join(lost), "tasks": ", ".join(done["tasks"])}, as_json)
