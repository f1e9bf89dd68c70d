"""One expert for all tasks: the lower bound when trained in sequence, the upper bound on `stream.joined()`."""

from dataclasses import dataclass

import torch

from ..backbones import Backbone
from ..config import ContinualConfig, TaskConfig
from ..routing import Routing
from .heads import Heads
from .learning import Batch, FeaturesOf
from .method import Method
from .options import LoraOptions, PeftOptions


EXPERT = "all-tasks"


class Single(Method, name="single"):
    """One adapter of any PEFT technique and one head, fine-tuned on every task in sequence, without masking.

    **Trains** both on every task. **Stores** them once. **Costs** one forward pass per image.
    """

    title = "Sequential fine-tuning"
    heads: Heads
    experts, which_head = "one PEFT expert that all of them trained", "shared"

    @dataclass
    class Config(PeftOptions):
        pass

    def __init__(self, backbone: Backbone, config: ContinualConfig):
        super().__init__(backbone, config)
        self.heads = Heads(backbone.hidden_size, shared=True)
        self.query_layers = []  # a single expert needs no query features

    def classify(self, features: torch.Tensor, routing: Routing) -> torch.Tensor:
        return self.heads(features, routing.selection)

    def begin(self, task: TaskConfig) -> None:
        self.train_expert(EXPERT, self.heads.start(list(range(len(self.classes)))))

    def loss(self, batch: Batch) -> torch.Tensor:
        return self.expert_loss(batch.pixels, batch.labels)

    def end(self, features_of: FeaturesOf) -> None:
        self.bank.finish(EXPERT)
        self.heads.write(self._head.weight, self._head.bias, list(range(len(self.classes))))
        del self._head

    def expert_names(self) -> list[str]:
        return [EXPERT] if self.config.tasks else []

    def expert_of(self, position: int) -> int | None:
        return 0


class SequentialLora(Single, name="sequential_lora"):
    """One LoRA adapter and one head, fine-tuned on every task in sequence; on `stream.joined()`, joint training."""

    title = "Sequential LoRA"

    @dataclass
    class Config(LoraOptions):
        pass
