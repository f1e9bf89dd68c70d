"""Base of methods with one LoRA expert per task, all of which are applied to every image."""

from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from ..backbones import Backbone
from ..config import ConfigError, ContinualConfig, TaskConfig
from ..experts.lora import LoraTable
from ..routing import Routing
from .heads import Heads
from .learning import Batch, FeaturesOf
from .method import Method
from .options import LoraOptions


NOT_PLAIN = ("use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "modules_to_save")


@dataclass
class SumOptions(LoraOptions):
    """Plain LoRA of one rank, whose updates can be added up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        beyond = [name for name in NOT_PLAIN if self.lora.get(name)]
        if self.peft["peft_type"] != "LORA" or beyond:
            what = ", ".join(beyond) or self.peft["peft_type"]
            raise ConfigError(f"Only updates of plain LoRA can be added up; {what} cannot be used in {self.name}.")


class LoraSum(Method):
    """Base: the LoRA updates of all tasks are added up. One model for all images, without a router."""

    experts = "a LoRA expert per task; the updates of all of them are added up"
    which_head = "shared"
    heads: Heads

    @dataclass
    class Config(SumOptions):
        pass

    def __init__(self, backbone: Backbone, config: ContinualConfig):
        super().__init__(backbone, config)
        self.heads = Heads(backbone.hidden_size, shared=True)
        self.query_layers = []  # nothing is routed

    def route(self, query: torch.Tensor) -> Routing:
        images = query.shape[0]
        return Routing(self._all(query), query.new_zeros(images), query.new_zeros(images, len(self.bank)))

    def classify(self, features: torch.Tensor, routing: Routing) -> torch.Tensor:
        return self.heads(features, torch.zeros(features.shape[0], dtype=torch.int64, device=features.device))

    def begin(self, task: TaskConfig) -> None:
        self.train_expert(task.name, self.heads.start(self.numbers))
        assert self.bank.slot is not None
        if not len(self.bank) and LoraTable.made_for(self.backbone, self.bank.slot.peft_model) is None:
            raise ConfigError(
                f"{self.name} adds up LoRA updates of linear layers, and these of {self.backbone.config.name_or_path} "
                "are others. Choose a vision transformer, or other target_modules."
            )

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Differentiable [CLS] features with the experts of all tasks, and the one that is being trained."""
        return self.bank.under_training(pixels, self._all(pixels) if len(self.bank) else None, self.factors())

    def factors(self) -> torch.Tensor | None:
        """Factors of the earlier updates while a task is trained; see [`ExpertBank.under_training`]."""
        return None

    def loss(self, batch: Batch) -> torch.Tensor:
        # The softmax is over the classes of this task only; all others are masked.
        logits = self._head(self.features(batch.pixels).to(self._head.weight.dtype))
        return cross_entropy(logits.float(), self.rows(batch.labels), reduction="none")

    def end(self, features_of: FeaturesOf) -> None:
        assert self.task is not None
        self.bank.finish(self.task.name)
        self.bank.trim()  # all experts are summed: to the same bits as after loading
        self.heads.write(self._head.weight, self._head.bias, self.numbers)
        del self._head

    def _all(self, images: torch.Tensor) -> torch.Tensor:
        """Selects all experts for each image."""
        return torch.arange(len(self.bank), device=images.device).expand(images.shape[0], -1)

    def expert_names(self) -> list[str]:
        return [task.name for task in self.config.tasks]

    def choose(self, expert: str) -> int:
        raise ConfigError(f"expert={expert!r}: {self.name} applies all experts to every image; none can be chosen.")
