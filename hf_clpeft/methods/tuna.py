"""TUNA: of the experts of all tasks the surest one, together with a universal expert that is merged from them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import normalize

from ..backbones import Backbone
from ..config import ConfigError, ContinualConfig, TaskConfig
from ..config.checks import MOST, check_ranges
from ..experts import Expert
from ..routing import Routing
from .alignment import ClassGaussians, align
from .all_experts import AllExperts
from .cosine import CosineHead, cosines
from .learning import Batch, FeaturesOf
from .options import LoraOptions


UNIVERSAL = "universal"  # name of the merged expert, the first in the bank
SCALE = 20.0  # of the cosines of features and head rows
ALIGNMENT: dict[str, Any] = {"epochs": 30, "per_class": 80, "learning_rate": 0.005}  # as its code has it for CIFAR-100
NOT_MERGED = ("use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "modules_to_save")


class Tuna(AllExperts, name="tuna"):
    """TUNA: the mean of the probabilities of the surest task's expert and of a universal expert.

    **Trains** an adapter per task, with a temporary cosine head, and keeps it orthogonal to earlier ones.
    **Stores** these, the universal adapter, a Gaussian per class and task, and a cosine head. **Costs** one forward
    pass per image and task, and one more.

    After each task, [`merge`] makes the universal expert anew. The head of all classes starts from the class means and
    is aligned on features sampled from the Gaussians, which are those with the expert of their own task. The surest
    expert of an image is the one whose probabilities over all classes have the least entropy.

    Adapters are LoRA, where the paper has bottlenecks whose two matrices are merged one by one. The factors of LoRA
    adapters that were drawn apart have no common basis, so their products are merged. The code of the paper trains
    each adapter further from the one before, and aligns a head that it aligned before; here both start afresh, so that
    experts depend on others by their orthogonality alone. Experts of S-LoRA can be taken (`experts_from`), but were
    trained with a linear head: they are surer of images of other tasks, and the surest is more often a wrong one.
    """

    title, paper = "TUNA", "2508.08165"
    experts = "one PEFT expert per task, of which the surest judges an image, and a universal one merged from them"
    which_head = "shared, of cosines"
    remade = (UNIVERSAL,)
    head: torch.Tensor

    @dataclass
    class Config(LoraOptions):
        orthogonality: float = field(
            default=1e-3, metadata={"help": "Weight of the loss that keeps an adapter orthogonal to earlier ones."}
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            check_ranges(self, orthogonality=(0, MOST))
            beyond = [name for name in NOT_MERGED if self.lora.get(name)]
            if beyond:
                raise ConfigError(f"tuna merges LoRA adapters that are plain, of one rank, and has no {beyond[0]}.")

    def __init__(self, backbone: Backbone, config: ContinualConfig):
        super().__init__(backbone, config)
        self.gaussians = ClassGaussians(backbone.hidden_size)
        self.register_buffer("head", torch.zeros(0, backbone.hidden_size))
        self.chained = bool(self.options.orthogonality)

    def classify(self, features: torch.Tensor, routing: Routing) -> torch.Tensor:
        log_probabilities = (SCALE * cosines(features, self.head)).log_softmax(dim=-1)
        probabilities = log_probabilities.exp()
        universal = routing.selection == 0
        certainties = (probabilities * log_probabilities).sum(dim=-1).masked_fill(universal, -torch.inf)
        judges = universal.scatter(1, certainties.argmax(dim=1, keepdim=True), True)
        return probabilities.masked_fill(~judges[..., None], 0.0).sum(dim=1).div(judges.sum(dim=1, keepdim=True)).log()

    def begin(self, task: TaskConfig) -> None:
        if task.name.casefold() == UNIVERSAL:
            raise ConfigError(f"In {self.name}, {UNIVERSAL!r} is the merged expert; give the task another name.")
        rows = torch.nn.Linear(self.backbone.hidden_size, len(task.classes)).weight
        self.train_expert(task.name, CosineHead(rows, SCALE))
        earlier = list(self.bank)[1:] if self.chained else []
        device = self.backbone.device
        self._earlier = [[up.to(device) for _, up in _factors(expert).values()] for expert in earlier]

    def loss(self, batch: Batch) -> torch.Tensor:
        losses = super().loss(batch)
        if not self._earlier:
            return losses
        assert self.bank.slot is not None
        named = self.bank.slot.peft_model.named_parameters()
        ups = [up.flatten(1) for name, up in named if ".lora_B." in name]
        return losses + self.options.orthogonality * math.exp(-len(self.tasks)) * overlap(ups, self._earlier)

    def end(self, features_of: FeaturesOf) -> None:
        assert self.bank.slot is not None
        if not len(self.bank):
            self.bank.extend([Expert.from_peft_model(UNIVERSAL, self.bank.slot.peft_model)])
        super().end(features_of)
        del self._earlier
        self.gaussians.learn(*self.under(len(self.bank) - 1, features_of))
        self.gaussians.check(len(self.tasks), len(self.classes))
        experts = list(self.bank)[1:]
        self.bank.start(UNIVERSAL, experts[0].config)
        self.bank.adopt(merge(experts))
        self.bank.finish(UNIVERSAL)
        means = normalize(self.gaussians.means.cpu(), dim=-1)
        rows = torch.zeros(len(self.classes), means.shape[1]).index_add(0, self.gaussians.classes.cpu(), means)
        head = CosineHead(rows, SCALE)
        align(head, self.gaussians, self.seed, **ALIGNMENT)
        self.head = head.weight.detach()

    def check(self) -> None:
        num_tasks, num_classes = len(self.config.tasks), len(self.config.classes)
        self.gaussians.check(num_tasks, num_classes)
        if len(self.head) != num_classes:
            raise ConfigError(f"method.safetensors has head rows of {len(self.head)} classes, not of {num_classes}.")

    def expert_names(self) -> list[str]:
        return [UNIVERSAL, *super().expert_names()] if self.config.tasks else []

    def expert_of(self, position: int) -> int | None:
        return position + 1


def overlap(ups: Sequence[torch.Tensor], earlier: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """How far an adapter is from orthogonal to earlier ones: Σ ‖Bᵀ B'‖₁ over these, averaged over the layers.

    Args:
        ups (sequence of `torch.Tensor` of shape `(outputs, r)`): Its B of each layer.
        earlier (sequence of the same): Those of each earlier adapter.

    Returns:
        `torch.Tensor` of shape `()`.

    Source: TUNA, arXiv 2508.08165, section 4.1.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.methods.tuna import overlap

    >>> overlap([torch.tensor([[1.0], [2.0]])], [[torch.tensor([[3.0], [-4.0]])], [torch.tensor([[2.0], [-1.0]])]])
    tensor(5.)

    ```
    """
    each = [(up.T @ old).abs().sum() for of_expert in earlier for up, old in zip(ups, of_expert, strict=True)]
    return torch.stack(each).sum() / len(ups)


def elect(updates: torch.Tensor) -> torch.Tensor:
    """Merges updates entry by entry: the sign of their sum, and the largest magnitude among those of that sign.

    Args:
        updates (`torch.Tensor` of shape `(experts, ...)`): Updates of the same layer.

    Returns:
        `torch.Tensor` of shape `(...)`.

    Source: TUNA, arXiv 2508.08165, section 4.2.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.methods.tuna import elect

    >>> elect(torch.tensor([[3.0, 1.0], [-1.0, 1.5], [-1.5, -4.0]]))
    tensor([ 3., -4.])

    ```
    """
    sign = updates.sum(dim=0).sign()
    return sign * (updates * sign).amax(dim=0).clamp(min=0.0)


def merge(experts: Sequence[Expert]) -> Expert:
    """The universal expert: LoRA of the rank of the experts, whose updates are nearest to those that [`elect`] gives.

    Args:
        experts (sequence of [`Expert`]): LoRA experts of equal configuration.

    Returns:
        [`Expert`]
    """
    config: Any = experts[0].config
    tensors, factors = {}, [_factors(expert) for expert in experts]
    for key, (down, up) in factors[0].items():
        updates = torch.stack([of_expert[key][1].double() @ of_expert[key][0].double() for of_expert in factors])
        left, values, right = torch.linalg.svd(elect(updates), full_matrices=False)
        roots = values[: config.r].sqrt()
        tensors[f"{key}.lora_A.weight"] = (roots[:, None] * right[: config.r]).to(down)
        tensors[f"{key}.lora_B.weight"] = (left[:, : config.r] * roots).to(up)
    shapes = {key: tensor.shape for key, tensor in experts[0].tensors.items()}
    return Expert(UNIVERSAL, config, {key: tensors[key].reshape(shape) for key, shape in shapes.items()})


def _factors(expert: Expert) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A, of shape `(r, inputs)`, and B, of shape `(outputs, r)`, by layer."""
    layers = [key.removesuffix(".lora_A.weight") for key in expert.tensors if key.endswith(".lora_A.weight")]
    both = [tuple(expert.tensors[f"{layer}.lora_{factor}.weight"].flatten(1) for factor in "AB") for layer in layers]
    return {layer: (down, up) for layer, (down, up) in zip(layers, both, strict=True)}
