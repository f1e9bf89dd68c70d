"""SLCA: one adapter that learns slowly, and a head that is aligned on Gaussians of all classes after every task."""

from dataclasses import dataclass, field
from typing import Any

import torch

from ..backbones import Backbone
from ..config import ContinualConfig, TaskConfig
from ..config.checks import check_ranges
from .alignment import AlignedHeads, ClassGaussians, align
from .learning import Batch, FeaturesOf
from .options import LoraOptions
from .single import EXPERT, Single


class Aligned(Single):
    """Base: one LoRA adapter trained by all tasks, class Gaussians, and a head that is aligned on them."""

    takes_one_class = True
    heads: AlignedHeads
    gaussians: ClassGaussians

    def __init__(self, backbone: Backbone, config: ContinualConfig):
        super().__init__(backbone, config)
        self.heads = AlignedHeads(backbone.hidden_size)
        self.gaussians = ClassGaussians(backbone.hidden_size)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """[CLS] features with the adapter, as it was when a task was last finished."""
        return self.bank(pixels, torch.zeros(pixels.shape[0], dtype=torch.int64, device=pixels.device))

    def check(self) -> None:
        super().check()
        self.gaussians.check(len(self.config.tasks), len(self.config.classes))


class Slca(Aligned, name="slca"):
    """SLCA, slow learner with classifier alignment, in its LoRA form; arXiv 2303.05118, and 2408.08295 for LoRA.

    **Trains** one LoRA adapter on all tasks, at a low learning rate from the second on, and on each task the head rows
    of its classes alone. Then the rows of all classes are trained on features sampled from class Gaussians.
    **Stores** the adapter and the head once, and a Gaussian per class and task, `hidden_size` squared numbers.
    **Costs** one forward pass per image.

    It differs from the papers in this:

    - The first task is trained at the full `learning_rate`, which is what can be tuned on it: LoRA starts at zero. The
      code of SLCA++ takes half of it.
    - Norms and biases of the backbone stay frozen, as adapters of PEFT are files of their own. SLCA trains the whole
      backbone, SLCA++ LoRA, norms and biases.
    - The loss is plain cross entropy, as in SLCA. SLCA++ adds its reverse.
    - Means of old classes are not scaled. The code of SLCA shortens them by up to a tenth.
    - Covariances are shrunk, as [`ClassGaussians`] says, and the head is aligned faster, as [`align`] says.
    """

    title, paper = "SLCA", "2303.05118"
    experts = "one LoRA adapter that all of them trained, slowly"

    @dataclass
    class Config(LoraOptions):
        slow: float = field(
            default=0.1,
            metadata={"help": "Learning rate of the adapter from the second task on, as a fraction of learning_rate."},
        )
        temperature: float = field(
            default=0.1, metadata={"help": "Temperature of the normalised logits that the head is aligned with."}
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            check_ranges(self, slow=(0, 1), temperature=(1e-3, 1e3))

    def begin(self, task: TaskConfig) -> None:
        self.train_expert(EXPERT, self.heads.start(self.numbers))

    def parameter_groups(self, args: Any) -> list[dict[str, Any]]:
        adapter, head = super().parameter_groups(args)
        return [{**adapter, "lr": adapter["lr"] * (self.options.slow if self.config.tasks else 1)}, head]

    def loss(self, batch: Batch) -> torch.Tensor:
        # The softmax is over the classes of this task only; all others are masked.
        return self.expert_loss(batch.pixels, self.rows(batch.labels))

    def end(self, features_of: FeaturesOf) -> None:
        self.bank.finish(EXPERT)
        self.gaussians.learn(*features_of(self.features))
        head = self.heads.extended(self._head.weight, self._head.bias, self.numbers)
        del self._head
        if self.config.tasks:
            align(head, self.gaussians, self.seed, temperature=self.options.temperature)
        self.heads.write(head.weight, head.bias, list(range(len(self.classes))))
