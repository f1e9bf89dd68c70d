"""One expert for all tasks: the forgetting floor task by task, the ceiling on the images of all tasks at once."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from ..backbones import Backbone
from ..config import ContinualConfig, TaskConfig
from ..experts.expert import make_peft_config
from ..routing import Routing
from .heads import Heads
from .method import Batch, FeaturesOf, Method
from .options import LoraOptions, PeftOptions


EXPERT = "all-tasks"  # its name


class Single(Method, name="single"):
    """One adapter of any PEFT technique and one head, fine-tuned on every task in turn, nothing masked.

    **Trains** all of it on every task. **Stores** it once. **Costs** one forward pass an image.
    """

    title = "Sequential fine-tuning"
    heads: Heads
    query_layers: list[int] = []  # there is nothing to choose from

    @dataclass
    class Config(PeftOptions):
        pass

    def __init__(self, backbone: Backbone, config: ContinualConfig):
        super().__init__(backbone, config)
        self.heads = Heads(backbone.hidden_size, shared=True)

    def classify(self, features: torch.Tensor, routing: Routing) -> torch.Tensor:
        return self.heads(features, routing.selection)

    def begin(self, task: TaskConfig) -> None:
        self._head = self.heads.start(list(range(len(self.classes)))).to(self.backbone.device)
        self.bank.start(EXPERT, make_peft_config(self.options.peft, self.backbone))

    def loss(self, batch: Batch) -> torch.Tensor:
        logits = self._head(self.bank.under_training(batch.pixels).to(self._head.weight.dtype))
        return cross_entropy(logits.float(), batch.labels, reduction="none")

    def end(self, features_of: FeaturesOf) -> None:
        self.bank.finish(EXPERT)
        self.heads.write(self._head.weight, self._head.bias, list(range(len(self.classes))))
        del self._head

    def expert_names(self) -> list[str]:
        return [EXPERT] if self.config.tasks else []

    def expert_of(self, position: int) -> int | None:
        return 0

    @classmethod
    def facts(cls, options: Any) -> dict[str, str]:
        peft = ", ".join(f"{key} = {value}" for key, value in options.peft.items())
        return {
            "experts": "one PEFT expert that all of them trained",
            "PEFT": peft,
            "router": "none",
            "head": "shared",
        }


class SequentialLora(Single, name="sequential_lora"):
    """One LoRA adapter and one head, fine-tuned on every task in turn; on `stream.joined()`, the joint ceiling."""

    title = "Sequential LoRA"

    @dataclass
    class Config(LoraOptions):
        pass
