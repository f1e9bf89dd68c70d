"""InfLoRA: a LoRA update per task in a subspace that is orthogonal to the inputs of earlier tasks."""

from dataclasses import dataclass, field
from typing import Any

import torch

from ..backbones import Backbone
from ..config import ConfigError, ContinualConfig, TaskConfig
from ..config.checks import check_ranges
from ..experts.expert import ADAPTER
from ..experts.lora import LoraTable
from .inputs import second_moments
from .learning import FeaturesOf
from .sums import LoraSum, SumOptions


MOST_SESSIONS = 10_000
MOST_COMBINATIONS = 1_024


class InfLora(LoraSum, name="inflora"):
    """InfLoRA, interference-free LoRA; arXiv 2404.00228.

    **Trains** B of a task's adapter, and the head rows of its classes. A is fixed to the top directions of the inputs
    of each layer that are orthogonal to the inputs of earlier tasks, so that old images are hardly affected.
    **Stores** an adapter per task, a basis of the old inputs of each layer (or of what is orthogonal to them, if that
    is smaller), and the head. **Costs** one forward pass per image, and two more passes over the training images.

    Rank, thresholds and the size of A are those of the authors. What differs from their code, and why:

    - Query and value are adapted, as in our other methods; for the paper's layers set `lora={"target_modules":
      ["k_proj", "v_proj"]}`, or what these are called in the backbone.
    - The matrix Σ x xᵀ of a layer's inputs is estimated from a few random combinations of the tokens of each image,
      which are small enough to be gathered. It is unbiased, and exact with as many combinations as tokens.
    - It is that of images that are not augmented, so that it can be computed again.
    - The number of tasks need not be known: thresholds rise over `sessions` tasks, and then stay.
    """

    title, paper = "InfLoRA", "2404.00228"

    @dataclass
    class Config(SumOptions):
        r: int = field(default=10, metadata={"help": "Rank of the LoRA adapters."})
        threshold: float = field(default=0.95, metadata={"help": "Share of old inputs that new updates leave alone."})
        last_threshold: float = field(default=1.0, metadata={"help": "The share towards which it rises."})
        sessions: int = field(default=10, metadata={"help": "Tasks over which it rises, linearly."})
        combinations: int = field(
            default=4, metadata={"help": "Random combinations of tokens per image and layer, to estimate the inputs."}
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            check_ranges(
                self,
                threshold=(0, 1),
                last_threshold=(0, 1),
                sessions=(1, MOST_SESSIONS),
                combinations=(1, MOST_COMBINATIONS),
            )

    def __init__(self, backbone: Backbone, config: ContinualConfig):
        super().__init__(backbone, config)
        # For each input of adapted layers, an orthonormal basis (rows) of what earlier tasks use, or of the rest.
        self.bases = torch.nn.ParameterList()
        self.register_buffer("of_rest", torch.zeros(0, dtype=torch.int64))  # 1 for a basis of the rest

    def begin(self, task: TaskConfig) -> None:
        super().begin(task)
        assert self.bank.slot is not None
        table = self.bank.table or LoraTable.made_for(self.backbone, self.bank.slot.peft_model)
        assert isinstance(table, LoraTable)
        self._layers: list[list[Any]] = [[] for _ in table.inputs]  # of the slot, by their input
        for key, site in table.sites.items():
            layer: Any = self.bank.slot.peft_model.get_submodule(key)
            layer.lora_A[ADAPTER].weight.requires_grad_(False).zero_()  # until `prepare`
            self._layers[site.input].append(layer)

    def prepare(self, features_of: FeaturesOf) -> None:
        for number, matrix in enumerate(self._matrices(features_of)):
            directions, _ = principal(matrix, self.rest(number, len(matrix)))
            for layer in self._layers[number]:
                a = layer.lora_A[ADAPTER].weight.zero_()  # rows stay zero where fewer directions are left
                found = directions[: len(a)] / 3**0.5  # as long as the rows of a new adapter of PEFT
                a[: len(found)] = found

    def end(self, features_of: FeaturesOf) -> None:
        options, learnt = self.options, min(len(self.config.tasks), self.options.sessions - 1)
        threshold = options.threshold + (options.last_threshold - options.threshold) * learnt / options.sessions
        bases, of_rest = [], []
        for number, matrix in enumerate(self._matrices(features_of)):
            directions, energies = principal(matrix, self.rest(number, len(matrix)))
            left = energies.flip(0).cumsum(0).flip(0)  # without the directions before each
            rest = directions[int((left > (1 - threshold) * matrix.square().sum()).sum()) :]
            smaller = 2 * len(rest) <= len(matrix)
            bases.append(rest if smaller else complement(rest))
            of_rest.append(smaller)
        super().end(features_of)
        del self._layers
        self.bases = torch.nn.ParameterList(torch.nn.Parameter(basis.float(), False) for basis in bases)
        self.of_rest = torch.tensor(of_rest, dtype=torch.int64)

    def rest(self, number: int, width: int) -> torch.Tensor:
        """An orthonormal basis (rows) of what is orthogonal to the inputs of earlier tasks.

        Args:
            number (`int`): Number of the input.
            width (`int`): Its size.
        """
        if not len(self.bases):
            return torch.eye(width, dtype=torch.float64)
        basis = self.bases[number].detach().cpu().double()
        return basis if self.of_rest[number] else complement(basis)

    def _matrices(self, features_of: FeaturesOf) -> list[torch.Tensor]:
        first = [layers[0] for layers in self._layers]
        return second_moments(first, self.features, features_of, self.options.combinations, self.seed)

    def check(self) -> None:
        super().check()
        table = self.bank.table
        widths = [width for _, width, _ in table.inputs] if isinstance(table, LoraTable) else []
        shapes = [basis.shape for basis in self.bases]
        if [shape[-1] for shape in shapes] != widths or any(
            len(shape) != 2 or shape[0] > shape[1] for shape in shapes
        ):
            raise ConfigError("method.safetensors has bases of the inputs of other layers.")
        if any(not is_orthonormal(basis.detach()) for basis in self.bases):
            raise ConfigError("method.safetensors has bases of inputs whose rows are not orthonormal.")
        if len(self.of_rest) != len(widths) or not set(self.of_rest.tolist()) <= {0, 1}:
            raise ConfigError("method.safetensors does not say of each basis what it spans.")


def principal(matrix: torch.Tensor, rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Left singular vectors of the part of a matrix in a subspace, and squared singular values, the largest first.

    Args:
        matrix (`torch.Tensor` of shape `(width, width)`): For example a second moment.
        rest (`torch.Tensor` of shape `(rows, width)`): Orthonormal basis of the subspace.

    Returns:
        `torch.Tensor` of shape `(rows, width)`: Another orthonormal basis of the subspace.
        `torch.Tensor` of shape `(rows,)`: Squared singular values.
    """
    part = rest @ matrix
    energies, vectors = torch.linalg.eigh(part @ part.mT)
    return vectors.flip(1).mT @ rest, energies.flip(0)


def is_orthonormal(rows: torch.Tensor) -> bool:
    """Whether rows are orthogonal to each other and of length 1, up to the rounding of float32."""
    rows = rows.cpu().double()
    return torch.allclose(rows @ rows.mT, torch.eye(len(rows), dtype=torch.float64), atol=1e-4)


def complement(basis: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis (rows) of what is orthogonal to orthonormal rows."""
    return torch.linalg.qr(basis.mT, mode="complete").Q[:, len(basis) :].mT
