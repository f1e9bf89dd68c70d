"""The configuration of a continual model: what it learns with, on which backbone, and what it has learnt so far.

Everything here is plain data. It imports nothing heavy, so that a command line can show its help at once.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .adapters import check_peft
from .checks import MOST, check_path, check_task_name, check_types, read_json
from .errors import ConfigError
from .text import printable


CONFIG_NAME = "config.json"
FORMAT_VERSION = 1
LARGEST_POOL = 10_000  # experts
LARGEST_IMAGE = 4096  # px of a side
RESIZED_BY = "pil"  # what resizes pictures
LARGEST_PROJECTION = 100_000  # random features, of which a router keeps a square matrix
ONE_EXPERT = "all-tasks"  # name of the expert of methods that have just one


@dataclass
class MethodConfig:
    """How a continual model learns. The presets in [`hf_clpeft.methods`] fill it; nothing else tells methods apart.

    Args:
        name (`str`): Name of the method, for example `"s_lora"`.
        peft (`dict`): Arguments of the PEFT configuration of every expert, with `peft_type`; empty where there are
            no experts. Left-out `target_modules` become the query and value projections found in the backbone.
        experts (`str`, *optional*, defaults to `"per_task"`): `"per_task"` (S-X): every task trains its own.
            `"pool"` (L2X): all tasks train a pool, of which every image selects a few. `"single"`: all tasks train one
            expert. `"first"`: the first task alone trains one. `"none"`: the backbone stays as it is.
        router (`str`, *optional*, defaults to `"prototypes"`): What chooses experts by query features:
            `"prototypes"` ([`PrototypeRouter`], the paper's), or the owner of the likeliest class by `"gaussian"`
            ([`GaussianRouter`]), `"class_means"` ([`ClassMeanRouter`]) or `"ridge"` ([`RidgeRouter`]), or by one that
            you have put into [`hf_clpeft.routing.ROUTERS`]. A pool has its keys, and a single expert needs none.
        classifier (`str`, *optional*, defaults to `"head"`): What names the class: the trained `"head"`; the
            `"router"`, if it knows classes, on query features alone; or `"both"`, if it gives likelihoods: see
            [`hf_clpeft.methods.mixing`].
        mix (`int`, *optional*, defaults to 1): How many experts judge an image, the likeliest ones, in one pass
            through the bank. More than one needs `classifier="both"`, which weighs them.
        joint (`bool`, *optional*, defaults to `False`): Train on the images of all tasks at once, which no continual
            learner has: a ceiling for the others.
        projection_size (`int`, *optional*, defaults to 10,000): Random features of the `"ridge"` router.
        k (`int` or `"auto"`, *optional*, defaults to 5): Prototypes (k-means centres) per task; 5 in the paper
            (arXiv 2406.03216). `"auto"` chooses on features held out of each task's training images.
        head (`str`, *optional*, defaults to `"auto"`): `"shared"` (one row per class), `"per_task"` (one row per task
            and class) or `"auto"`: shared when tasks bring new classes and prototypes choose the expert, else per
            task: a router that knows classes has compared those of different tasks already.
        query_with_first_expert (`bool`, *optional*, defaults to `False`): Take query features with the first task's
            expert active (the ++ variants) instead of the frozen backbone.
        route_layer (`int` or `list[int]`, *optional*): Take query features behind this layer, so that routing needs
            only a part of a forward pass; behind the last, -1, if left out. Several layers: side by side, from one
            pass.
        pool_size (`int`, *optional*, defaults to 10): Experts in a pool, M.
        top_n (`int`, *optional*, defaults to 5): Experts that an image selects from a pool, N.
        pull (`float`, *optional*, defaults to 0.5): Weight λ of the loss that pulls selected keys towards queries.
        readout (`str`, *optional*, defaults to `"cls"`): What the head classifies: `"cls"`, or `"prompts"` for the
            mean of the prompt tokens' outputs.
        mask_logits (`bool`, *optional*, defaults to `True`): Leave classes that are absent from the current task out
            of the loss.

    Raises:
        [`ConfigError`]: A value is out of range, or two do not go together.

    Example:

    ```py
    >>> from hf_clpeft.config import MethodConfig

    >>> MethodConfig(name="s_lora", peft={"peft_type": "LORA", "r": 1}, k=5).head
    'auto'

    ```
    """

    name: str
    peft: dict
    experts: str = "per_task"
    router: str = "prototypes"
    classifier: str = "head"
    mix: int = 1
    joint: bool = False
    projection_size: int = 10_000
    k: int | str = 5
    head: str = "auto"
    query_with_first_expert: bool = False
    route_layer: int | list[int] | None = None
    pool_size: int = 10
    top_n: int = 5
    pull: float = 0.5
    readout: str = "cls"
    mask_logits: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}.")
        if isinstance(self.k, str) and self.k.isdecimal():  # as it comes from a command line
            self.k = int(self.k)
        if self.k != "auto" and (isinstance(self.k, str) or self.k < 1):
            raise ConfigError(f"k={self.k!r} must be a whole number of prototypes per task, 1 or more, or 'auto'.")
        layers = self.route_layers
        if 0 in layers or layers != sorted(set(layers)):
            raise ConfigError(f"route_layer={self.route_layer} must be layers from 1, or from -1 down, rising.")
        if len(layers) == 1:
            self.route_layer = layers[0]
        # As they come back from JSON, so that a saved method equals the one it was made with.
        self.peft = {
            name: sorted(value) if isinstance(value, set) else list(value) if isinstance(value, tuple) else value
            for name, value in self.peft.items()
        }
        try:
            json.dumps(self.peft)
        except TypeError as error:
            raise ConfigError(f"peft={self.peft} cannot be saved: {error}.") from error
        if self.experts == "none" and self.peft:
            raise ConfigError(f"peft={self.peft} has no use with experts='none'; leave it empty.")
        if self.experts != "none":
            check_peft(self.peft)
        if self.readout == "prompts" and (self.experts, self.peft["peft_type"]) != ("pool", "PROMPT_TUNING"):
            raise ConfigError("readout='prompts' needs a pool of prompts, experts='pool' and PROMPT_TUNING.")
        if self.query_with_first_expert and self.experts not in ("per_task", "first"):
            raise ConfigError(
                "query_with_first_expert needs experts='per_task' or 'first': only there is a first expert fixed."
            )
        self._check_routing()
        if self.experts == "pool":
            self._check_pool()

    @property
    def route_layers(self) -> list[int]:
        """The layers behind which query features are taken; none: behind the last."""
        if self.route_layer is None:
            return []
        return [self.route_layer] if isinstance(self.route_layer, int) else list(self.route_layer)

    @property
    def routed(self) -> bool:
        """Whether the router learns from the query features of every task."""
        return self.experts == "per_task" or self.classifier == "router"

    def expert_of(self, task: str) -> str:
        """Name of the expert that a task trains, where that is one."""
        return task if self.experts == "per_task" else ONE_EXPERT

    @property
    def uses_experts(self) -> bool:
        """Whether images are classified under an expert, rather than by their query features."""
        return self.experts != "none" and self.classifier != "router"

    def _check_routing(self) -> None:
        routed = self.experts in ("per_task", "first", "none")
        if not routed and (self.router != "prototypes" or self.classifier != "head"):
            raise ConfigError(
                f"router={self.router!r} and classifier={self.classifier!r} do not go with experts={self.experts!r}, "
                "which are not chosen by a router; leave both out."
            )
        # Whether the router is up to it, it says itself: see `find_router`.
        if self.classifier == "router" and self.experts not in ("first", "none"):
            raise ConfigError(
                "classifier='router' needs a router that knows classes, and experts='none' or 'first': the experts of "
                "all others would have nothing to say."
            )
        if self.classifier == "both" and self.experts != "per_task":
            raise ConfigError("classifier='both' needs experts='per_task', and a router like 'gaussian'.")
        if self.experts == "first" and not (self.classifier == "router" and self.query_with_first_expert):
            raise ConfigError("experts='first' needs classifier='router' and query_with_first_expert=True.")
        if self.experts == "none" and self.classifier == "head" and not self.joint:
            raise ConfigError("experts='none' needs classifier='router', or joint=True for a linear probe.")
        if self.joint and (self.experts not in ("single", "none") or self.classifier != "head"):
            raise ConfigError("joint=True needs experts='single' or 'none', and classifier='head'.")
        if self.joint and (self.head != "shared" or self.mask_logits):
            raise ConfigError("joint=True needs head='shared' and mask_logits=False: all classes train at once.")
        if not self.mix >= 1 or (self.mix > 1 and self.classifier != "both"):
            raise ConfigError(f"mix={self.mix} must be 1 or more, and more than 1 needs classifier='both'.")
        if not 1 <= self.projection_size <= LARGEST_PROJECTION:
            raise ConfigError(
                f"projection_size={self.projection_size} must be between 1 and {LARGEST_PROJECTION:,} features."
            )

    def _check_pool(self) -> None:
        if not 1 <= self.pool_size <= LARGEST_POOL:
            raise ConfigError(f"pool_size={self.pool_size} must be between 1 and {LARGEST_POOL:,}.")
        if not 1 <= self.top_n <= self.pool_size:
            raise ConfigError(f"top_n={self.top_n} must be between 1 and pool_size={self.pool_size}.")
        if not 0 <= self.pull <= MOST:
            raise ConfigError(f"pull={self.pull} must be a finite number, 0 or more.")
        if self.head == "per_task":
            raise ConfigError("A pool needs head='shared': its experts belong to no task.")
        self.head = "shared"
        unsupported = [name for name in ("lora_dropout", *_BEYOND_PLAIN_LORA) if self.peft.get(name)]
        if self.peft["peft_type"] not in ("LORA", "PROMPT_TUNING") or unsupported:
            what = ", ".join(unsupported) or self.peft["peft_type"]
            raise ConfigError(f"A pool is made of plain LoRA modules or prompts; {what} cannot be in one.")


_BEYOND_PLAIN_LORA = ("use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "modules_to_save")
_CHOICES = {
    "experts": ("per_task", "pool", "single", "first", "none"),
    "classifier": ("head", "router", "both"),
    "head": ("auto", "shared", "per_task"),
    "readout": ("cls", "prompts"),
}


@dataclass
class BackboneConfig:
    """Which frozen vision model the experts belong to. The backbone itself is never saved with them.

    Args:
        name_or_path (`str`): Repo id or folder.
        image_size (`int`): Side of the square input, in pixels.
        weight_hash (`str`): SHA-256 of the checkpoint's weights, see [`hf_clpeft.backbones.hash_weights`].
        revision (`str`, *optional*): Commit of the repo; none where it is a folder or comes with the package.
        resized_by (`str`, *optional*, defaults to `"pil"`): What resized the pictures: Pillow. torchvision's pixels
            are others, by up to 2 of 255.

    Raises:
        [`ConfigError`]: `resized_by` is none that this version has, or `image_size` is no size.

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
    """What a learnt task leaves behind besides tensors.

    Args:
        name (`str`): Name of the task: folder of its expert and tag of its commit.
        classes (`list[str]`): Names of its classes.
        domain (`str`, *optional*): Its domain, if the stream is domain-incremental.
        num_train_images (`int`, *optional*, defaults to 0): Images it was trained on.
        source (`str`, *optional*): The model that it was taken from, if models were combined.
        state (`str`, *optional*): SHA-256 over what the model's files were once it was learnt, which tells runs apart.

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

    @property
    def title(self) -> str:
        """Short text for tables and plots, fit to be shown: the domain, or the first classes."""
        if self.domain is not None:
            return printable(self.domain)
        return printable(", ".join(self.classes[:3])) + (", …" if len(self.classes) > 3 else "")


@dataclass
class ContinualConfig:
    """Everything in `config.json`: method, backbone, and the tasks learnt so far in order.

    Args:
        method ([`MethodConfig`]): How it learns.
        backbone ([`BackboneConfig`]): What it learns on.
        tasks (`list[TaskConfig]`): What it has learnt.
        classes (`list[str]`): All class names in the order in which they appeared. Logits follow this order.
        removed (`list[str]`): Names of tasks that were unlearnt on purpose.
        license (`str`): Licence of the experts, as the Hub spells it.
        files (`dict[str, str]`): Every other file that the model is loaded from, with its SHA-256.
        versions (`dict[str, str]`): Versions of the libraries that wrote the file.
        format_version (`int`): Version of the layout on disk.

    Example:

    ```py
    >>> from hf_clpeft.config import BackboneConfig, ContinualConfig, MethodConfig

    >>> config = ContinualConfig(
    ...     MethodConfig("s_lora", {"peft_type": "LORA", "r": 1}), BackboneConfig("vit", 224, "0f3c")
    ... )
    >>> ContinualConfig.from_dict(config.to_dict()) == config
    True

    ```
    """

    method: MethodConfig
    backbone: BackboneConfig
    tasks: list[TaskConfig] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    license: str = "apache-2.0"
    files: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
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
        """Notes at the latest task, once, what the model's files are."""
        if self.tasks and self.files and self.tasks[-1].state is None:
            lines = "".join(f"{path} {digest}\n" for path, digest in sorted(self.files.items()))
            self.tasks[-1].state = hashlib.sha256(lines.encode()).hexdigest()

    @property
    def expert_names(self) -> list[str]:
        """Names of the experts of a model that has learnt these tasks."""
        if self.method.experts == "none":
            return []
        if self.method.experts == "pool":
            return [f"pool-{i:03d}" for i in range(self.method.pool_size)]
        return list(dict.fromkeys(self.method.expert_of(task.name) for task in self.tasks))

    # What `transformers.pipeline` asks of a model's configuration

    problem_type = "single_label_classification"
    _commit_hash = None

    @property
    def num_labels(self) -> int:
        """How many classes the model knows."""
        return len(self.classes)

    @property
    def id2label(self) -> dict[int, str]:
        """Name of the class behind each logit."""
        return dict(enumerate(self.classes))

    def to_dict(self) -> dict:
        """Plain `dict`, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "ContinualConfig":
        """Inverse of [`~ContinualConfig.to_dict`]; raises [`ConfigError`] on anything it does not know."""
        values = dict(values)
        if values.get("format_version") != FORMAT_VERSION:
            raise ConfigError(
                f"format_version {values.get('format_version')!r} is not {FORMAT_VERSION}: this is no hf_clpeft "
                "model, or a newer one. Try `pip install --upgrade hf-clpeft`."
            )
        try:
            values["method"] = MethodConfig(**values["method"])
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
        """Reads `config.json` from `folder`."""
        path = Path(folder, CONFIG_NAME)
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {CONFIG_NAME}, so it is no hf_clpeft model.")
        try:
            return cls.from_dict(read_json(path))
        except ConfigError as error:
            raise ConfigError(f"{path} cannot be used: {error}") from error
