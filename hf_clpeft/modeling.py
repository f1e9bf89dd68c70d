"""The continual model: from pixels to a label through query, route, bank and head; and the folder it is saved as."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import PIL.Image
import PIL.ImageOps
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .backbones import Backbone, BackboneError, load_backbone
from .config import ConfigError, ContinualConfig, MethodConfig, TaskConfig
from .experts import Expert, ExpertBank
from .experts.expert import make_peft_config
from .heads import Heads
from .learners import ExpertLearner, PoolLearner, TaskLearner, rows_to_train
from .routing import KeyRouter, PrototypeRouter, Routing


ROUTER_NAME = "router.safetensors"
HEADS_NAME = "heads.safetensors"
EXPERTS_FOLDER = "experts"
ONE_EXPERT = "all-tasks"  # name of the expert of methods that have just one
VERSIONED = ("hf-clpeft", "torch", "transformers", "peft", "accelerate", "datasets")


@dataclass(frozen=True)
class Prediction:
    """What the model says about one image.

    Args:
        label (`str`): Name of the likeliest class.
        score (`float`): Its softmax score, in [0, 1].
        expert (`str`): Name of the expert that judged the image; the nearest, where several did.
        distance (`float`): How far the image's query features are from it, in [0, 2]; see [`PrototypeRouter`] and
            [`KeyRouter`].

    Example:

    ```py
    >>> from hf_clpeft import Prediction

    >>> Prediction(label="cat", score=0.98, expert="task-000", distance=0.41).label
    'cat'

    ```
    """

    label: str
    score: float
    expert: str
    distance: float


class ContinualOutput(NamedTuple):
    """What a forward pass gives.

    Args:
        logits (`torch.Tensor` of shape `(batch, classes)`): −inf where an expert knows no such class.
        routing ([`Routing`]): Experts and distance of each image.
    """

    logits: torch.Tensor
    routing: Routing


class ContinualModel(torch.nn.Module):
    """A frozen vision transformer that keeps learning: query, route, bank, head.

    Args:
        backbone ([`Backbone`]): The frozen model.
        config ([`ContinualConfig`]): Method, backbone and learnt tasks.

    Example:

    ```py
    >>> from PIL import Image
    >>> from hf_clpeft import ContinualModel, ContinualTrainer, ContinualTrainingArguments, s_lora
    >>> from hf_clpeft.streams import load_benchmark

    >>> stream = load_benchmark("digits", num_tasks=2, max_train_samples_per_task=64, max_test_samples_per_task=16)
    >>> model = ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", s_lora(r=1, k=5))
    >>> trainer = ContinualTrainer(
    ...     model, ContinualTrainingArguments(output_dir="out", num_train_epochs=1, disable_tqdm=True)
    ... )
    >>> result = trainer.learn_stream(stream)
    >>> model = ContinualModel.from_pretrained("out")
    >>> model.predict([Image.new("RGB", (8, 8))])[0].expert in ("task-000", "task-001")
    True

    ```
    """

    def __init__(self, backbone: Backbone, config: ContinualConfig):
        super().__init__()
        method = config.method
        if (method.route_layer or 1) > backbone.num_layers:
            raise ConfigError(f"route_layer={method.route_layer}, but the backbone has {backbone.num_layers} layers.")
        self.config = config
        self.backbone = backbone
        self.bank = ExpertBank(backbone)
        if method.experts == "pool":
            self.router = KeyRouter(backbone.hidden_size, method.pool_size, method.top_n)
        else:
            self.router = PrototypeRouter(backbone.hidden_size)
        self.heads = Heads(backbone.hidden_size, shared=method.head == "shared")

    @classmethod
    def from_backbone(cls, name_or_path: str, method: MethodConfig, **options) -> "ContinualModel":
        """A model that has learnt nothing yet.

        Args:
            name_or_path (`str`): Repo id or folder of the backbone.
            method ([`MethodConfig`]): A preset of [`hf_clpeft.methods`], or your own.
            options: `revision`, `image_size`, `dtype`, `token`, `cache_dir`, `local_files_only`; see
                [`load_backbone`].

        Returns:
            [`ContinualModel`]
        """
        backbone = load_backbone(name_or_path, **options)
        return cls(backbone, ContinualConfig(method, backbone.config))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.backbone.device

    # From pixels to a label

    def query_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The features that choose experts: [CLS] of the frozen backbone, or of that with the first task's expert.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): Normalised images.

        Returns:
            `torch.Tensor` of shape `(batch, hidden_size)`.
        """
        layers = self.config.method.route_layer
        if not (self.config.method.query_with_first_expert and len(self.bank)):
            return self.bank.frozen(pixel_values, layers)
        first = torch.zeros(len(pixel_values), dtype=torch.int64, device=pixel_values.device)
        return self.bank(pixel_values, first, num_layers=layers)

    def route(self, query: torch.Tensor) -> Routing:
        """Experts of each image, from its own query features alone."""
        if self.config.method.experts == "single":
            nowhere = torch.zeros(len(query), dtype=torch.int64, device=query.device)
            return Routing(nowhere, query.new_zeros(len(query)))
        return self.router(query)

    def forward(self, pixel_values: torch.Tensor) -> ContinualOutput:
        """Query, route, bank, head.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): Normalised images.

        Returns:
            [`ContinualOutput`]
        """
        routing = self.route(self.query_features(pixel_values))
        features = self.bank(pixel_values, routing.selection, self.config.method.readout)
        return ContinualOutput(self.heads(features, routing.selection), routing)

    @torch.no_grad()
    def predict(
        self, images: Sequence[PIL.Image.Image | str | Path] | PIL.Image.Image | str | Path, batch_size: int = 32
    ) -> list[Prediction]:
        """Classifies images, each by its own features: neither order nor batch size change an answer.

        Args:
            images (`PIL.Image.Image`, path, or sequence of them): Images of any size.
            batch_size (`int`, *optional*, defaults to 32): Images per forward pass.

        Returns:
            `list[Prediction]`: One per image.

        Raises:
            `RuntimeError`: The model has learnt no task yet.
        """
        if not self.config.tasks:
            raise RuntimeError(
                "This model has learnt no task yet; call ContinualTrainer(model, ...).learn(task) first."
            )
        images = [images] if isinstance(images, PIL.Image.Image | str | Path) else images
        predictions = []
        for start in range(0, len(images), batch_size):
            pixels = self.backbone.transform.resize([_open(image) for image in images[start : start + batch_size]])
            pixel_values = self.backbone.transform.normalize(torch.from_numpy(pixels).to(self.device))
            logits, routing = self(pixel_values)
            scores, classes = logits.softmax(dim=1).max(dim=1)
            nearest = routing.selection.reshape(len(logits), -1)[:, 0]
            columns = (classes, scores, nearest, routing.distance)
            predictions += [
                Prediction(self.config.classes[number], score, self.bank.names[expert], distance)
                for number, score, expert, distance in zip(*(column.tolist() for column in columns), strict=True)
            ]
        return predictions

    # Learning a task

    def start_task(self, name: str, classes: Sequence[str], domain: str | None = None) -> TaskLearner:
        """Prepares what is trained in a new task. The model knows it once [`~ContinualModel.finish_task`] is called.

        Args:
            name (`str`): Name of the task.
            classes (sequence of `str`): Names of its classes.
            domain (`str`, *optional*): Its domain.

        Returns:
            [`TaskLearner`]

        Raises:
            [`ConfigError`]: A task of that name has been learnt already.
        """
        if name in (task.name for task in self.config.tasks):
            raise ConfigError(f"The model has learnt a task {name!r} already; give the new one another name.")
        method, task = self.config.method, TaskConfig(name, list(classes), domain)
        if method.head == "auto":
            self.heads.shared = domain is None
        known = list(dict.fromkeys([*self.config.classes, *classes]))
        trained, targets = rows_to_train(classes, known, method.mask_logits)
        rows = (task, self.heads.start(trained), trained, targets)
        peft_config = make_peft_config(method.peft, self.backbone)
        if method.experts == "pool":
            if not len(self.bank):
                self._make_pool(peft_config)
            learner = PoolLearner(self.bank, self.router, method.readout, method.pull, *rows)
        else:
            learner = ExpertLearner(self.bank.start(self._expert_name(name), peft_config), *rows)
        return learner.to(self.device)

    def finish_task(self, learner: TaskLearner, num_train_images: int) -> None:
        """Adds a trained task. Where each task has its own expert, images find it once the router has its prototypes.

        Args:
            learner ([`TaskLearner`]): What [`~ContinualModel.start_task`] gave, trained.
            num_train_images (`int`): Images it was trained on.
        """
        method, task = self.config.method, learner.config
        task.num_train_images = num_train_images
        method.head = "shared" if self.heads.shared else "per_task"
        if method.experts == "pool":
            learner.finish()
        else:
            self.bank.finish(self._expert_name(task.name))
        self.heads.write(learner.head.weight, learner.head.bias, learner.classes)
        self.config.classes = list(dict.fromkeys([*self.config.classes, *task.classes]))
        self.config.tasks.append(task)

    def _expert_name(self, task: str) -> str:
        return task if self.config.method.experts == "per_task" else ONE_EXPERT

    def _make_pool(self, peft_config) -> None:
        self.router.reset_parameters()
        for name in self._expert_names():
            self.bank.start(name, peft_config)
            self.bank.finish(name)
            self.bank.reserve(self.config.method.pool_size)

    def _expert_names(self) -> list[str]:
        """Names of all experts that the model has once it has learnt its tasks."""
        method = self.config.method
        if method.experts == "pool":
            return [f"pool-{i:03d}" for i in range(method.pool_size)]
        return list(dict.fromkeys(self._expert_name(task.name) for task in self.config.tasks))

    # The folder

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the model, not the backbone, into a folder; `config.json` comes last and makes it whole.

        Args:
            folder (`str` or `Path`): Made if needed.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for expert in self.bank:
            expert.save(folder / EXPERTS_FOLDER / expert.name)
        save_file({key: tensor.contiguous() for key, tensor in self.router.state_dict().items()}, folder / ROUTER_NAME)
        rows = {}
        for i, task in enumerate(self.config.tasks):
            rows[f"{task.name}.weight"], rows[f"{task.name}.bias"] = self.heads.weights[i], self.heads.biases[i]
            rows[f"{task.name}.classes"] = torch.tensor(self.heads.classes[i], dtype=torch.int64)
        save_file(rows, folder / HEADS_NAME)
        self.backbone.processor.save_pretrained(folder)
        self.config.versions = library_versions()
        self.config.save(folder)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, backbone: str | Backbone | None = None, revision: str | None = None, **options
    ) -> "ContinualModel":
        """Loads a model that [`~ContinualModel.save_pretrained`] wrote, whole or not at all.

        Args:
            name_or_path (`str` or `Path`): Folder, or repo id on the Hub.
            backbone (`str` or [`Backbone`], *optional*): Where the backbone is now, when not where it was.
            revision (`str`, *optional*): Branch, tag or commit of the repo, for example `"task-003"`.
            options: `dtype`, and `token`, `cache_dir`, `local_files_only` for the Hub.

        Returns:
            [`ContinualModel`]

        Raises:
            [`ConfigError`], [`ExpertError`]: A file is missing, damaged or does not fit.
            [`BackboneError`]: The backbone's weights are not those that the model was trained on.
        """
        dtype = options.pop("dtype", "float32")
        folder = Path(name_or_path)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            patterns = ["*.json", "*.safetensors"]
            folder = Path(snapshot_download(str(name_or_path), revision=revision, allow_patterns=patterns, **options))
        config = ContinualConfig.load(folder)
        if not isinstance(backbone, Backbone):
            where = {"revision": config.backbone.revision, "image_size": config.backbone.image_size, "dtype": dtype}
            backbone = load_backbone(backbone or config.backbone.name_or_path, **where, **options)
        if backbone.config.weight_hash != config.backbone.weight_hash:
            raise BackboneError(
                f"The weights of backbone {backbone.config.name_or_path!r} hash to "
                f"{backbone.config.weight_hash[:12]}…, but {name_or_path} was trained on "
                f"{config.backbone.name_or_path!r} with {config.backbone.weight_hash[:12]}…. "
                "Pass the right one with backbone=."
            )
        model = cls(backbone, config)
        names = model._expert_names() if config.tasks else []
        model.bank.extend(Expert.load(name, folder / EXPERTS_FOLDER / name) for name in names)
        model._load_router(_load_tensors(folder / ROUTER_NAME))
        model._load_heads(_load_tensors(folder / HEADS_NAME))
        return model

    def _load_router(self, tensors: dict[str, torch.Tensor]) -> None:
        if self.config.method.experts == "pool":
            shapes, expected = {key: tuple(t.shape) for key, t in tensors.items()}, {"keys": self.router.keys.shape}
            if shapes != expected:
                raise ConfigError(f"{ROUTER_NAME} has {shapes}, but the model needs {expected}.")
            self.router.keys.data = tensors["keys"]
            return
        expected = set(range(len(self.config.tasks))) if self.config.method.experts == "per_task" else set()
        owners, width = set(tensors["owners"].tolist()), tensors["prototypes"].shape[-1]
        if owners != expected or width != self.backbone.hidden_size:
            raise ConfigError(
                f"{ROUTER_NAME} has prototypes of width {width} for tasks {sorted(owners)}, but "
                f"the model has tasks {sorted(expected)} and width {self.backbone.hidden_size}."
            )
        self.router.prototypes, self.router.owners = tensors["prototypes"], tensors["owners"]

    def _load_heads(self, tensors: dict[str, torch.Tensor]) -> None:
        for task in self.config.tasks:
            try:
                rows = (tensors[f"{task.name}.{name}"] for name in ("weight", "bias"))
                self.heads.write(*rows, tensors[f"{task.name}.classes"].tolist())
            except (ValueError, KeyError) as error:
                raise ConfigError(f"{HEADS_NAME}: the head of task {task.name!r} does not fit: {error}") from error
        if self.heads.num_classes != len(self.config.classes):
            raise ConfigError(
                f"{HEADS_NAME} has rows for {self.heads.num_classes} classes, but the model knows "
                f"{len(self.config.classes)}."
            )


def library_versions() -> dict[str, str]:
    """Versions of the libraries that results depend on.

    Example:

    ```py
    >>> from hf_clpeft.modeling import library_versions

    >>> "torch" in library_versions()
    True

    ```
    """
    versions = {}
    for name in VERSIONED:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # run from a source tree that is not installed
            versions[name] = "unknown"
    return versions


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ConfigError(f"{path.parent} lacks the file {path.name}, so the model is not whole.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ConfigError(f"{path} is damaged: {error}") from error


def _open(image: PIL.Image.Image | str | Path) -> PIL.Image.Image:
    if isinstance(image, PIL.Image.Image):
        return PIL.ImageOps.exif_transpose(image).convert("RGB")
    with PIL.Image.open(image) as opened:
        return PIL.ImageOps.exif_transpose(opened).convert("RGB")
