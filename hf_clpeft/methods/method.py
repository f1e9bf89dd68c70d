"""What a method is: one module that owns all it learns, with verbs to predict by and verbs to learn by."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
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
    """A way to learn tasks one after another on one frozen backbone. A subclass with a name is a method of its own.

    **Predicting**: [`~Method.query`] → [`~Method.route`] → [`~Method.read`] → [`~Method.classify`], which
    [`~Method.forward`] strings together.

    **Learning**: [`~Method.begin`] makes what a task trains, [`~Method.loss`] judges a batch, [`~Method.end`] learns
    from the features of all training images and fixes everything.

    **Keeping**: `bank`, `router` and `heads` have files of their own; every other parameter and buffer goes into
    `method.safetensors`, unless its name begins with an underscore.

    Args:
        backbone ([`Backbone`]): The frozen model.
        config ([`ContinualConfig`]): The options, and the tasks learnt so far.

    Attributes:
        Config (`type`): Dataclass of the method's own options.
        name (`str`): Its name in `config.json` and on the command line.
        title (`str`): Its name for people, in cards.
        paper (`str`, *optional*): arXiv number of its paper, for cards.
        trains (`bool`): Whether optimizer steps are made; otherwise `begin` and `end` are all there is.
        independent (`bool`): Whether a task trains an expert of its own, and changes nothing that other tasks use.
        routes (`bool`): Whether images choose among experts, so that it is worth telling which.
        reads (`bool`): Whether an image passes the backbone again once it is routed.
        fixed_query (`bool`): Whether query features stay what they are once the first task is learnt.
        trains_by_query (`bool`): Whether [`~Method.loss`] needs `batch.query`.
        takes_one_class (`bool`): Whether a task of a single class can be told from the others.
        experts (`str`): What its experts are, for cards; options in braces are filled in.
        which_router, which_head (`str`): Which it has, where the options do not say.
        task ([`TaskConfig`], *optional*): The one that is being learnt.
        query_layers (`list[int]`): Layers behind which query features are taken, side by side; the last by default.
        seed (`int`): Of what [`~Method.end`] draws.
        before ([`Snapshot`], *optional*): What method, options and configuration were when a task was begun last.

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
        if "Config" not in vars(cls):  # options are those of the class that it is made from, under another name
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
        """Query features: by default [CLS] of the frozen backbone.

        Args:
            pixels (`torch.Tensor` of shape `(batch, 3, height, width)`): Normalised images.

        Returns:
            `torch.Tensor` of shape `(batch, query_size)`, `float32`.
        """
        if not self.query_layers:
            return torch.zeros(len(pixels), 0, device=pixels.device)
        return self.bank.frozen(pixels, self._cut).float()

    def route(self, query: torch.Tensor) -> Routing:
        """Experts of each image, from its own query features alone: by default there is just one.

        Args:
            query (`torch.Tensor` of shape `(batch, query_size)`): Query features.

        Returns:
            [`Routing`]: `selection` of shape `(batch,)`, or `(batch, N)` where several experts are selected.
        """
        nowhere = torch.zeros(len(query), dtype=torch.int64, device=query.device)
        return Routing(nowhere, query.new_zeros(len(query)), query.new_zeros(len(query), 1))

    def read(self, pixels: torch.Tensor, selection: torch.Tensor) -> torch.Tensor:
        """Features under the selected experts: by default of the bank, or of the frozen backbone while it is empty.

        Args:
            pixels (`torch.Tensor` of shape `(batch, 3, height, width)`): Normalised images.
            selection (integer `torch.Tensor` of shape `(batch,)` or `(batch, N)`): Of [`~Method.route`].

        Returns:
            `torch.Tensor` of shape `(batch, hidden_size)`; of an independent method with N experts for an image,
            `(batch, N, hidden_size)`: what each of them alone would give.
        """
        if not len(self.bank):
            return self.bank.frozen(pixels)
        if selection.dim() == 1 or not self.independent:
            return self.bank(pixels, selection)
        count = selection.shape[1]
        features = self.bank(pixels.repeat_interleave(count, dim=0), selection.flatten())
        return features.unflatten(0, (-1, count))

    def classify(self, features: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Logits.

        Args:
            features (`torch.Tensor`): Of [`~Method.read`]; query features where the method does not read.
            routing ([`Routing`]): Of the same images.

        Returns:
            `torch.Tensor` of shape `(batch, classes)`: −inf where no expert knows a class.
        """
        raise NotImplementedError(f"{type(self).__name__} must say how it classifies.")

    def forward(
        self,
        pixels: Any,
        query: torch.Tensor | None = None,
        read: Callable[[Any, torch.Tensor], torch.Tensor] | None = None,
        expert: int | None = None,
    ) -> ContinualOutput:
        """Query, route, read, classify.

        Args:
            pixels (`torch.Tensor` of shape `(batch, 3, height, width)`): Normalised images.
            query (`torch.Tensor`, *optional*): Query features, where they are known already.
            read (callable, *optional*): In place of [`~Method.read`]: for who remembers features.
            expert (`int`, *optional*): Position of the expert that all images go to, whatever their route.

        Returns:
            [`ContinualOutput`]
        """
        query = self.query(pixels) if query is None else query
        with without_autocast(query.device):
            routing = self.route(query.float())
        if expert is not None:
            routing = routing.sent_to(expert)
        features = (read or self.read)(pixels, routing.selection) if self.reads else query
        with without_autocast(features.device):
            logits = self.classify(features.float(), routing)
        return ContinualOutput(logits, routing.selection, routing.distances)

    # Learning

    def start(self, task: TaskConfig, seed: int = 0) -> None:
        """Begins a task, so that it can be abandoned.

        Args:
            task ([`TaskConfig`]): The next one.
            seed (`int`, *optional*, defaults to 0): Of what [`~Method.end`] draws.

        Raises:
            [`ConfigError`]: The method cannot learn it.
            [`ExpertError`]: Another thread is learning one.
        """
        self.bank.claim(task.name)  # or refuses, before anything changes
        self.abandon()
        self.before = None  # else each would keep the one before it
        with self.bank.lock.writing():
            freeze(self.state())
            self.before = Snapshot(self, self.options, self.config)
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
        """Ends a task. It is known once the caller has added it to `config`."""
        self.end(features_of)
        self.to(self.backbone.device)
        freeze(self.state())
        self.bank.abandon()
        self.task = None

    def abandon(self) -> None:
        """Forgets the task that is being learnt, if there is one: everything is what it was before."""
        if self.task is not None:
            self.undo()

    def undo(self) -> None:
        """Takes back the task that was begun last, finished or not, as long as nothing has been saved since."""
        assert self.before is not None
        with self.bank.lock.writing():
            self.before.restore()
            self.bank.abandon()

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Refuses other threads that want to train, and abandons at its end what was not finished.

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
        """Makes what the task trains. `self.task` is that task, `self.numbers` are the numbers of its classes.

        What the method keeps is frozen between tasks. What of it is to be trained further gets `requires_grad_()`
        here; then other threads cannot predict until the task ends.
        """

    def parameter_groups(self, args: Any) -> list[dict[str, Any]]:
        """What the optimizer gets: by default all that requires a gradient.

        Args:
            args ([`ContinualTrainingArguments`]): `learning_rate`, and `head_learning_rate` for what is named `head`.

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
        """What training brings down.

        Args:
            batch ([`Batch`]): Training images of the task.

        Returns:
            `torch.Tensor` of shape `(batch,)`, a loss for each image; or `()`, their mean.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what its loss is.")

    def end(self, features_of: FeaturesOf) -> None:
        """Fixes what the task has trained, and learns what needs no training.

        Args:
            features_of (callable): See [`FeaturesOf`]; to be called on every process alike.
        """

    def train_expert(self, name: str, head: torch.nn.Linear) -> None:
        """For [`~Method.begin`]: trains an expert, fresh or the one of that name, and a head.

        Args:
            name (`str`): Of the expert.
            head (`torch.nn.Linear`): Such as [`Heads.start`] gives.
        """
        self._head = head.to(self.backbone.device)
        self.bank.start(name, make_peft_config(self.options.peft, self.backbone))

    def expert_loss(self, pixels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """For [`~Method.loss`]: cross entropy of the head under the expert that is trained, image by image."""
        logits = self._head(self.bank.under_training(pixels).to(self._head.weight.dtype))
        return cross_entropy(logits.float(), targets, reduction="none")

    def rows(self, labels: torch.Tensor) -> torch.Tensor:
        """Positions of class numbers among the classes of the task that is being learnt."""
        row_of = torch.full((len(self.classes),), -1)
        row_of[self.numbers] = torch.arange(len(self.numbers))
        return row_of.to(labels.device)[labels]

    def costs(self) -> tuple[int, int]:
        """Parameters that the task trains, between `begin` and `end`: those of its experts, and those of its head."""
        groups: dict[bool, int] = {False: 0, True: 0}
        for name, parameter in self.named_parameters():
            groups[name.lstrip("_").startswith("head")] += parameter.numel() * parameter.requires_grad
        return groups[False], groups[True]

    def accept(self, giver: "Method") -> None:
        """Raises [`ConfigError`] unless the method can take over what another model's has trained.

        Args:
            giver ([`Method`]): Of the model that `experts_from` names.
        """
        raise ConfigError(f"{self.name} cannot take experts of {giver.name}.")

    def take(self, giver: "Method", position: int) -> None:
        """Takes over what another model's method has trained in the task, in place of training, after `begin`.

        Args:
            giver ([`Method`]): One that was accepted, and has learnt the task.
            position (`int`): Place of the task in the giver.

        Raises:
            [`ConfigError`]: Other tasks of the giver had a part in it.
        """

    @property
    def _cut(self) -> int | list[int] | None:
        """Query layers as [`Backbone.forward`] takes them."""
        layers = self.query_layers
        return None if layers == [self.backbone.num_layers] else layers[0] if len(layers) == 1 else layers


def make_method(backbone: Backbone, config: ContinualConfig) -> Method:
    """The method of a model.

    Args:
        backbone ([`Backbone`]): The frozen model.
        config ([`ContinualConfig`]): Says which method, with which options.

    Returns:
        [`Method`]

    Raises:
        [`ConfigError`]: There is no such method, or it does not fit the backbone.
    """
    if isinstance(config.method, UnknownOptions):  # unless its class has been imported since
        config.method = read_options(config.method.values)
    if config.method.name not in METHODS:
        raise ConfigError(
            f"There is no method {config.method.name!r}; choose one of {', '.join(METHODS)}, or, if it is your own, "
            "import the file that defines it first."
        )
    return METHODS[config.method.name](backbone, config)
