"""DualPrompt: general prefixes in the first layers, behind them the expert prefix of the task with the nearest key."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from ..backbones import Backbone
from ..config import ConfigError, ContinualConfig, TaskConfig
from ..config.adapters import LARGEST_RANK
from ..config.checks import MOST, check_ranges
from ..experts.expert import make_peft_config
from ..experts.prefix import insert_prefixes, prepare_for_prefixes
from ..routing import KeyRouter, Routing
from .heads import Heads
from .layers import check_chosen, scaled
from .learning import Batch, FeaturesOf
from .method import Method
from .options import ExpertLayerOptions, QueryOptions


class DualPrompt(Method, name="dualprompt"):
    """DualPrompt: general and expert prefixes; arXiv 2204.04799.

    **Trains** general prefixes on every task; an expert prefix and a key per task; the head rows of its classes.
    **Stores** the general prefixes once, and a PEFT adapter, a key and head rows per task. **Costs** two forward
    passes per image: one for the query features, one with the prefixes.

    The layers are those of the paper, 1-2 general and 3-5 expert of the 12 of a ViT-B/16, in proportion to the depth.
    A prefix of length L is L keys and L values, as in the authors' code; the paper's text halves it. A new expert
    prefix starts from the one before, as in that code, and the first ones at random with the scale of all prompts
    here, which is smaller. An image chooses a key by itself: in that code, the images of a test batch vote.
    """

    title, paper = "DualPrompt", "2204.04799"
    experts = "one expert prefix per task, of which every image chooses its own, and general ones of all tasks"
    which_router, which_head = KeyRouter.title, "shared"
    routes = trains_by_query = True
    router: KeyRouter
    heads: Heads

    @dataclass
    class Config(QueryOptions, ExpertLayerOptions):
        general_length: int = field(default=5, metadata={"help": "Keys, and values, of a general prefix."})
        expert_length: int = field(default=20, metadata={"help": "Keys, and values, of an expert prefix."})
        general_layers: list[int] | None = field(
            default=None, metadata={"help": "Layers with general prefixes, from 1; default: the first 2 of every 12."}
        )
        expert_layers: list[int] | None = field(
            default=None,
            metadata={
                "help": "Layers with expert prefixes, from 1, or from -1 down; default: the next 3 of every 12."
            },
        )
        pull: float = field(default=1.0, metadata={"help": "Weight of the loss that pulls a task's key to queries."})

        def __post_init__(self) -> None:
            super().__post_init__()
            lengths = {"general_length": (1, LARGEST_RANK), "expert_length": (1, LARGEST_RANK)}
            check_ranges(self, pull=(0, MOST), **lengths)
            check_chosen("general_layers", self.general_layers)

        @property
        def peft(self) -> dict[str, Any]:
            """The PEFT technique of an expert; its layers depend on the backbone."""
            return {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": self.expert_length}

    def __init__(self, backbone: Backbone, config: ContinualConfig):
        super().__init__(backbone, config)
        options, count = self.options, backbone.num_layers
        check_chosen("general_layers", options.general_layers, count)
        general, last = scaled(2, count), scaled(5, count)
        self.general_layers = options.general_layers or [*range(1, general + 1)]
        # A backbone of one or two layers has at least one of them with an expert prefix.
        after = range(general + 1, last + 1) or [min(general + 1, count)]
        self.expert_layers = self.expert_layers or [*after]
        prepare_for_prefixes(backbone)
        self.router = KeyRouter(self.query_size, len(config.tasks), top_n=1)
        self.heads = Heads(backbone.hidden_size, shared=True)
        shape = (len(self.general_layers), 2, options.general_length, backbone.hidden_size)
        self.general = torch.nn.Parameter(torch.zeros(shape), requires_grad=False)

    def route(self, query: torch.Tensor) -> Routing:
        routing = self.router(query)
        return routing._replace(selection=routing.selection[:, 0])

    def read(self, pixels: torch.Tensor, selection: torch.Tensor) -> torch.Tensor:
        with insert_prefixes(self._general()):
            return self.bank(pixels, selection)

    def classify(self, features: torch.Tensor, routing: Routing) -> torch.Tensor:
        return self.heads(features, routing.selection)

    def begin(self, task: TaskConfig) -> None:
        self._head = self.heads.start(self.numbers).to(self.backbone.device)
        self._key = torch.nn.Parameter(torch.empty(self.query_size).uniform_(-1, 1))
        if not self.config.tasks:
            torch.nn.init.normal_(self.general, std=0.02)
        self.general.requires_grad_()
        before = self.bank[-1] if len(self.bank) else None
        self.bank.start(task.name, make_peft_config(self.options.peft, self.backbone, self.expert_layers))
        if before is not None:
            self.bank.adopt(before)

    def loss(self, batch: Batch) -> torch.Tensor:
        assert batch.query is not None
        with insert_prefixes(self._general()):
            features = self.bank.under_training(batch.pixels)
        logits = self._head(features.to(self._head.weight.dtype))
        # The task is known, so its own key is pulled, and the softmax is over its own classes.
        pull = 1 - cosine_similarity(batch.query.to(self._key), self._key[None], dim=1)
        return cross_entropy(logits.float(), self.rows(batch.labels), reduction="none") + self.options.pull * pull

    def end(self, features_of: FeaturesOf) -> None:
        assert self.task is not None
        self.bank.finish(self.task.name)
        self.heads.write(self._head.weight, self._head.bias, self.numbers)
        keys = torch.cat([self.router.keys, self._key.detach()[None]])
        self.router.keys = torch.nn.Parameter(keys, requires_grad=False)
        del self._head, self._key

    def expert_names(self) -> list[str]:
        return [task.name for task in self.config.tasks]

    def expert_of(self, position: int) -> int | None:
        return position

    def alike(self) -> dict[str, Any]:
        raise ConfigError(f"is of the method {self.name}, whose general prefixes were trained by all of its tasks")

    def _general(self) -> dict[int, torch.Tensor]:
        return {number - 1: prefix for number, prefix in zip(self.general_layers, self.general, strict=True)}
