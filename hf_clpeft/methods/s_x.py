"""S-X: every task trains its own expert and head rows; an image is routed to the expert of the nearest task."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from ..backbones import Backbone
from ..config import ConfigError, ContinualConfig, MethodOptions, TaskConfig
from ..config.text import get_logger
from ..experts.expert import Expert
from ..routing import Router, Routing, find_router
from .heads import Heads
from .keeper import Keeper
from .learning import Batch, FeaturesOf
from .method import Method
from .options import CovarianceOptions, LoraOptions, PeftOptions, ProjectionOptions, PromptOptions
from .views import ManyViews, ViewOptions


logger = get_logger(__name__)


@dataclass
class RouteOptions(ViewOptions, CovarianceOptions, ProjectionOptions):
    """Router and head of S-X methods."""

    k: int | str = field(default=5, metadata={"help": "Prototypes per task; auto chooses on held-out features."})
    router: str = field(
        default="prototypes",
        metadata={
            "help": "Router: prototypes, as in the paper, or one that picks the task of the likeliest class: "
            "gaussian, klda, class_means, ridge, linear_ridge, low_rank_ridge."
        },
    )
    head: Literal["auto", "shared", "per_task"] = field(
        default="auto",
        metadata={"help": "auto: shared if tasks bring new classes and the router is prototypes, else per_task."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.k, str) and self.k.isdecimal():  # from a command line
            self.k = int(self.k)
        if self.k != "auto" and (isinstance(self.k, str) or self.k < 1):
            raise ConfigError(f"k={self.k!r} must be a whole number of prototypes per task, 1 or more, or 'auto'.")
        if max(self.views, self.test_views) > 1 and not find_router(self.router).knows_classes:
            raise ConfigError(
                f"views={self.views} and test_views={self.test_views} need a router that knows classes, such as "
                "'gaussian'; prototypes are of images alone."
            )


class PerTask(ManyViews):
    """Base of methods with one PEFT adapter per task and a router that selects it."""

    independent = routes = takes_one_class = True
    experts = "one PEFT expert per task, of which every image chooses its own"
    which_head = "per task"
    query_with_first = False  # "++" variants: whether query features are taken with the first task's expert
    router: Router
    heads: Heads

    def __init__(self, backbone: Backbone, config: ContinualConfig):
        super().__init__(backbone, config)
        self.router = find_router(self.options.router)(self.query_size).configure(self.options)
        self.heads = Heads(backbone.hidden_size, shared=getattr(self.options, "head", "per_task") == "shared")

    def look(self, pixels: torch.Tensor) -> torch.Tensor:
        if not (self.query_with_first and len(self.bank)):
            return super().look(pixels)
        first = torch.zeros(pixels.shape[0], dtype=torch.int64, device=pixels.device)
        return self.bank(pixels, first, layers=self._cut).float()

    def route(self, query: torch.Tensor) -> Routing:
        return self.router(query)

    def classify(self, features: torch.Tensor, routing: Routing) -> torch.Tensor:
        return self.heads(features, routing.selection)

    def begin(self, task: TaskConfig) -> None:
        self.train_expert(task.name, self.heads.start(self.numbers))

    def loss(self, batch: Batch) -> torch.Tensor:
        # The softmax is over the classes of this task only; all others are masked.
        return self.expert_loss(batch.pixels, self.rows(batch.labels))

    def end(self, features_of: FeaturesOf) -> None:
        assert self.task is not None
        # Extracted first, so that a failure changes nothing, unless query features need the expert of this task.
        first = self.query_with_first and not len(self.bank)
        learnt = None if first else self.observe(features_of)
        self.bank.finish(self.task.name)
        self.heads.write(self._head.weight, self._head.bias, self.numbers, single=len(self.task.classes) == 1)
        del self._head
        self.router.learn(*(learnt or self.observe(features_of)), seed=self.seed)

    def accept(self, giver: Method) -> None:
        check_giver(self, giver)

    def take(self, giver: Method, position: int) -> None:
        assert isinstance(giver, PerTask) and self.task is not None
        numbers = [giver.classes.index(label) for label in self.task.classes]
        seen = set(self.task.classes) & set(self.config.classes)
        if giver.heads.classes[position] != numbers or (seen and giver.heads.shared != self.heads.shared):
            raise ConfigError(
                f"has another head, of which rows of {self.task.name} were trained by other tasks too. Choose the "
                "same head."
            )
        self.bank.adopt(giver.bank[position])
        with torch.no_grad():
            self._head.weight.copy_(giver.heads.weights[position])
            self._head.bias.copy_(giver.heads.biases[position])

    def expert_names(self) -> list[str]:
        return [task.name for task in self.config.tasks]

    def expert_of(self, position: int) -> int | None:
        return position

    def remove(self, position: int, number_of: dict[int, int]) -> None:
        tasks = self.config.tasks
        name, others = tasks[position].name, [*tasks[:position], *tasks[position + 1 :]]
        shared = sorted({label for other in others for label in other.classes} & set(tasks[position].classes))
        self.check_removable(position, first=self.query_with_first)
        if self.heads.shared and shared:
            raise ConfigError(
                f"Other tasks trained classes {shared} too, in one head: {name!r} cannot be removed exactly."
            )
        self.bank.remove(name)
        self.router.remove(position, number_of)
        self.heads.remove(position, number_of)

    def alike(self) -> dict[str, Any]:
        options = self.options
        own = {
            "technique": options.peft["peft_type"],
            "expert_layers": self.expert_layers,
            "query_layers": self.query_layers,
            "router": options.router,
            **self.looks_alike(),
        }
        if self.query_with_first:
            own["first task's expert"] = self.bank[0].digest if len(self.bank) else None
        return own

    def merge(self, other: Keeper, number_of: list[int], names: list[str]) -> None:
        assert isinstance(other, PerTask)
        experts = zip(names, other.bank, strict=True)
        self.bank.extend([Expert(name, expert.config, expert.tensors) for name, expert in experts])
        self.router.merge(other.router, number_of)
        heads = other.heads
        classes = [[number_of[number] for number in old] for old in heads.classes]
        self.heads.extend(zip(heads.weights, heads.biases, classes, heads.single, strict=True))


def check_giver(method: Method, giver: Method) -> None:
    """Raises [`ConfigError`] unless `giver` has one expert per task with the same PEFT options as `method`."""
    if not isinstance(giver, PerTask):
        raise ConfigError(f"{method.name} cannot take experts of {giver.name}.")
    if giver.options.peft != method.options.peft:
        raise ConfigError(f"was made with peft={giver.options.peft!r}, not {method.options.peft!r}.")
    if giver.expert_layers != method.expert_layers:
        raise ConfigError(f"was made with expert_layers={giver.expert_layers}, not {method.expert_layers}.")


class SX(PerTask, name="s_x"):
    """S-X with any PEFT technique: arXiv 2207.12819; section 3 of arXiv 2406.03216.

    **Trains** an adapter per task and the head rows of its classes. **Stores** both, and k prototypes per task.
    **Costs** two forward passes per image: one for the query features, one with the nearest task's expert.
    """

    title, paper = "S-X", "2406.03216"

    @dataclass
    class Config(RouteOptions, PeftOptions):
        pass

    def begin(self, task: TaskConfig) -> None:
        if self.options.head == "auto":
            # A router that knows classes has already compared those of all tasks.
            self.heads.shared = task.domain is None and not self.router.knows_classes
        super().begin(task)

    def end(self, features_of: FeaturesOf) -> None:
        self.options.head = "shared" if self.heads.shared else "per_task"
        super().end(features_of)

    def merged_options(self, others: list[Keeper]) -> MethodOptions:
        # A shared head needs exactly one row per class.
        every = [self, *others]
        classes = [label for method in every for label in method.classes]
        shared = all(method.heads is not None and method.heads.shared for method in every) and len(
            set(classes)
        ) == len(classes)
        options: Any = super().merged_options(others)
        return replace(options, head="shared" if shared else "per_task")


class SXPlusPlus(SX, name="s_x_pp"):
    """S-X whose query features are taken with the first task's expert; section 3 of arXiv 2406.03216."""

    title, query_with_first = "S-X++", True


class SLora(SX, name="s_lora"):
    """S-LoRA: S-Prompts with LoRA in place of prompts; section 3 of arXiv 2406.03216.

    Not to be confused with the LLM serving system of the same name (arXiv 2311.03285).
    """

    title = "S-LoRA"

    @dataclass
    class Config(RouteOptions, LoraOptions):
        pass


class SLoraPlusPlus(SLora, name="s_lora_pp"):
    """S-LoRA++: S-LoRA whose query features are taken with the first task's expert; arXiv 2406.03216."""

    title, query_with_first = "S-LoRA++", True


class SPrompts(SX, name="s_prompts"):
    """S-Prompts: one prompt per task, chosen by the nearest prototype; arXiv 2207.12819."""

    title, paper = "S-Prompts", "2207.12819"

    @dataclass
    class Config(RouteOptions, PromptOptions):
        pass


class SPromptsPlusPlus(SPrompts, name="s_prompts_pp"):
    """S-Prompts++: S-Prompts whose query features are taken with the first task's prompt; arXiv 2406.03216."""

    title, paper, query_with_first = "S-Prompts++", "2406.03216", True
