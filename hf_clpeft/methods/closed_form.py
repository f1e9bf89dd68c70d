"""Baselines whose classifier is fitted in closed form to the features of a task."""

from dataclasses import dataclass, field
from typing import Any

import torch

from ..backbones import Backbone
from ..config import ConfigError, ContinualConfig, TaskConfig
from ..routing import ROUTERS, ClassRouter, GaussianRouter, Routing, find_router
from ..routing.confidence import GRID
from ..routing.held_out import held_out_scores
from .confidence import Confidence
from .heads import Heads
from .keeper import Keeper
from .learning import Batch, FeaturesOf
from .method import Method
from .options import CovarianceOptions, LoraOptions, PeftOptions, ProjectionOptions
from .probe import fit_probe
from .s_x import check_giver
from .views import ManyViews, ViewOptions


EXPERT = "all-tasks"  # name of the expert trained on the first task


class ClosedForm(ManyViews):
    """Base: a router that knows classes classifies query features, without a head.

    **Trains** nothing. **Stores** the router's statistics. **Costs** one forward pass per image.
    """

    trains = reads = False
    takes_one_class = True
    experts = "no expert: the backbone stays as it was"
    which_head = "none: the router names the class"
    router: ClassRouter

    @dataclass
    class Config(ViewOptions):
        pass

    def __init__(self, backbone: Backbone, config: ContinualConfig):
        super().__init__(backbone, config)
        self._which = getattr(self.options, "router", self.which_router)
        router = find_router(self._which)(self.query_size).configure(self.options)
        if not isinstance(router, ClassRouter):
            raise ConfigError(
                f"{self.name} needs a router that knows classes, and {self._which!r} knows tasks alone: choose "
                "'gaussian', 'class_means' or 'ridge', or a ClassRouter of your own."
            )
        self.router, self.confidence = router, None
        if router.gives_likelihoods:
            width = self.query_size if isinstance(router, GaussianRouter) else 0  # others may add what they like
            self.confidence = Confidence(self._spreads, width, self._adapted, self._known)

    def _spreads(self, origins: torch.Tensor) -> torch.Tensor:
        return self.router.spreads(origins)  # of the router by then, which may be another one

    def _adapted(self) -> bool:
        return len(self.bank) > 0

    def _known(self) -> int:
        return self.router.num_classes

    def route(self, query: torch.Tensor) -> Routing:
        return self.router(query)

    def classify(self, features: torch.Tensor, routing: Routing) -> torch.Tensor:
        assert routing.scores is not None
        scores = self.router.class_scores(routing.scores)
        return scores if self.confidence is None else self.confidence(scores)

    def end(self, features_of: FeaturesOf) -> None:
        features, classes = self.observe(features_of)
        apart = None
        if self.confidence is not None and not self.router.learns_few:  # a few images say too little
            apart = self.router.leave_one_out(features, classes, self.query_passes)
            apart = apart or held_out_scores(self.router, features, classes)
        self.router.learn(features, classes, seed=self.seed)
        if self.confidence is not None:
            losses = torch.zeros(GRID) if apart is None else self.confidence.measure(*apart)
            spread = self.router.spreads()[-1]
            self.confidence.add(losses, float(spread), self.router.num_classes)

    @classmethod
    def calibrates(cls, options: Any) -> bool:
        router = ROUTERS.get(getattr(options, "router", cls.which_router))
        return router is not None and router.gives_likelihoods

    def temperature(self) -> float | None:
        return None if self.confidence is None else self.confidence.temperature()

    def check(self) -> None:
        super().check()
        if self.confidence is not None:
            self.confidence.check(len(self.config.tasks))

    def state(self) -> dict[str, torch.Tensor]:
        state, confidence = super().state(), self.confidence
        measured = confidence is None or len(confidence.losses) == 0 or confidence.width or confidence.losses.any()
        if not measured:  # nor will it be, of these tasks
            state = {name: tensor for name, tensor in state.items() if not name.startswith("confidence.")}
        return state

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        if not tensors and self.confidence is not None:  # saved before confidence was measured
            self.confidence.width = torch.tensor(0)
            for _ in self.config.tasks:
                self.confidence.add(torch.zeros(GRID))
            tensors = self.state()
        if "confidence.losses" in tensors and "confidence.width" not in tensors:  # of before that was noted
            none = torch.zeros(len(self.config.tasks))
            unknown = {"confidence.spreads": none, "confidence.width": torch.tensor(0)}
            tensors = {"confidence.known": none.long(), **tensors, **unknown}
        super().load_state(tensors)

    def remove(self, position: int, number_of: dict[int, int]) -> None:
        self.check_removable(position)
        self.router.remove(position, number_of)
        if self.confidence is not None:
            self.confidence.remove(position)

    def alike(self) -> dict[str, Any]:
        drawn = {name: getattr(self.router, name) for name in self.router.options if name != "covariance_rank"}
        return {"router": self._which, "query_layers": self.query_layers, **drawn, **self.looks_alike()}

    def merge(self, other: Keeper, number_of: list[int], names: list[str]) -> None:
        assert isinstance(other, ClosedForm)
        self.router.merge(other.router, number_of)
        if self.confidence is not None and other.confidence is not None:
            self.confidence.merge(other.confidence)


class Ncm(ClosedForm, name="ncm"):
    """Nearest class mean on the frozen features, by cosine; SimpleCIL, arXiv 2303.07338."""

    title, paper, which_router = "NCM", "2303.07338", "class_means"


class Slda(ClosedForm, name="slda"):
    """Streaming linear discriminant analysis of the frozen features; arXiv 1909.01520."""

    title, paper, which_router = "SLDA", "1909.01520", "gaussian"

    @dataclass
    class Config(ViewOptions, CovarianceOptions):
        pass


class RanPac(ClosedForm, name="ranpac"):
    """Ridge regression on random projections of the frozen features: RanPAC without PEFT, arXiv 2307.02251.

    The router stores the Gram matrix of the random features, `projection_size` squared numbers.
    """

    title, paper, which_router = "RanPAC", "2307.02251", "ridge"

    @dataclass
    class Config(ViewOptions, ProjectionOptions):
        pass


class AnyRouter(ClosedForm, name="closed_form"):
    """Any router that knows classes, used as a classifier."""

    title = "Closed form"

    @dataclass
    class Config(ViewOptions, CovarianceOptions, ProjectionOptions):
        router: str = field(default="gaussian", metadata={"help": "A router that knows classes."})


class FirstExpert(ClosedForm, name="closed_form_first"):
    """Any router that knows classes, on features with the first task's expert: first-session adaptation.

    **Trains** an adapter on the first task, with a temporary head. **Stores** it, and the router's statistics.
    **Costs** one forward pass per image.
    """

    experts = "one PEFT expert that the first of them trained"
    title, trains = "Closed form after first-session adaptation", True

    @dataclass
    class Config(ViewOptions, CovarianceOptions, ProjectionOptions, PeftOptions):
        router: str = field(default="gaussian", metadata={"help": "A router that knows classes."})

    def look(self, pixels: torch.Tensor) -> torch.Tensor:
        first = torch.zeros(pixels.shape[0], dtype=torch.int64, device=pixels.device)
        return self.bank(pixels, first, layers=self._cut).float()

    def begin(self, task: TaskConfig) -> None:
        self.trains = not self.config.tasks  # type: ignore[misc]  # of this task
        if self.trains:
            self.train_expert(EXPERT, Heads(self.backbone.hidden_size, shared=False).start(self.numbers))

    def loss(self, batch: Batch) -> torch.Tensor:
        return self.expert_loss(batch.pixels, self.rows(batch.labels))

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

    def remove(self, position: int, number_of: dict[int, int]) -> None:
        self.check_removable(position, first=bool(len(self.bank)))
        super().remove(position, number_of)
        if len(self.config.tasks) == 1 and len(self.bank):
            self.bank.remove(EXPERT)

    def alike(self) -> dict[str, Any]:
        return {**super().alike(), "first task's expert": self.bank[0].digest if len(self.bank) else None}

    def merge(self, other: Keeper, number_of: list[int], names: list[str]) -> None:
        if not len(self.bank):
            self.bank.extend(other.bank)
        super().merge(other, number_of, names)


class RanPacFirst(FirstExpert, name="ranpac_first"):
    """RanPAC on features with the first task's expert, as in the paper; arXiv 2307.02251."""

    title, paper, which_router = "RanPAC, first-session adaptation", "2307.02251", "ridge"

    @dataclass
    class Config(ViewOptions, ProjectionOptions, LoraOptions):
        pass


class LinearProbe(Method, name="linear_probe"):
    """Logistic regression on frozen features. On `stream.joined()` it is fitted to all images.

    **Trains** nothing by steps: L-BFGS fits the head at the end of a task. **Stores** the head. **Costs** one forward
    pass per image. On a stream of several tasks it forgets, as each is fitted without the images of the others.
    """

    title, which_head = "Linear probe", "shared"
    experts = "no expert: the backbone stays as it was"
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
