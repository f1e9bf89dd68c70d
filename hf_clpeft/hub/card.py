"""The model card of a repo: made anew from its configuration and metrics, without its weights."""

from huggingface_hub import ModelCard

from ..config.hub_client import hub_client
from ..config.hub_errors import explained
from ..reports.card import CARD_NAME, make_card, read_made
from .download import fetch_config


def fetch_card(repo_id: str, revision: str | None = None, token: str | None = None) -> ModelCard:
    """The card of a model on the Hub, as it would be made now.

    Args:
        repo_id (`str`): Repo id.
        revision (`str`, *optional*): Branch, tag or commit.
        token (`str`, *optional*): Access token of the Hub; default: the one saved by `hf auth login`.

    Raises:
        [`HubError`]: The repo cannot be reached.
        [`ConfigError`]: It holds no model.
    """
    folder = fetch_config(repo_id, revision, token)
    return make_card(*read_made(folder), repo_id, ask=True)


def push_card(
    card: ModelCard, repo_id: str, revision: str | None = None, token: str | None = None, create_pr: bool = False
) -> str:
    """Replaces the card of a repo by a commit; returns its address.

    Args:
        card (`huggingface_hub.ModelCard`): The card.
        repo_id (`str`): Repo id.
        revision (`str`, *optional*): Branch.
        token (`str`, *optional*): Access token of the Hub; default: the one saved by `hf auth login`.
        create_pr (`bool`, *optional*, defaults to `False`): Open a pull request instead of moving the branch.

    Raises:
        [`HubError`]: The Hub cannot be reached, or denies the request.
    """
    with explained("push to", repo_id, revision):
        done = hub_client(token).upload_file(
            path_or_fileobj=str(card).encode(),
            path_in_repo=CARD_NAME,
            repo_id=repo_id,
            revision=revision,
            commit_message="Refresh the model card",
            create_pr=create_pr,
        )
    return done.pr_url or done.commit_url
