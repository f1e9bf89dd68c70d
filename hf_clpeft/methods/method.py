"""The base class of methods, and their registry."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from ..backbones import Backbone
from ..backbones.precision import without_autocast
from ..config import ConfigError, ContinualConfig, TaskConfig, read_options
from ..config.method import OPTIONS, UnknownOptions
from ..experts.expert import make_peft_config
from ..routing import Routing
from .help import explain
from .keeper import Keeper
from .learning import Batch, FeaturesOf
from .output import ContinualOutput
from .state import Snapshot, freeze


METHODS: dict[str, type["Method"]] = {}
"""Every method by its name. `class Mine(Method, name="mine")` adds one."""


class Method(Keeper):
    """A continual learning method on a frozen backbone. Subclasses with a name are registered in [`METHODS`].

    **Predicting**: [`~Method.query`] → [`~Method.route`] → [`~Method.read`] → [`~Method.classify`]; called in this
    order by [`~Method.forward`].

    **Learning**: [`~Method.begin`] creates the trainable parameters of a task, [`~Method.prepare`] may fit them
    to its training images, [`~Method.loss`] computes the loss of a batch, [`~Method.end`] freezes the result and fits
    closed-form parts to the features of all training images.

    **Saving**: `bank`, `router` and `heads` have their own files. All other parameters and buffers are saved in
    `method.safetensors`, except those whose name starts with an underscore.

    Args:
        backbone ([`Backbone`]): The frozen model.
        config ([`ContinualConfig`]): The options, and the tasks learnt so far.

    Attributes:
        Config (`type`): Dataclass of the method's options.
        name (`str`): Name in `config.json` and on the command line.
        title (`str`): Display name, for cards.
        paper (`str`, *optional*): arXiv number of its paper, for cards.
        trains (`bool`): Whether tasks are trained with an optimizer, rather than by `begin` and `end` alone.
        independent (`bool`): Whether each task trains its own expert, without changing what other tasks use.
        chained (`bool`): Whether the training of an expert depends on those before.
        remade (`tuple[str, ...]`): Names of the experts of an independent method that change with every task.
        routes (`bool`): Whether images are routed among several experts.
        reads (`bool`): Whether a routed image needs a second forward pass.
        fixed_query (`bool`): Whether query features no longer change after the first task.
        query_passes (`int`): Forward passes per image that [`~Method.query`] costs.
        trains_by_query (`bool`): Whether [`~Method.loss`] needs `batch.query`.
        reads_by_query (`bool`): Whether [`~Method.read`] needs query features, as a third argument named `query`.
        takes_one_class (`bool`): Whether a task may have a single class.
        experts (`str`): Description of the experts, for cards; a format string of the options.
        which_router, which_head (`str`): Router and head, if no option selects them.
        task ([`TaskConfig`], *optional*): The task that is being learnt.
        query_layers (`list[int]`): Layers whose features are concatenated as query features. Default: the last.
        expert_layers (`list[int]`, *optional*): Layers that experts adapt, from 1. Default: all.
        seed (`int`): Seed for [`~Method.end`].
        before ([`Snapshot`], *optional*): State of method, options and configuration before the current task.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft import ContinualModel, Method

    >>> class NearestMean(Method, name="nearest_mean"):
    ...     trains = reads = False
    ...
    ...     def __init__(self, backbone, config):
    ...         super().__init__(backbone, config)
    ...         self.register_buffer("means", torch.zeros(0, self.query_size))
    ...
    ...     def end(self, features_of):
    ...         features, labels = features_of(self.query)
    ...         new = [features[labels == number].mean(dim=0) for number in self.numbers]
    ...         self.means = torch.cat([self.means, torch.stack(new)])
    ...
    ...     def classify(self, features, routing):
    ...         return -torch.cdist(features, self.means)

    >>> model = ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", NearestMean.Config())
    >>> model.start_task("pets", ["cat", "dog"])
    >>> images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])
    >>> model.finish_task(lambda features: (features(images), labels), num_train_images=4)
    >>> model(images).logits.shape
    torch.Size([4, 2])

    ```
    """

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if name is None:
            return
        if "Config" not in vars(cls):  # inherits the options of its base class, under its own name
            place = {
                "__module__": cls.__module__,
                "__qualname__": f"{cls.__qualname__}.Config",
                "__doc__": cls.__doc__,
            }
            cls.Config = dataclass(type("Config", (cls.Config,), place))  # type: ignore[misc]
        cls.name = cls.Config.name = name
        cls.title = vars(cls).get("title", name)
        cls.Config.__doc__ = explain(cls)
        METHODS[name], OPTIONS[name] = cls, cls.Config

    # Predicting

    @property
    def query_size(self) -> int:
        """Width of query features."""
        return self.backbone.hidden_size * len(self.query_layers)

    def query(self, pixels: torch.Tensor) -> torch.Tensor:
        """Query features. Default: the [CLS] features of the frozen backbone.

        Args:
            pixels (`torch.Tensor` of shape `(batch, 3, height, width)`): Normalised images.

        Returns:
            `torch.Tensor` of shape `(batch, query_size)`, `float32`.
        """
        if not self.query_layers:
            return torch.zeros(pixels.shape[0], 0, device=pixels.device)
        return self.bank.frozen(pixels, self._cut).float()

    def route(self, query: torch.Tensor) -> Routing:
        """Selects the experts of each image from its query features. Default: expert 0 for all images.

        Args:
            query (`torch.Tensor` of shape `(batch, query_size)`): Query features.

        Returns:
            [`Routing`]: `selection` of shape `(batch,)`, or `(batch, N)` for N experts per image.
        """
        nowhere = torch.zeros(query.shape[0], dtype=torch.int64, device=query.device)
        return Routing(nowhere, query.new_zeros(query.shape[0]), query.new_zeros(query.shape[0], 1))

    def read(self, pixels: torch.Tensor, selection: torch.Tensor) -> torch.Tensor:
        """Features with the selected experts applied; of the frozen backbone while the bank is empty.

        Args:
            pixels (`torch.Tensor` of shape `(batch, 3, height, width)`): Normalised images.
            selection (integer `torch.Tensor` of shape `(batch,)` or `(batch, N)`): From [`~Method.route`].

        Returns:
            `torch.Tensor` of shape `(batch, hidden_size)`; for an independent method with N experts per image,
            `(batch, N, hidden_size)`, one feature vector per expert.
        """
        if not len(self.bank):
            return self.bank.frozen(pixels)
        if selection.dim() == 1 or not self.independent:
            return self.bank(pixels, selection)
        return self.bank.each(pixels, selection)

    def classify(self, features: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Computes the logits.

        Args:
            features (`torch.Tensor`): From [`~Method.read`]; query features if `reads` is `False`.
            routing ([`Routing`]): From [`~Method.route`], for the same images.

        Returns:
            `torch.Tensor` of shape `(batch, classes)`: −inf for classes unknown to the selected experts.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `classify`.")

    def forward(
        self,
        pixels: Any,
        query: torch.Tensor | None = None,
        read: Callable[[Any, torch.Tensor], torch.Tensor] | None = None,
        expert: int | None = None,
    ) -> ContinualOutput:
        """Runs `query`, `route`, `read` and `classify`; the layers below all experts once.

        Args:
            pixels (`torch.Tensor` of shape `(batch, 3, height, width)`): Normalised images.
            query (`torch.Tensor`, *optional*): Precomputed query features.
            read (callable, *optional*): Replaces [`~Method.read`], for example by a feature cache.
            expert (`int`, *optional*): Index of the expert to route all images to.

        Returns:
            [`ContinualOutput`]
        """
        with self.bank.sharing():
            query = self.query(pixels) if query is None else query
            with without_autocast(query.device):
                routing = self.route(query.float())
            if expert is not None:
                routing = routing.sent_to(expert)
            if read is None:
                own: Any = self.read
                read = partial(own, query=query) if self.reads_by_query else own
            features = read(pixels, routing.selection) if self.reads else query
        with without_autocast(features.device):
            logits = self.classify(features.float(), routing)
        return ContinualOutput(logits, routing.selection, routing.distances)

    # Learning

    def start(self, task: TaskConfig, seed: int = 0) -> None:
        """Takes a snapshot for roll back, then calls [`~Method.begin`].

        Args:
            task ([`TaskConfig`]): The next task.
            seed (`int`, *optional*, defaults to 0): Seed for [`~Method.end`].

        Raises:
            [`ConfigError`]: The method cannot learn the task.
            [`ExpertError`]: Another thread is training.
        """
        self.bank.claim(task.name)  # raises before anything changes
        self.abandon()
        self.before = None  # else snapshots would form a chain
        with self.bank.lock.writing():
            freeze(self.state())
            # Experts of other tasks do not change, and are too many to be copied for each new one.
            others = self.bank.table if self.independent and not self.remade else None
            self.before = Snapshot(self, self.options, self.config, kept=() if others is None else others.tensors())
        self.bank.claim(task.name)
        self.task, self.seed = task, seed
        try:
            with nullcontext() if self.independent else self.bank.lock.writing():
                self.begin(task)
                self.to(self.backbone.device)
                if any(tensor.requires_grad for tensor in self.state().values()):
                    self.bank.refuse_readers(f"{self.name} changes what it predicts with at every step")
        except BaseException:
            self.abandon()
            raise

    def finish(self, features_of: FeaturesOf) -> None:
        """Calls [`~Method.end`] and freezes all state. The caller then adds the task to `config`."""
        self.end(features_of)
        self.to(self.backbone.device)
        freeze(self.state())
        self.bank.abandon()
        self.task = None

    def abandon(self) -> None:
        """Rolls back the unfinished task, if there is one."""
        if self.task is not None:
            self.undo()

    def undo(self) -> None:
        """Rolls back the latest task, finished or not. The model must not have been saved in between."""
        assert self.before is not None
        with self.bank.lock.writing():
            self.before.restore()
            if self.bank.table is not None:
                self.bank.table.clear_spare()
            self.bank.abandon()

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Context manager: reserves training for this thread, and rolls back an unfinished task on exit.

        Raises:
            [`ExpertError`]: Another thread is training.
        """
        with self.bank.learning():
            try:
                yield
            finally:
                self.abandon()
                self.before = None

    def begin(self, task: TaskConfig) -> None:
        """Creates the trainable parameters of `self.task`; `self.numbers` are its class indices.

        Saved tensors are frozen between tasks. To train them further, call `requires_grad_()` on them here; other
        threads then cannot predict until the task ends.
        """

    def prepare(self, features_of: FeaturesOf) -> None:
        """Fits values to the task's images before the first optimizer step. Default: does nothing.

        It may set the parameters that [`~Method.begin`] has created, but not add any. It is not called if the method
        trains nothing, or if its parameters are copied from another model. When a run is resumed inside a task, it is
        called again, so it must be deterministic.

        Args:
            features_of (callable): See [`FeaturesOf`]. It is a collective operation: call it on every process.
        """

    def parameter_groups(self, args: Any) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer. Default: all parameters that require a gradient.

        Args:
            args ([`ContinualTrainingArguments`]): `head_learning_rate` applies to parameters whose name starts with
                `head` or `_head`, `learning_rate` to all others.

        Returns:
            `list[dict]`: Parameter groups of `torch.optim`.
        """
        groups: dict[bool, list[torch.nn.Parameter]] = {False: [], True: []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups[name.lstrip("_").startswith("head")].append(parameter)
        rates = {False: args.learning_rate, True: args.head_learning_rate}
        return [{"params": params, "lr": rates[head]} for head, params in groups.items()]

    def loss(self, batch: Batch) -> torch.Tensor:
        """Computes the training loss of a batch.

        Args:
            batch ([`Batch`]): Training images of the task.

        Returns:
            `torch.Tensor` of shape `(batch,)`, one loss per image; or of shape `()`, their mean.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `loss`.")

    def end(self, features_of: FeaturesOf) -> None:
        """Stores what the task has trained, and fits what needs no gradient, such as the router.

        Args:
            features_of (callable): See [`FeaturesOf`]. It is a collective operation: call it on every process.
        """

    def train_expert(self, name: str, head: torch.nn.Linear) -> None:
        """For use in [`~Method.begin`]: makes an expert and a head trainable.

        Args:
            name (`str`): Name of the expert; an existing one is trained further.
            head (`torch.nn.Linear`): For example from [`Heads.start`].
        """
        self._head = head.to(self.backbone.device)
        self.bank.start(name, make_peft_config(self.options.peft, self.backbone, self.expert_layers))

    def expert_loss(self, pixels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """For use in [`~Method.loss`]: cross entropy per image, with the expert and the head being trained."""
        logits = self._head(self.bank.under_training(pixels).to(self._head.weight.dtype))
        return cross_entropy(logits.float(), targets, reduction="none")

    def rows(self, labels: torch.Tensor) -> torch.Tensor:
        """Maps class indices of the model to class indices of the current task."""
        row_of = torch.full((len(self.classes),), -1)
        row_of[self.numbers] = torch.arange(len(self.numbers))
        return row_of.to(labels.device, non_blocking=True)[labels]

    def costs(self) -> tuple[int, int]:
        """Numbers of trainable parameters of the current task: those of its experts, and those of its head."""
        groups: dict[bool, int] = {False: 0, True: 0}
        for name, parameter in self.named_parameters():
            groups[name.lstrip("_").startswith("head")] += parameter.numel() * parameter.requires_grad
        return groups[False], groups[True]

    def accept(self, giver: "Method") -> None:
        """Raises [`ConfigError`] unless experts of another model can be copied, for `experts_from`.

        Args:
            giver ([`Method`]): Method of the other model.
        """
        raise ConfigError(f"{self.name} cannot take experts of {giver.name}.")

    def take(self, giver: "Method", position: int) -> None:
        """Copies the trained parameters of a task from another model, after `begin` and instead of training.

        Args:
            giver ([`Method`]): A method that passed [`~Method.accept`] and has learnt the task.
            position (`int`): Index of the task in the other model.

        Raises:
            [`ConfigError`]: Other tasks of that model have trained these parameters, too.
        """

    @property
    def _cut(self) -> int | list[int] | None:
        """Query layers as the `layers` argument of [`Backbone.forward`]."""
        layers = self.query_layers
        return None if layers == [self.backbone.num_layers] else layers[0] if len(layers) == 1 else layers


def make_method(backbone: Backbone, config: ContinualConfig) -> Method:
    """Creates the method that a configuration names.

    Raises:
        [`ConfigError`]: There is no such method, or it does not support the backbone.
    """
    if isinstance(config.method, UnknownOptions):  # its class may have been imported since
        config.method = read_options(config.method.values)
    if config.method.name not in METHODS:
        raise ConfigError(
            f"There is no method {config.method.name!r}; choose one of {', '.join(METHODS)}, or, if it is your own, "
            "import the file that defines it first."
        )
    return METHODS[config.method.name](backbone, config)
