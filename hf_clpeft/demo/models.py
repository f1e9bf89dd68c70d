"""The models of a running demo: the served one, those that visitors taught, and earlier states of each."""

import re
import secrets
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from ..backbones.bundled import bundled_folder
from ..config.errors import ConfigError
from ..config.hub_client import hub_client
from ..config.hub_errors import HubError, explained
from ..model import ContinualModel
from ..prediction import best_device
from .batching import Batcher
from .gallery import Gallery, write_examples
from .pictures import VisitorError


MOST_MODELS = 32  # limit of taught models on disk, and of models cached in memory; the oldest are evicted
MOST_RETURNED = 8  # limit of models given back, which cost no training: they evict each other alone


class Models:
    """Looks up models by key. All share one backbone and one [`Batcher`].

    Args:
        source (`str`): Repo id or folder of the model to serve.
        revision (`str`, *optional*): Branch, tag or commit of the repo.
        backbone (`str`, *optional*): Repo id or folder of the backbone, if it has moved.

    Raises:
        [`ConfigError`]: The model has learnt no task yet. Otherwise as [`ContinualModel.from_pretrained`].

    Attributes:
        served ([`ContinualModel`]): The model for visitors who have taught nothing, of the key `""`.

    Example:

    ```py
    >>> from hf_clpeft.demo.models import Models

    >>> models = Models("hf-clpeft/s-lora-digits")
    >>> models.after("", step=2).config.classes
    ['0', '1', '2', '3']

    ```
    """

    def __init__(self, source: str, revision: str | None = None, backbone: str | None = None):
        self.source, self.revision, self.backbone = source, revision, backbone
        self.served = ContinualModel.from_pretrained(source, backbone=backbone, revision=revision).to(best_device())
        if not self.served.config.tasks:
            raise ConfigError(f"{source} has learnt no task yet, so there is nothing to show.")
        self.batcher = Batcher()
        self.gallery = Gallery()
        self._kept: OrderedDict[tuple[str, int | None], ContinualModel] = OrderedDict()
        self._home = TemporaryDirectory(prefix="hf-clpeft-")
        self._folders: OrderedDict[str, Path] = OrderedDict()
        self._returned: dict[str, str] = {}  # what identifies the content of those given back, by key
        self._lock = threading.Lock()

    def examples(self) -> list[Path]:
        """Example pictures: those beside the bundled models, else those that the served model carries."""
        bundled = bundled_folder(self.source)
        if bundled is not None:
            return sorted(Path(bundled, "examples").glob("*.*"))
        return write_examples(self.served, Path(self._home.name, "examples"))

    def get(self, key: str | None) -> ContinualModel:
        """A model by its key.

        Raises:
            [`VisitorError`]: The model has been evicted.
        """
        if not key:
            return self.served
        if key not in self._folders:
            raise VisitorError(
                "The model you taught is not here any more: upload its download under Teach it, or teach it again."
            )
        return self._keep((key, None), lambda: self.load(self._folders[key]))

    def new_folder(self) -> Path:
        """A new folder to save a taught model in."""
        return Path(self._home.name, secrets.token_hex(8), "model")

    def add(self, folder: Path, content: str | None = None) -> str:
        """Registers a taught model, or one that was given back. Returns its key, an unguessable token.

        Args:
            folder (`Path`): Its folder.
            content (`str`, *optional*): Of one given back, what identifies its content.
        """
        key = secrets.token_urlsafe(16)
        with self._lock:
            self._folders[key] = folder
            if content is not None:
                self._returned[key] = content
            rivals = [each for each in self._folders if (each in self._returned) == (content is not None)]
            most = MOST_MODELS if content is None else MOST_RETURNED
            gone = {each: self._folders.pop(each) for each in rivals[:-most]}
            self._returned = {each: what for each, what in self._returned.items() if each not in gone}
            self._kept = OrderedDict(item for item in self._kept.items() if item[0][0] not in gone)
        for old in gone.values():
            shutil.rmtree(old.parent, ignore_errors=True)
        return key

    def returned(self, content: str) -> str | None:
        """Key of a model with this content that was given back before, which becomes the newest of them."""
        with self._lock:
            for key, known in self._returned.items():
                if known == content:
                    self._folders.move_to_end(key)
                    return key
        return None

    def has(self, key: str | None) -> bool:
        """Whether a taught model is still there."""
        return key in self._folders

    def folder(self, key: str | None) -> Path | None:
        """Folder of a taught model; `None` for the served one."""
        return self._folders.get(key or "")

    def without_paths(self, text: str) -> str:
        """A message for visitors: files of their models are named as in their archives, and not as on this server."""
        homes = {self._home.name, str(Path(self._home.name).resolve())}
        start = rf"(?:{'|'.join(map(re.escape, homes))})[/\\][0-9a-f]+[/\\]model"
        return re.sub(start, "The model", re.sub(rf"{start}[/\\](?=\w)", "", text))

    def load(self, source: str | Path, revision: str | None = None) -> ContinualModel:
        """Loads a model onto the shared backbone."""
        backbone = self.served.backbone
        return self.batcher.run(
            lambda: ContinualModel.from_pretrained(source, backbone=backbone, revision=revision).to(backbone.device)
        )

    def after(self, key: str | None, step: int) -> ContinualModel:
        """A model as it was after `step` tasks: from the task's tag on the Hub, else by removing the later tasks.

        Raises:
            [`ConfigError`]: There is no tag, and later tasks cannot be removed exactly.
        """
        model, key = self.get(key), key or ""
        if not 1 <= step <= len(model.config.tasks):
            raise ConfigError(
                f"The model has learnt {len(model.config.tasks)} tasks; there is none after task {step}."
            )
        if step == len(model.config.tasks):
            return model
        return self._keep((key, step), lambda: self._past(key, model, step))

    def _past(self, key: str, model: ContinualModel, step: int) -> ContinualModel:
        tag = model.config.tasks[step - 1].name
        if not key and tag in self._tags:
            past = self.load(self.source, revision=tag)
            if history(past) == history(model)[:step]:  # not on another branch, or after a task was removed
                return past
        past = self.load(self._folders[key]) if key else self.load(self.source, self.revision)
        for task in reversed(model.config.tasks[step:]):
            past.remove(task.name)
        return past

    @cached_property
    def _tags(self) -> list[str]:
        if bundled_folder(self.source) is not None or Path(self.source).is_dir():
            return []
        try:
            with explained("look at the tags of", self.source):
                return [tag.name for tag in hub_client().list_repo_refs(self.source).tags]
        except HubError:  # offline: earlier states are made by removing later tasks
            return []

    def _keep(self, name: tuple[str, int | None], make: Callable[[], ContinualModel]) -> ContinualModel:
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name]
        model = make()
        with self._lock:
            self._kept[name] = model
            while len(self._kept) > MOST_MODELS:
                self._kept.popitem(last=False)
        return model


def history(model: ContinualModel) -> list[tuple]:
    """What identifies a model's history, from fields that old models have, too."""
    return [(task.name, task.classes, task.domain) for task in model.config.tasks]
