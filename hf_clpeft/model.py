"""The continual model: from pixels to a label through query, route, bank and head."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from .backbones import Backbone, load_backbone
from .backbones.precision import in_float32
from .config.errors import ConfigError
from .config.model import ContinualConfig, MethodConfig, TaskConfig
from .experts import ExpertBank
from .experts.expert import make_peft_config
from .experts.lock import ReadWriteLock, reading, writing
from .hub.push import PushTarget, push_folder
from .loading import load_model
from .methods.heads import Heads
from .methods.learners import ExpertLearner, FrozenLearner, PoolLearner, TaskLearner, rows_to_train
from .methods.mixing import mix
from .predicting import check_options, classify, read_batches
from .prediction import ContinualOutput, Prediction
from .reports.report import StreamReport
from .routing import Routing, find_router
from .storage.model_files import save_model


class ContinualModel(torch.nn.Module):
    """A frozen vision transformer that keeps learning: query, route, bank, head.

    Args:
        backbone ([`Backbone`]): The frozen model.
        config ([`ContinualConfig`]): Method, backbone and learnt tasks.

    Attributes:
        query_layers (`list[int]`): Layers behind which query features are taken.
        report ([`StreamReport`], *optional*): What was measured while it learnt; travels with the model.

    `transformers.pipeline("image-classification", model=model, image_processor=model.backbone.processor)` works too.

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
        method, count = config.method, backbone.num_layers
        self.config = config
        self.backbone = backbone
        self.query_layers = [number + count + 1 if number < 0 else number for number in method.route_layers] or [count]
        if not 1 <= self.query_layers[0] <= self.query_layers[-1] <= count:
            raise ConfigError(f"route_layer={method.route_layer}, but the backbone has {count} layers.")
        self.bank, self._saves = ExpertBank(backbone), ReadWriteLock()
        # What a router can do besides routing follows from the method.
        self.router: Any = find_router(method).from_method(method, self.query_size)
        self.heads = Heads(backbone.hidden_size, shared=method.head == "shared")
        self.origin: str | None = None  # where it was loaded from
        self.report: StreamReport | None = None
        self.unchanged_experts: dict[str, dict[str, str]] = {}  # their files since they were last saved or loaded

    @classmethod
    def from_backbone(cls, name_or_path: str, method: MethodConfig, **options: Any) -> "ContinualModel":
        """A model that has learnt nothing yet.

        Args:
            name_or_path (`str`): Repo id or folder of the backbone.
            method ([`MethodConfig`]): A preset of [`hf_clpeft.methods`], or your own.
            options: `revision`, `image_size`, `dtype`, `attn_implementation`, `token`, `cache_dir`,
                `local_files_only`; see [`load_backbone`].

        Returns:
            [`ContinualModel`]
        """
        backbone = load_backbone(name_or_path, **options)
        return cls(backbone, ContinualConfig(method, backbone.config))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the pixel values that it takes; the backbone's weights may be of another."""
        return torch.float32

    # From pixels to a label

    @property
    def query_size(self) -> int:
        """Width of query features."""
        return self.backbone.hidden_size * len(self.query_layers)

    def query_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The features that choose experts: [CLS] of the frozen backbone, or of that with the first task's expert.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): Normalised images.

        Returns:
            `torch.Tensor` of shape `(batch, query_size)`, `float32`.
        """
        layers = None
        if self.query_layers != [self.backbone.num_layers]:
            layers = self.query_layers if len(self.query_layers) > 1 else self.query_layers[0]
        if not (self.config.method.query_with_first_expert and len(self.bank)):
            return self.bank.frozen(pixel_values, layers).float()
        first = torch.zeros(len(pixel_values), dtype=torch.int64, device=pixel_values.device)
        return self.bank(pixel_values, first, layers=layers).float()

    @in_float32
    def route(self, query: torch.Tensor) -> Routing:
        """Experts of each image, from its own query features alone: of shape `(batch,)`, or several in each row."""
        method = self.config.method
        if not (method.routed or method.experts == "pool"):
            nowhere = torch.zeros(len(query), dtype=torch.int64, device=query.device)
            return Routing(nowhere, query.new_zeros(len(query)), query.new_zeros(len(query), 1))
        routing = self.router(query)
        if method.classifier != "both":
            return routing
        nearest = routing.distances.topk(min(method.mix, self.router.num_owners), largest=False).indices
        return routing._replace(selection=nearest)

    @in_float32
    def classify(self, features: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Logits of images, whoever it is that names the class.

        Args:
            features (`torch.Tensor` of shape `(batch, hidden_size)` or `(batch, N, hidden_size)`): Under the selected
                expert, or, where several judge, under each of them.
            routing ([`Routing`]): Of the same images.

        Returns:
            `torch.Tensor` of shape `(batch, classes)`: −inf where no judge knows a class.
        """
        if self.config.method.classifier == "router":
            return self.router.class_scores(routing.scores)
        if self.config.method.classifier == "head":
            return self.heads(features, routing.selection)
        judges = [self.heads(features[:, n], routing.selection[:, n]) for n in range(features.shape[1])]
        router = self.router
        assert routing.scores is not None
        return mix(torch.stack(judges, dim=1), routing.selection, routing.scores, router.owners, router.classes)

    @reading
    def forward(self, pixel_values: torch.Tensor, expert: int | None = None) -> ContinualOutput:
        """Query, route, bank, head.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): Normalised images.
            expert (`int`, *optional*): Position of the expert that all images go to, whatever their route.

        Returns:
            [`ContinualOutput`]
        """
        query = self.query_features(pixel_values)
        routing = self.route(query)
        if expert is not None:
            routing = routing.sent_to(expert)
        logits = self.classify(self._judged(pixel_values, query, routing.selection), routing)
        return ContinualOutput(logits, routing.selection, routing.distances)

    def _judged(self, pixel_values: torch.Tensor, query: torch.Tensor, selection: torch.Tensor) -> torch.Tensor:
        """What is classified: features under the selected experts, or the query features where there are none."""
        method = self.config.method
        if not method.uses_experts:
            return query
        if method.classifier == "head":
            return self.bank(pixel_values, selection, method.readout)
        judges = selection.shape[1]
        features = self.bank(pixel_values.repeat_interleave(judges, dim=0), selection.flatten())
        return features.unflatten(0, (-1, judges))

    @torch.no_grad()
    def predict(
        self,
        images: Any,
        batch_size: int = 32,
        reject_rate: float | None = None,
        expert: str | None = None,
        top_k: int = 1,
        show_progress_bar: bool = False,
    ) -> list[Prediction]:
        """Classifies images, each by its own features: neither order nor batch size change an answer.

        Many threads may call this at once, also while one of them learns a task, saves or pushes: they wait while a
        trained expert moves in and the router is taught its task, and, with experts that run grouped, for each other.
        While a pool is trained, other threads are refused.

        With `reject_rate` an image that is far from all tasks gets no label. How far is judged for each task by its
        own training images, held out of the clustering: of new images of any learnt task, a share of `reject_rate` at
        most is rejected by mistake, as long as they are like the training images. Few training images promise less;
        see [`fit_thresholds`].

        Args:
            images (one picture, or an iterable of them): `PIL.Image.Image`, path, `bytes`, binary file, array or
                tensor, of any mode and size; [`open_image`] says how each is read. Of an iterable, `batch_size` are
                taken at a time.
            batch_size (`int`, *optional*, defaults to 32): Images per forward pass; -1: all at once, as in `datasets`.
            reject_rate (`float`, *optional*): In whole percent, 0.01 to 1. Default: nothing is rejected.
            expert (`str`, *optional*): Name of the expert that judges all images, in place of the nearest.
            top_k (`int`, *optional*, defaults to 1): How many of the likeliest classes and nearest experts to tell.
            show_progress_bar (`bool`, *optional*, defaults to `False`): Show how far it is, in images.

        Returns:
            `list[Prediction]`: One per image.

        Raises:
            [`PictureError`]: Something is no picture, or a damaged one; an `OSError`, too.
            [`ConfigError`]: The model has learnt no task yet, there is no such expert, `reject_rate` is asked of a
                model without prototypes, or an argument is of another type or out of range.
            [`ExpertError`]: Another thread is training the pool.
        """
        check_options(self, batch_size, reject_rate, expert, top_k)
        predictions: list[Prediction] = []
        for batch in read_batches(images, batch_size, show_progress_bar):
            predictions += classify(self, self.backbone.transform.resize(batch), reject_rate, expert, top_k)
        return predictions

    @property
    def can_reject(self) -> bool:
        """Whether [`~ContinualModel.predict`] takes a `reject_rate`."""
        method = self.config.method
        return method.routed and not self.router.knows_classes and all(self.router.calibrated())

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
        if len(classes) == 1 and not (self.config.method.routed and self.config.method.mask_logits):
            raise ConfigError(
                f"Task {name!r} has a single class, {classes[0]!r}, and in {self.config.method.name} nothing would "
                "tell it from the others: give it two classes or more, or choose a method with an expert per task "
                "(s_lora, s_prompts), where its route does."
            )
        if name in self.config.removed:
            raise ConfigError(f"The model has unlearnt a task {name!r}; give the new one another name.")
        method, task = self.config.method, TaskConfig(name, list(classes), domain)
        if method.head == "auto":
            # Where classes have been compared by the router already, rows of other tasks can only mislead.
            self.heads.shared = domain is None and not self.router.knows_classes
        known = list(dict.fromkeys([*self.config.classes, *classes]))
        trained, targets = rows_to_train(known if method.joint else classes, known, method.mask_logits)
        rows = (task, self.heads.start(trained), trained, targets)
        if not self._trains_experts():
            return FrozenLearner(*rows).to(self.device)
        peft_config = make_peft_config(method.peft, self.backbone)
        learner: TaskLearner
        if method.experts == "pool":
            if not len(self.bank):
                self.router.reset_parameters()
                self.bank.make_pool(self.config.expert_names, peft_config)
            learner = PoolLearner(self.bank, self.router, method.readout, method.pull, *rows)
        else:
            learner = ExpertLearner(self.bank.start(method.expert_of(name), peft_config), self.backbone, *rows)
        return learner.to(self.device)

    @writing
    def finish_task(self, learner: TaskLearner, num_train_images: int) -> None:
        """Adds a trained task. Routers learn it apart: `model.router.add(query, k)`, or `(query, class_numbers)`.

        Args:
            learner ([`TaskLearner`]): What [`~ContinualModel.start_task`] gave, trained.
            num_train_images (`int`): Images it was trained on.
        """
        method, task = self.config.method, learner.config
        task.num_train_images = num_train_images
        method.head = "shared" if self.heads.shared else "per_task"
        if isinstance(learner, PoolLearner):
            learner.finish()
            self.unchanged_experts.clear()
        elif self._trains_experts():
            self.bank.finish(method.expert_of(task.name))
            self.unchanged_experts.pop(method.expert_of(task.name), None)
        if method.classifier != "router":
            alone = len(task.classes) == 1
            self.heads.write(learner.head.weight, learner.head.bias, learner.classes, alone=alone)
        self.config.classes = list(dict.fromkeys([*self.config.classes, *task.classes]))
        self.config.tasks.append(task)

    def _trains_experts(self) -> bool:
        """Whether the next task does."""
        experts = self.config.method.experts
        return experts != "none" and not (experts == "first" and self.config.tasks)

    # Forgetting on purpose

    @writing
    def remove(self, task: str) -> None:
        """Unlearns a task exactly: its expert, prototypes and head rows go, and nothing else changes by a bit.

        Args:
            task (`str`): Its name.

        Raises:
            [`ConfigError`]: There is no such task, or others were learnt from what it left behind, so that taking it
                away would not be exact.
        """
        names, method = [known.name for known in self.config.tasks], self.config.method
        if task not in names:
            raise ConfigError(
                f"There is no task {task!r} to remove; the model has learnt {', '.join(names) or 'none'}."
            )
        position = names.index(task)
        others = [known for known in self.config.tasks if known.name != task]
        elsewhere = {label for known in others for label in known.classes}
        shared = sorted(elsewhere & set(self.config.tasks[position].classes))
        if method.experts in ("pool", "single") or method.joint:
            raise ConfigError(f"All tasks trained the same experts in {method.name}; none can be removed exactly.")
        if self.router.knows_classes:
            raise ConfigError(
                f"The sums of the {method.router} router hold the images of all tasks; {task!r} cannot be removed "
                "exactly. Choose router='prototypes' where tasks must be unlearnt."
            )
        if method.query_with_first_expert and position == 0 and others:
            raise ConfigError(f"The expert of {task!r} takes everyone's query features; it cannot be removed alone.")
        if self.heads.shared and (shared or not method.mask_logits):
            what = f"classes {shared}" if method.mask_logits else "all rows of the head"
            raise ConfigError(f"Other tasks trained {what} too, in one head: {task!r} cannot be removed exactly.")
        self.bank.remove(task)
        self.router.remove(position)
        self.config.tasks, before = others, self.config.classes
        self.config.classes = list(dict.fromkeys(label for known in others for label in known.classes))
        number = {before.index(label): new for new, label in enumerate(self.config.classes)}
        self.heads.remove(position, number)
        self.config.removed.append(task)
        self.unchanged_experts.pop(task, None)
        if self.report is not None:
            self.report.remove_task(task)

    # The folder and the Hub

    @reading
    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> None:
        """Writes the model, its card and its report, not the backbone, into a folder: as a whole or not at all.

        Other threads may predict meanwhile; those that save or finish a task wait.

        Args:
            folder (`str` or `Path`): Made if needed.
            overwrite (`bool`, *optional*, defaults to `False`): Replace another model that the folder holds.

        Raises:
            `OSError`, [`ConfigError`]: See [`hf_clpeft.storage.model_files.save_model`]; what was there is untouched.
        """
        with self._saves.writing():
            save_model(self, folder, overwrite)

    def push_to_hub(self, repo_id: str, squash_history: bool = False, **options: Any) -> str:
        """Puts the model on the Hub as one commit, tagged with its latest task's name; see [`push_folder`].

        Args:
            repo_id (`str`): Repo id; made if needed.
            squash_history (`bool`, *optional*, defaults to `False`): Then make this the only commit of the branch and
                delete the tags that still hold a removed task.
            options: `token`, `private`, `revision` (a branch), `create_pr`, `commit_message`; see [`PushTarget`] and
                [`push_folder`].

        Returns:
            `str`: Address of the commit or pull request.

        Raises:
            [`HubError`]: The Hub cannot be reached or refuses, or holds another model.
        """
        from tempfile import TemporaryDirectory

        message = options.pop("commit_message", None)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(folder, PushTarget(repo_id, **options), message, squash_history=squash_history)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        backbone: str | Backbone | None = None,
        revision: str | None = None,
        dtype: str | torch.dtype = "float32",
        attn_implementation: str | None = None,
        **hub_options: Any,
    ) -> "ContinualModel":
        """Loads a model from a folder or the Hub, whole or not at all. Only safetensors and JSON are read.

        Args:
            name_or_path (`str` or `Path`): Folder, or repo id on the Hub; `"hf-clpeft/s-lora-digits"` comes with the
                package.
            backbone (`str` or [`Backbone`], *optional*): Where the backbone is now, when not where it was: folder or
                repo id, perhaps with `@` and a revision; or the backbone itself, with the same image processor.
            revision (`str`, *optional*): Branch, tag or commit of the repo, for example `"task-003"`.
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"float32"`): Type of the backbone's weights.
            attn_implementation (`str`, *optional*): What computes attention, as in `transformers`.
            hub_options: `token`, `cache_dir`, `local_files_only`.

        Returns:
            [`ContinualModel`]

        Raises:
            [`ConfigError`], [`ExpertError`]: A file is missing, damaged, unknown or does not fit.
            [`BackboneError`]: The backbone's weights or pixels are not those that the model was trained on.
            [`HubError`]: There is no such repo or revision, or no way to it.
        """
        how = {"dtype": dtype, "attn_implementation": attn_implementation}
        return load_model(cls, name_or_path, backbone, revision, how, hub_options)


# Else `transformers.pipeline` would say, wrongly, that it does not support this model.
MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["hf_clpeft"] = ContinualModel.__name__
