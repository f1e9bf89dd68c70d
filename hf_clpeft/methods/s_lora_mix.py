"""S-LoRA-Mix: a Gaussian router on features of two layers, combined with the experts of the likeliest tasks."""

from dataclasses import dataclass, field

import torch

from ..backbones import Backbone
from ..config import ConfigError, ContinualConfig
from ..routing import ClassRouter, Routing
from .mixing import mix
from .options import CovarianceOptions, LoraOptions, PeftOptions
from .s_x import PerTask
from .views import ViewOptions


@dataclass
class MixOptions(ViewOptions, CovarianceOptions):
    """Number of experts per image, and the router."""

    mix: int = field(default=3, metadata={"help": "Experts per image, evaluated in one batch."})
    router: str = field(default="gaussian", metadata={"help": "A router whose scores are log-likelihoods."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.query_layers is None:
            self.query_layers = [-2, -1]
        if self.mix < 1:
            raise ConfigError(f"mix={self.mix} must be 1 or more.")


class SXMix(PerTask, name="s_x_mix"):
    """S-LoRA-Mix with any PEFT technique.

    **Trains** what S-X trains. **Stores** an adapter and head rows per task, a mean per class, one covariance.
    **Costs** 1 + `mix` forward passes per image. Query features are taken with the first task's expert.
    """

    title = "S-X-Mix"
    experts = "one PEFT expert per task, of which {mix} judge every image together with the router"
    query_with_first = True
    router: ClassRouter

    @dataclass
    class Config(MixOptions, PeftOptions):
        query_with_first: bool = field(
            default=True, metadata={"help": "Take query features with the first task's expert."}
        )

    def __init__(self, backbone: Backbone, config: ContinualConfig):
        super().__init__(backbone, config)
        self.query_with_first = getattr(self.options, "query_with_first", True)
        if not self.router.gives_likelihoods:
            raise ConfigError(
                f"{self.name} adds up log-likelihoods, and the scores of {self.options.router!r} are none: choose "
                "router='gaussian', a subclass of GaussianRouter, or a ClassRouter with gives_likelihoods = True."
            )

    @property
    def num_selected(self) -> int:
        return min(self.options.mix, self.router.num_owners)

    def route(self, query: torch.Tensor) -> Routing:
        routing = self.router(query)
        nearest = routing.distances.topk(self.num_selected, largest=False).indices
        return routing._replace(selection=nearest)

    def classify(self, features: torch.Tensor, routing: Routing) -> torch.Tensor:
        logits = [self.heads(features[:, n], routing.selection[:, n]) for n in range(features.shape[1])]
        router = self.router
        assert routing.scores is not None
        return mix(torch.stack(logits, dim=1), routing.selection, routing.scores, router.owners, router.classes)


class SLoraMix(SXMix, name="s_lora_mix"):
    """S-LoRA-Mix: combines a Gaussian router, on features of two layers, with several experts per image.

    Query features are taken with the first task's expert, after the last two layers by default.
    [`GaussianRouter`] finds the `mix` likeliest tasks; their experts run in one batch, and their log-probabilities are
    added to the router's class scores: see [`hf_clpeft.methods.mixing`].
    """

    title = "S-LoRA-Mix"

    @dataclass
    class Config(MixOptions, LoraOptions):
        pass
