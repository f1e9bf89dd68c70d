"""L2P and L2L: a pool of experts trained by all tasks; every image selects those with the nearest keys."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy

from ..backbones import Backbone
from ..config import ConfigError, ContinualConfig, TaskConfig
from ..config.checks import MOST, check_ranges
from ..experts.expert import make_peft_config
from ..routing import KeyRouter, Routing
from .heads import Heads
from .learning import Batch, FeaturesOf
from .method import Method
from .options import LoraOptions, PeftOptions, PromptOptions, QueryOptions


LARGEST_POOL = 10_000  # experts
NOT_FUSED = ("lora_dropout", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "modules_to_save")


@dataclass
class PoolOptions(QueryOptions):
    """Size and selection of the pool."""

    pool_size: int = field(default=10, metadata={"help": "Experts in the pool."})
    top_n: int = field(default=5, metadata={"help": "Experts selected per image."})
    pull: float = field(default=0.5, metadata={"help": "Weight of the loss that pulls selected keys towards queries."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, pool_size=(1, LARGEST_POOL), pull=(0, MOST))
        if not 1 <= self.top_n <= self.pool_size:
            raise ConfigError(f"top_n={self.top_n} must be between 1 and pool_size={self.pool_size}.")
        peft: dict[str, Any] = getattr(self, "peft")  # noqa: B009  # from the other base class of `Config`
        beyond = [name for name in NOT_FUSED if peft.get(name)]
        if peft["peft_type"] not in ("LORA", "PROMPT_TUNING", "PREFIX_TUNING") or beyond:
            what = ", ".join(beyond) or peft["peft_type"]
            raise ConfigError(f"A pool is made of plain LoRA modules, prompts or prefixes; {what} cannot be in one.")


class Pool(Method, name="l2x"):
    """A pool of LoRA modules or prompts; arXiv 2112.08654, and section 3 of arXiv 2406.03216.

    **Trains** the pool, its keys and the head on every task. **Stores** them once, however many tasks there are.
    **Costs** two forward passes per image.
    """

    title, paper = "L2X", "2406.03216"
    experts = "a pool of {pool_size} PEFT experts, of which every image selects {top_n}"
    which_router, which_head = KeyRouter.title, "shared"
    routes = trains_by_query = True
    router: KeyRouter
    heads: Heads

    @dataclass
    class Config(PoolOptions, PeftOptions):
        readout: Literal["cls", "prompts"] = field(
            default="cls", metadata={"help": "What the head classifies: [CLS], or the mean of the prompts' outputs."}
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.readout == "prompts" and self.peft["peft_type"] != "PROMPT_TUNING":
                raise ConfigError("readout='prompts' needs a pool of prompts, of peft_type PROMPT_TUNING.")

    def __init__(self, backbone: Backbone, config: ContinualConfig):
        super().__init__(backbone, config)
        self.router = KeyRouter(self.query_size, self.options.pool_size, self.options.top_n)
        self.heads = Heads(backbone.hidden_size, shared=True)

    def route(self, query: torch.Tensor) -> Routing:
        return self.router(query)

    def read(self, pixels: torch.Tensor, selection: torch.Tensor) -> torch.Tensor:
        return self.bank(pixels, selection, self.options.readout)

    def classify(self, features: torch.Tensor, routing: Routing) -> torch.Tensor:
        return self.heads(features, routing.selection[:, 0])

    def begin(self, task: TaskConfig) -> None:
        self._head = self.heads.start(self.numbers).to(self.backbone.device)
        if not len(self.bank):
            self.router.reset_parameters()
            config = make_peft_config(self.options.peft, self.backbone, self.expert_layers)
            self.bank.make_pool(self._names, config)
        self.bank.train_pool(self.router.keys)

    def loss(self, batch: Batch) -> torch.Tensor:
        assert batch.query is not None
        routing = self.router(batch.query)
        features = self.read(batch.pixels, routing.selection)
        logits = self._head(features.to(self._head.weight.dtype))
        # Σ (1 − cos(query, key)) over the selected keys: arXiv 2112.08654, equation 5.
        pull = self.options.pull * routing.selection.shape[1] * routing.distance
        return cross_entropy(logits.float(), self.rows(batch.labels), reduction="none") + pull

    def end(self, features_of: FeaturesOf) -> None:
        self.bank.keep_pool()
        self.heads.write(self._head.weight, self._head.bias, self.numbers)
        del self._head

    def costs(self) -> tuple[int, int]:
        experts = sum(expert.num_parameters for expert in self.bank) + self.router.keys.numel()
        return experts, sum(rows.numel() for rows in self._head.parameters())

    @property
    def _names(self) -> list[str]:
        return [f"pool-{i:03d}" for i in range(self.options.pool_size)]

    def expert_names(self) -> list[str]:
        return self._names if self.config.tasks or self.config.expert_names else []

    @property
    def num_selected(self) -> int:
        return self.options.top_n

    def choose(self, expert: str) -> int:
        raise ConfigError(f"expert={expert!r}: {self.name} selects from a pool; none can be chosen by hand.")


class L2l(Pool, name="l2l"):
    """L2L: L2P with LoRA in place of prompts; section 3 of arXiv 2406.03216."""

    title = "L2L"

    @dataclass
    class Config(PoolOptions, LoraOptions):
        readout = "cls"


class L2p(Pool, name="l2p"):
    """L2P: a pool of prompts; arXiv 2112.08654. The head classifies the mean of the prompts' outputs."""

    title, paper = "L2P", "2112.08654"

    @dataclass
    class Config(PoolOptions, PromptOptions):
        prompt_length: int = field(default=5, metadata={"help": "Tokens per prompt, inserted after [CLS]."})
        readout = "prompts"
