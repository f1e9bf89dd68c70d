"""Controls without a trained classifier: what is learnt of a task follows from its features in one go."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from ..backbones import Backbone
from ..config import ConfigError, ContinualConfig, MethodOptions, TaskConfig
from ..experts.expert import make_peft_config
from ..routing import ClassRouter, Routing, find_router, router_title
from .heads import Heads
from .method import Batch, FeaturesOf, Method
from .options import LoraOptions, PeftOptions, ProjectionOptions, QueryOptions
from .probe import fit_probe
from .s_x import check_giver


EXPERT = "all-tasks"  # name of the one that the first task trains


class ClosedForm(Method):
    """The base: a router that knows classes names the class of query features, and no head is needed.

    **Trains** nothing. **Stores** what the router keeps. **Costs** one forward pass an image.
    """

    trains = reads = False
    takes_one_class = True
    which = ""  # router, where the options do not say
    router: ClassRouter

    @dataclass
    class Config(QueryOptions):
        pass

    def __init__(self, backbone: Backbone, config: ContinualConfig):
        super().__init__(backbone, config)
        self._query_layers = self._layers(self.options.query_layers)
        router = find_router(self._router_name(self.options))(self.query_size).configure(self.options)
        if not isinstance(router, ClassRouter):
            raise ConfigError(
                f"{self.name} needs a router that knows classes, and {self._router_name(self.options)!r} knows tasks "
                "alone: choose 'gaussian', 'class_means' or 'ridge', or a ClassRouter of your own."
            )
        self.router = router

    @classmethod
    def _router_name(cls, options: Any) -> str:
        return getattr(options, "router", cls.which)

    @property
    def query_layers(self) -> list[int]:
        return self._query_layers

    def route(self, query: torch.Tensor) -> Routing:
        return self.router(query)

    def classify(self, features: torch.Tensor, routing: Routing) -> torch.Tensor:
        assert routing.scores is not None
        return self.router.class_scores(routing.scores)

    def end(self, features_of: FeaturesOf) -> None:
        self.router.learn(*features_of(self.query), seed=self.seed)

    def check(self) -> None:
        self.router.check_knows([task.name for task in self.config.tasks], self.config.classes)

    def remove(self, position: int, number_of: dict[int, int]) -> None:
        raise ConfigError(
            f"The sums of the {self._router_name(self.options)} router hold the images of all tasks; "
            f"{self.config.tasks[position].name!r} cannot be removed exactly. Choose router='prototypes' in an S-X "
            "method where tasks must be unlearnt."
        )

    @classmethod
    def facts(cls, options: Any) -> dict[str, str]:
        return {
            "experts": "no expert: the backbone stays as it was",
            "PEFT": "none",
            "router": router_title(cls._router_name(options)),
            "head": "none: the router names the class",
        }


class Ncm(ClosedForm, name="ncm"):
    """Nearest class mean on the frozen features, by cosine; SimpleCIL, arXiv 2303.07338."""

    title, paper, which = "NCM", "2303.07338", "class_means"


class Slda(ClosedForm, name="slda"):
    """Linear discriminant analysis of frozen features, task by task; arXiv 1909.01520."""

    title, paper, which = "SLDA", "1909.01520", "gaussian"


class RanPac(ClosedForm, name="ranpac"):
    """Ridge regression on random projections of the frozen features: RanPAC without PEFT, arXiv 2307.02251.

    The Gram matrix of the random features is kept, `projection_size` squared numbers.
    """

    title, paper, which = "RanPAC", "2307.02251", "ridge"

    @dataclass
    class Config(QueryOptions, ProjectionOptions):
        pass


class AnyRouter(ClosedForm, name="closed_form"):
    """Any router that knows classes, as a classifier."""

    title = "Closed form"

    @dataclass
    class Config(QueryOptions, ProjectionOptions):
        router: str = field(default="gaussian", metadata={"help": "A router that knows classes."})


class FirstExpert(ClosedForm, name="closed_form_first"):
    """Any router that knows classes, on features with the first task's expert; later tasks train nothing.

    **Trains** an adapter, and a head that is then thrown away, on the first task. **Costs** one forward pass an image.
    """

    title, trains = "Closed form after first-session adaptation", True

    @dataclass
    class Config(QueryOptions, ProjectionOptions, PeftOptions):
        router: str = field(default="gaussian", metadata={"help": "A router that knows classes."})

    def query(self, pixels: torch.Tensor) -> torch.Tensor:
        first = torch.zeros(len(pixels), dtype=torch.int64, device=pixels.device)
        return self.bank(pixels, first, layers=self._cut).float()

    def begin(self, task: TaskConfig) -> None:
        self.trains = not self.config.tasks  # type: ignore[misc]  # of this task
        if self.trains:
            self._head = Heads(self.backbone.hidden_size, shared=False).start(self.numbers).to(self.backbone.device)
            self.bank.start(EXPERT, make_peft_config(self.options.peft, self.backbone))

    def loss(self, batch: Batch) -> torch.Tensor:
        logits = self._head(self.bank.under_training(batch.pixels).to(self._head.weight.dtype))
        return cross_entropy(logits.float(), self.rows(batch.labels), reduction="none")

    def end(self, features_of: FeaturesOf) -> None:
        if self.trains:
            self.bank.finish(EXPERT)
            del self._head
        super().end(features_of)

    def costs(self) -> tuple[int, int]:
        return super().costs()[0], 0

    def expert_names(self) -> list[str]:
        return [EXPERT] if self.config.tasks else []

    def accept(self, giver: Method) -> None:
        check_giver(self, giver)

    def take(self, giver: Method, position: int) -> None:
        if self.trains:
            self.bank.adopt(giver.bank[position])

    @classmethod
    def facts(cls, options: Any) -> dict[str, str]:
        peft = ", ".join(f"{key} = {value}" for key, value in options.peft.items())
        experts = "one PEFT expert that the first of them trained"
        return {**super().facts(options), "experts": experts, "PEFT": peft}


class RanPacFirst(FirstExpert, name="ranpac_first"):
    """RanPAC on features with the first task's expert, as its authors have it; arXiv 2307.02251."""

    title, paper, which = "RanPAC, first-session adaptation", "2307.02251", "ridge"

    @dataclass
    class Config(QueryOptions, ProjectionOptions, LoraOptions):
        pass


class LinearProbe(Method, name="linear_probe"):
    """A linear classifier on frozen features, fitted in one go: to all images at once on `stream.joined()`.

    Task by task it forgets: rows of the classes that a task has are fitted to the images of that task alone.
    """

    title = "Linear probe"
    trains = reads = False
    heads: Heads

    def __init__(self, backbone: Backbone, config: ContinualConfig):
        super().__init__(backbone, config)
        self.heads = Heads(backbone.hidden_size, shared=True)

    def classify(self, features: torch.Tensor, routing: Routing) -> torch.Tensor:
        return self.heads(features, routing.selection)

    def end(self, features_of: FeaturesOf) -> None:
        head = self.heads.start(every := list(range(len(self.classes))))
        fit_probe(head, *features_of(self.query))
        self.heads.write(head.weight, head.bias, every)

    def costs(self) -> tuple[int, int]:
        return 0, len(self.classes) * (self.backbone.hidden_size + 1)

    @classmethod
    def facts(cls, options: MethodOptions) -> dict[str, str]:
        experts = "no expert: the backbone stays as it was"
        return {"experts": experts, "PEFT": "none", "router": "none", "head": "shared"}
