"""Pushes the model after every task; what cannot be pushed now waits on disk."""

import shlex

from ..config import ContinualConfig
from ..config.hub_errors import HubError
from ..config.text import get_logger
from ..hub.outbox import Outbox
from ..hub.push import PushTarget
from .arguments import ContinualTrainingArguments


logger = get_logger(__name__)


class Pusher:
    """Pushes what a run saves, and what earlier runs could not.

    Args:
        args ([`ContinualTrainingArguments`]): The repo, and the folder of the run.
        config ([`ContinualConfig`]): Configuration of the model.

    Raises:
        [`HubError`]: The Hub cannot be reached, denies the request, or holds another model.
    """

    def __init__(self, args: ContinualTrainingArguments, config: ContinualConfig):
        assert args.push_repo is not None
        self.folder = args.output_dir
        target = PushTarget(args.push_repo, args.hub_token, args.hub_private_repo, args.hub_revision)
        self.outbox = Outbox.open(args.output_dir, target, config)
        self._flush()

    def push(self) -> tuple[str, int]:
        """Pushes the model as saved now; returns the repo, and how many tasks could not be pushed."""
        self.outbox.put()
        self._flush()
        return self.outbox.target.repo_id, len(self.outbox.pending())

    def _flush(self) -> None:
        try:
            self.outbox.flush()
        except HubError as error:
            logger.warning(
                "%s Learning goes on. %d tasks wait in %s; they go with the next task, or with: hf-clpeft push %s",
                error,
                len(self.outbox.pending()),
                self.outbox.folder,
                shlex.quote(self.folder),
            )
