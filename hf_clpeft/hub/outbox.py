"""A queue on disk of models that are not on the Hub yet: one folder per commit, deleted once it is pushed."""

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
    """Queue of a run's pushes, one entry per task, which outlives failures of the Hub and of the run.

    An entry is a snapshot of the whole model, made of hard links where the file system has them.

    Args:
        folder (`str` or `Path`): The run's folder.
        target ([`PushTarget`], *optional*): Where to push; default: the target saved in the folder, with the token
            saved by `hf auth login`.

    Raises:
        [`ConfigError`]: No target is given, and the folder holds none.

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
                raise ConfigError(f"{folder} does not say which repo its model is pushed to; name one.")
            self.target = PushTarget(**read_json(path))
            return
        self.target = target
        self.folder.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_text(json.dumps({**asdict(target), "token": None}), encoding="utf-8")
        os.replace(new, path)

    @classmethod
    def open(cls, folder: str | Path, target: PushTarget, config: ContinualConfig) -> "Outbox":
        """Opens the outbox of a model, after checking that the Hub will take the model.

        Raises:
            [`HubError`]: The Hub cannot be reached, denies the request, or holds another model.
            [`ConfigError`]: The queue holds entries of another model.
        """
        target, there = target.prepare(config)
        outbox = cls(folder, target)
        outbox.take_up(config, there)
        return outbox

    @staticmethod
    def exists(folder: str | Path) -> bool:
        """Whether a folder has an outbox."""
        return Path(folder, OUTBOX, TARGET_NAME).is_file()

    def pending(self) -> list[Path]:
        """Queued entries, oldest first."""
        return sorted(
            path
            for path in self.folder.iterdir()
            if path.is_dir() and not path.is_symlink() and not path.name.startswith(".")
        )

    def take_up(self, config: ContinualConfig, there: list[str]) -> None:
        """Recovers a killed run: queues what it saved but neither queued nor pushed to `there`, the tasks on the Hub.

        Raises:
            [`ConfigError`]: The queue holds entries of another model.
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
        """Queues a snapshot of the model in the run's folder."""
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
        """Pushes all entries, oldest first.

        Args:
            target ([`PushTarget`], *optional*): Where to push; default: the outbox's own target.

        Returns:
            `str`, *optional*: URL of the last commit; `None` if the queue was empty.

        Raises:
            [`HubError`]: The Hub cannot be reached or denies the request; unpushed entries stay queued.
        """
        address = None
        for entry in self.pending():
            address = push_folder(entry, target or self.target)
            done = self.folder / ".done"  # renamed first, so that an entry disappears atomically
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
    except OSError:  # no hard links on this file system
        shutil.copy2(source, target)
