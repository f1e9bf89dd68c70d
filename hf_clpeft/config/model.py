"""The configuration of a continual model: method, backbone and learnt tasks. Imports nothing heavy."""

import hashlib
import json
from copy import copy
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from .checks import check_path, check_task_name, check_types, read_json
from .errors import ConfigError, NoModelError
from .method import MethodOptions, read_options
from .text import printable
from .version1 import upgrade


CONFIG_NAME = "config.json"
FORMAT_VERSION = 3
LARGEST_IMAGE = 4096  # px of a side
RESIZED_BY = "pil"  # library that resizes images


@dataclass
class BackboneConfig:
    """The frozen vision model that experts belong to, which is not saved with them.

    Args:
        name_or_path (`str`): Repo id or folder.
        image_size (`int`): Side of the square input, in pixels.
        weight_hash (`str`): SHA-256 of the checkpoint's weights, see [`hf_clpeft.backbones.hash_weights`].
        revision (`str`, *optional*): Commit of the repo; `None` for a folder or a bundled backbone.
        resized_by (`str`, *optional*, defaults to `"pil"`): Library that resizes images: Pillow. Pixels of torchvision
            differ by up to 2 of 255.

    Raises:
        [`ConfigError`]: `resized_by` is not supported, or `image_size` is out of range.

    Example:

    ```py
    >>> from hf_clpeft.config import BackboneConfig

    >>> BackboneConfig("google/vit-base-patch16-224-in21k", image_size=224, weight_hash="0f3c").revision is None
    True

    ```
    """

    name_or_path: str
    image_size: int
    weight_hash: str
    revision: str | None = None
    resized_by: str = RESIZED_BY

    def __post_init__(self) -> None:
        check_types(self)
        if self.resized_by != RESIZED_BY:
            raise ConfigError(
                f"Pictures were resized by {self.resized_by[:40]!r}, and this version does it by {RESIZED_BY!r} alone:"
                " the model would see other pixels than it was trained on. Try `pip install --upgrade hf-clpeft`."
            )
        if not 1 <= self.image_size <= LARGEST_IMAGE:
            raise ConfigError(f"image_size={self.image_size} must be between 1 and {LARGEST_IMAGE:,} px.")


@dataclass
class TaskConfig:
    """Metadata of a learnt task.

    Args:
        name (`str`): Name of the task: folder of its expert and tag of its commit.
        classes (`list[str]`): Names of its classes.
        domain (`str`, *optional*): Its domain, if the stream is domain-incremental.
        num_train_images (`int`, *optional*, defaults to 0): Number of training images.
        source (`str`, *optional*): The model that it comes from, if models were combined.
        state (`str`, *optional*): SHA-256 of the hashes of the model's files after the task, which identifies the run.

    Example:

    ```py
    >>> from hf_clpeft.config import TaskConfig

    >>> TaskConfig("task-000", classes=["cat", "dog"]).title
    'cat, dog'
    >>> TaskConfig("task-001", classes=["cat", "dog"], domain="sketch").title
    'sketch'

    ```
    """

    name: str
    classes: list[str]
    domain: str | None = None
    num_train_images: int = 0
    source: str | None = None
    state: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_task_name(self.name)
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise ConfigError(f"Task {self.name!r} needs classes, each once; got {self.classes}.")
        for number, label in enumerate(self.classes):
            if not label.strip():
                raise ConfigError(f"Class {number} of task {self.name!r} is {label!r}; a class needs a name.")

    @property
    def title(self) -> str:
        """Short printable text for tables and plots: the domain, or the first classes."""
        if self.domain is not None:
            return printable(self.domain)
        return printable(", ".join(self.classes[:3])) + (", …" if len(self.classes) > 3 else "")


@dataclass
class ContinualConfig:
    """The content of `config.json`: method, backbone, and learnt tasks in order.

    Args:
        method ([`MethodOptions`]): The options of the method: its `Config`.
        backbone ([`BackboneConfig`]): The frozen model.
        tasks (`list[TaskConfig]`): The learnt tasks.
        classes (`list[str]`): All class names in order of appearance, which is the order of the logits.
        removed (`list[str]`): Names of unlearnt tasks.
        license (`str`): License identifier of the Hub for the experts.
        files (`dict[str, str]`): SHA-256 of all other files of the model, by path.
        versions (`dict[str, str]`): Versions of the libraries that saved the model.
        calibrated (`bool`, *optional*): Whether its scores are calibrated probabilities; `None`: not noted.
        format_version (`int`): Version of the format on disk.

    Example:

    ```py
    >>> from hf_clpeft import s_lora
    >>> from hf_clpeft.config import BackboneConfig, ContinualConfig

    >>> config = ContinualConfig(s_lora(r=1), BackboneConfig("vit", 224, "0f3c"))
    >>> ContinualConfig.from_dict(config.to_dict()) == config
    True

    ```
    """

    method: MethodOptions
    backbone: BackboneConfig
    tasks: list[TaskConfig] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    license: str = "apache-2.0"
    files: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    calibrated: bool | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        check_types(self)
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ConfigError(f"Two tasks have the same name: {names}.")
        if self.classes != list(dict.fromkeys(label for task in self.tasks for label in task.classes)):
            raise ConfigError("classes are not those of the tasks in order of appearance.")
        for name in self.removed:
            check_task_name(name)
        for path in self.files:
            check_path(path)

    def seal(self) -> None:
        """Sets the `state` of the latest task, unless it has one already."""
        if self.tasks and self.files and self.tasks[-1].state is None:
            lines = "".join(f"{path} {digest}\n" for path, digest in sorted(self.files.items()))
            self.tasks[-1].state = hashlib.sha256(lines.encode()).hexdigest()

    @property
    def expert_names(self) -> list[str]:
        """Names of the experts in `files`, in order."""
        folders = [path.split("/") for path in self.files if path.startswith("experts/")]
        return list(dict.fromkeys(parts[1] for parts in folders if len(parts) == 3))

    # Attributes that `transformers.pipeline` reads

    problem_type = "single_label_classification"
    _commit_hash = None

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def id2label(self) -> dict[int, str]:
        """Class names by index."""
        return dict(enumerate(self.classes))

    def to_dict(self) -> dict:
        """Plain `dict`, JSON-serialisable."""
        # Of thousands of tasks, `asdict` would copy every name.
        tasks = [{**vars(task), "classes": [*task.classes]} for task in self.tasks]
        parts = {"method": self.method.to_dict(), "backbone": asdict(self.backbone), "tasks": tasks}
        return {each.name: parts.get(each.name, copy(getattr(self, each.name))) for each in fields(self)}

    @classmethod
    def from_dict(cls, values: dict) -> "ContinualConfig":
        """Inverse of [`~ContinualConfig.to_dict`]; raises [`ConfigError`] on unknown fields or values."""
        version = values.get("format_version")
        if version is True or version not in (1, 2, FORMAT_VERSION):
            raise ConfigError(
                f"format_version {version!r} is not {FORMAT_VERSION}: this is no hf_clpeft "
                "model, or a newer one. Try `pip install --upgrade hf-clpeft`."
            )
        try:
            # Version 2 differs in `heads.safetensors` alone.
            values = {**(upgrade(values) if version == 1 else values), "format_version": FORMAT_VERSION}
            values["method"] = read_options(values["method"])
            values["backbone"] = BackboneConfig(**values["backbone"])
            values["tasks"] = [TaskConfig(**task) for task in values["tasks"]]
            config = cls(**values)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"The configuration lacks a field or has one that is unknown: {error}.") from error
        config.seal()
        return config

    def save(self, folder: str | Path) -> None:
        """Writes `config.json` into `folder`."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
        Path(folder, CONFIG_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "ContinualConfig":
        """Reads `config.json` from `folder`.

        Raises:
            [`NoModelError`]: There is none.
            [`ConfigError`]: It cannot be used.
        """
        path = Path(folder, CONFIG_NAME)
        if not path.is_file():
            raise NoModelError(f"{folder} holds no {CONFIG_NAME}, so it is no hf_clpeft model.")
        try:
            return cls.from_dict(read_json(path))
        except ConfigError as error:
            raise ConfigError(f"{path} cannot be used: {error}") from error
