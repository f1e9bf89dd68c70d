"""Where `hf-clpeft learn` finds a model and leaves it: a folder, or a repo and a folder of this machine to work in."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from ..config.errors import ConfigError
from ..config.model import CONFIG_NAME, ContinualConfig
from ..config.places import Place, find_place
from ..hub.download import fetch_config, find_model
from ..hub.outbox import Outbox
from ..hub.push import PushTarget
from ..storage.files import as_saved
from ..storage.lineage import difference
from .checkpoints import FOLDER as CHECKPOINTS
from .output import check_free


@dataclass
class Destination:
    """A place for a model, and what is there already.

    Args:
        to (`str`): Folder or repo id, as a user writes it.
        token (`str`, *optional*): Access token of the Hub; default: the one saved by `hf auth login`.
        private (`bool`, *optional*): Whether a new repo is private; default: its owner's setting.

    Attributes:
        place ([`Place`]): Which of the two it is, and why.
        there ([`ContinualConfig`], *optional*): Configuration of the model that is there.
        folder (`Path`): Where to train: the folder itself, or one in the cache, which outlives failures of the Hub.

    Raises:
        [`ConfigError`]: Something else is there; or a task of a repo was learnt, and is still to be pushed.
        [`HubError`]: The Hub cannot be reached or denies the request.

    Example:

    ```py
    >>> from hf_clpeft.training.destination import Destination

    >>> Destination("./birds").there is None
    True

    ```
    """

    to: str
    token: str | None = field(default=None, repr=False)
    private: bool | None = None
    place: Place = field(init=False)
    there: ContinualConfig | None = field(init=False, default=None)
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        self.place = find_place(self.to)
        if self.place.is_repo:
            from huggingface_hub import constants

            if find_model(self.place.name, self.token):
                self.there = ContinualConfig.load(fetch_config(self.place.name, token=self.token))
            self.folder = Path(constants.HF_HOME, "hf_clpeft", self.place.name.replace("/", "--"))
            self._check_pushed()
            return
        self.folder = Path(self.place.name)
        if (as_saved(self.folder) / CONFIG_NAME).is_file():
            self.there = ContinualConfig.load(as_saved(self.folder))
        check_free(self.folder, self.there)
        others = [path.name for path in self.folder.glob("[!.]*")] if self.there is None else []
        if others and not self.interrupted:
            raise ConfigError(
                f"{self.folder} holds {sorted(others)[0]}, and no model: name a folder that is new or empty, or that "
                "of a model."
            )

    @property
    def interrupted(self) -> bool:
        """Whether training was interrupted here, and left a checkpoint."""
        return any((self.folder / CHECKPOINTS).glob("[!.]*"))

    def check_writable(self) -> None:
        """Makes the folder or the repo, so that whether it can be written is known before any work.

        Raises:
            [`HubError`]: The Hub cannot be reached or denies the request.
            `OSError`: The folder cannot be made.
        """
        if self.place.is_repo:
            PushTarget(self.place.name, self.token, self.private).reserve()
        self.folder.mkdir(parents=True, exist_ok=True)

    def done(self) -> bool:
        """Tidies up after training. Gives whether the model is where it should be, or still waits to be pushed."""
        if not self.place.is_repo:
            return True
        if Outbox(self.folder).pending():
            return False
        shutil.rmtree(self.folder, ignore_errors=True)
        return True

    def _check_pushed(self) -> None:
        """Deletes what an earlier run left once it is on the Hub; checkpoints of an interrupted one stay."""
        if not (as_saved(self.folder) / CONFIG_NAME).is_file():
            return
        left = ContinualConfig.load(as_saved(self.folder))
        waits = Outbox.exists(self.folder) and Outbox(self.folder).pending()
        if waits or self.there is None or difference(self.there, left) is not None:
            raise ConfigError(
                f"{self.folder} holds {left.tasks[-1].name if left.tasks else 'a model'}, which was learnt for "
                f"{self.place.name} and could not be pushed. Push it with `hf-clpeft push {self.folder} "
                f"{self.place.name}`, or delete that folder to learn it again."
            )
        shutil.rmtree(self.folder)
