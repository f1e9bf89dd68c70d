"""What a run has learnt and the Hub does not have yet: one folder per commit, kept until it is pushed."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from ..config.checks import read_json
from ..config.errors import ConfigError
from ..config.model import CONFIG_NAME, ContinualConfig
from ..reports.report import REPORT_FILES
from ..storage.folder import recover, safe_path
from .push import PushTarget, push_folder


OUTBOX = "outbox"
TARGET_NAME = "target.json"


class Outbox:
    """Pushes a run's folder as it was after each task, even if the Hub could not be reached at that time.

    Each entry is a whole model whose files are hard links where the disk has them, so it costs next to nothing.

    Args:
        folder (`str` or `Path`): The run's folder.
        target ([`PushTarget`], *optional*): Where its models go; default: as it was before, with the token of whoever
            is logged in.

    Raises:
        [`ConfigError`]: Neither now nor before anybody has said where models go.

    Example:

    ```py
    >>> from hf_clpeft.hub.outbox import Outbox
    >>> from hf_clpeft.hub.push import PushTarget

    >>> Outbox("out", PushTarget("me/digits")).pending()
    []

    ```
    """

    def __init__(self, folder: str | Path, target: PushTarget | None = None):
        self.model, self.folder = Path(folder), safe_path(folder, OUTBOX)
        path = self.folder / TARGET_NAME
        if target is None:
            if not path.is_file():
                raise ConfigError(f"{folder} does not say which repo its model goes to; name one.")
            self.target = PushTarget(**read_json(path))
            return
        self.target = target
        self.folder.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_text(json.dumps({**asdict(target), "token": None}), encoding="utf-8")
        os.replace(new, path)

    @classmethod
    def open(cls, folder: str | Path, target: PushTarget, config: ContinualConfig) -> "Outbox":
        """The outbox of a model that is to be pushed, once the Hub has said that it can be.

        Args:
            folder (`str` or `Path`): Where the model is saved.
            target ([`PushTarget`]): Where it goes.
            config ([`ContinualConfig`]): The model, new or going on.

        Raises:
            [`HubError`]: The Hub cannot be reached, refuses, or holds another model.
            [`ConfigError`]: What waits here is of another model.
        """
        target, there = target.prepare(config)
        outbox = cls(folder, target)
        outbox.take_up(config, there)
        return outbox

    @staticmethod
    def exists(folder: str | Path) -> bool:
        """Whether a run in this folder was to be pushed."""
        return Path(folder, OUTBOX, TARGET_NAME).is_file()

    def pending(self) -> list[Path]:
        """Entries that wait, oldest first."""
        return sorted(
            path
            for path in self.folder.iterdir()
            if path.is_dir() and not path.is_symlink() and not path.name.startswith(".")
        )

    def take_up(self, config: ContinualConfig, there: list[str]) -> None:
        """Goes on where a run was killed: what it had saved and neither put here nor pushed is put here now.

        Args:
            config ([`ContinualConfig`]): The model that goes on.
            there (`list[str]`): Names of the tasks that the repo has.

        Raises:
            [`ConfigError`]: What waits here is of another model.
        """
        recover(self.model)
        waiting = self.pending()
        if waiting and not _precedes(ContinualConfig.load(waiting[-1]), config):
            raise ConfigError(
                f"{len(waiting)} tasks of another run wait in {self.folder} to be pushed. Push them with `hf-clpeft "
                f"push {self.model}`, go on with that run (--resume_from_checkpoint auto), or choose another folder."
            )
        saved = (self.model / CONFIG_NAME).is_file() and ContinualConfig.load(self.model).files == config.files
        if saved and config.tasks and config.tasks[-1].name not in there and not self._entry(config).is_dir():
            self.put()

    def _entry(self, config: ContinualConfig) -> Path:
        return self.folder / f"{len(config.tasks) + len(config.removed):05d}-{config.tasks[-1].name}"

    def put(self) -> None:
        """Takes the model as it is in the run's folder now."""
        config = ContinualConfig.load(self.model)
        entry = self._entry(config)
        new = self.folder / ".new"
        shutil.rmtree(new, ignore_errors=True)
        reports = [name for name in REPORT_FILES if (self.model / name).is_file()]
        for name in [*config.files, *reports, CONFIG_NAME]:
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            _link(self.model / name, new / name)
        shutil.rmtree(entry, ignore_errors=True)
        os.rename(new, entry)

    def flush(self, target: PushTarget | None = None) -> str | None:
        """Pushes what waits, oldest first.

        Args:
            target ([`PushTarget`], *optional*): Where to, if not where it was meant to go.

        Returns:
            `str`, *optional*: Address of the last commit, if there was anything to push.

        Raises:
            [`HubError`]: The Hub cannot be reached or refuses; what is left waits on.
        """
        address = None
        for entry in self.pending():
            address = push_folder(entry, target or self.target)
            done = self.folder / ".done"  # renamed first: an entry is never half there
            shutil.rmtree(done, ignore_errors=True)
            os.rename(entry, done)
            shutil.rmtree(done)
        return address


def _precedes(earlier: ContinualConfig, config: ContinualConfig) -> bool:
    """Whether a model is an earlier state of another one, or the same."""
    return earlier.tasks == config.tasks[: len(earlier.tasks)] and earlier.backbone == config.backbone


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # this disk has no hard links
        shutil.copy2(source, target)
