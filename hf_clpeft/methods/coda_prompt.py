"""CODA-Prompt: every image gets prefixes of its own, weighted sums of components that tasks add and then freeze."""

from dataclasses import dataclass, field

import torch
from torch.nn.functional import cross_entropy, normalize

from ..backbones import Backbone
from ..backbones.precision import without_autocast
from ..config import ConfigError, ContinualConfig, TaskConfig
from ..config.adapters import LARGEST_RANK
from ..config.checks import MOST, check_ranges
from ..experts.prefix import insert_prefixes, prepare_for_prefixes
from ..routing import Routing
from .heads import Heads
from .layers import check_chosen, scaled
from .learning import Batch, FeaturesOf
from .method import Method
from .options import QueryOptions


PARTS = ("prompts", "keys", "attention")  # of a component
MOST_COMPONENTS = 10_000


class CodaPrompt(Method, name="coda_prompt"):
    """CODA-Prompt: prefixes are weighted sums of components; arXiv 2211.13218.

    A component m of a layer has a prompt P, a key K and an attention vector A; for the query features q of an image,
    the prefix of the layer is Σ_m cos(q ⊙ A_m, K_m) P_m. Nothing is selected: gradients reach everything.

    **Trains** the components of a task, beside the frozen ones of the tasks before, and the head rows of its classes.
    **Stores** both. **Costs** two forward passes per image: one for the query features, one with the prefixes.

    The layers are those of the paper, 1-5 of the 12 of a ViT-B/16, in proportion to the depth. Every task adds the
    same number of components, as the number of tasks is not known; the paper divides 100 among them, so that 10 tasks
    get 10 each. Its prompts of length 8 are 4 keys and 4 values here. The penalty is the mean square of B Bᵀ − I, as
    in the authors' code, which scales it down further, by 10⁻⁶. Components are no PEFT adapters, as none of them is of
    use alone; they are in `method.safetensors`.
    """

    title, paper = "CODA-Prompt", "2211.13218"
    experts = "prefixes of every image's own, mixed from {components} components per task"
    which_head = "shared"
    trains_by_query = reads_by_query = True
    heads: Heads

    @dataclass
    class Config(QueryOptions):
        components: int = field(default=10, metadata={"help": "Components that a task adds."})
        prefix_length: int = field(default=4, metadata={"help": "Keys, and values, of a prefix."})
        layers: list[int] | None = field(
            default=None, metadata={"help": "Layers with prefixes, from 1; default: the first 5 of every 12."}
        )
        orthogonality: float = field(
            default=0.1, metadata={"help": "Weight of the loss that keeps components orthogonal."}
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            check_ranges(self, components=(1, MOST_COMPONENTS), prefix_length=(1, LARGEST_RANK))
            check_ranges(self, orthogonality=(0, MOST))
            check_chosen("layers", self.layers)

    def __init__(self, backbone: Backbone, config: ContinualConfig):
        super().__init__(backbone, config)
        options, count = self.options, backbone.num_layers
        check_chosen("layers", options.layers, count)
        self.layers = [i - 1 for i in options.layers or range(1, scaled(5, count) + 1)]
        prepare_for_prefixes(backbone)
        self.heads = Heads(backbone.hidden_size, shared=True)
        for part, width in zip(PARTS, self._widths, strict=True):
            self.register_buffer(part, torch.zeros(len(self.layers), 0, width))

    @property
    def _widths(self) -> tuple[int, int, int]:
        return 2 * self.options.prefix_length * self.backbone.hidden_size, self.query_size, self.query_size

    def read(self, pixels: torch.Tensor, selection: torch.Tensor, query: torch.Tensor | None = None) -> torch.Tensor:
        assert query is not None
        return self._prompted(pixels, query, [getattr(self, part) for part in PARTS])

    def classify(self, features: torch.Tensor, routing: Routing) -> torch.Tensor:
        return self.heads(features, routing.selection)

    def begin(self, task: TaskConfig) -> None:
        self._head = self.heads.start(self.numbers).to(self.backbone.device)
        new = [orthonormal(getattr(self, part), self.options.components) for part in PARTS]
        self._new = torch.nn.ParameterList([torch.nn.Parameter(rows) for rows in new])

    def loss(self, batch: Batch) -> torch.Tensor:
        assert batch.query is not None
        parts = self._with_new()
        features = self._prompted(batch.pixels, batch.query, parts)
        logits = self._head(features.to(self._head.weight.dtype))
        with without_autocast(features.device):
            penalty = torch.stack([overlap(rows) for rows in parts]).sum()
        loss = cross_entropy(logits.float(), self.rows(batch.labels), reduction="none")
        return loss + self.options.orthogonality * penalty

    def end(self, features_of: FeaturesOf) -> None:
        for part, rows in zip(PARTS, self._with_new(), strict=True):
            setattr(self, part, rows.detach())
        self.heads.write(self._head.weight, self._head.bias, self.numbers)
        del self._head, self._new

    def check(self) -> None:
        expected = self.options.components * len(self.config.tasks)
        for part in PARTS:
            if getattr(self, part).shape[1] != expected:
                raise ConfigError(f"method.safetensors has {getattr(self, part).shape[1]} {part}, not {expected}.")

    def remove(self, position: int, number_of: dict[int, int]) -> None:
        raise ConfigError(
            f"The components of later tasks were trained beside those of {self.config.tasks[position].name!r}; it "
            "cannot be removed exactly."
        )

    def _with_new(self) -> list[torch.Tensor]:
        return [torch.cat([getattr(self, part), new], dim=1) for part, new in zip(PARTS, self._new, strict=True)]

    def _prompted(self, pixels: torch.Tensor, query: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor:
        prompts, keys, attention = parts
        with without_autocast(query.device):
            rows = torch.einsum("bln,lnp->blp", weights_of(query.float(), keys, attention), prompts)
        prefixes = rows.unflatten(-1, (2, self.options.prefix_length, -1)).unbind(dim=1)
        with insert_prefixes(dict(zip(self.layers, prefixes, strict=True))):
            return self.bank.frozen(pixels)


def weights_of(query: torch.Tensor, keys: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """cos(q ⊙ A, K) of each image, layer and component, without a vector for each of them.

    Args:
        query (`torch.Tensor` of shape `(batch, width)`): Query features q.
        keys (`torch.Tensor` of shape `(layers, components, width)`): K.
        attention (`torch.Tensor` of shape `(layers, components, width)`): A.

    Returns:
        `torch.Tensor` of shape `(batch, layers, components)`.
    """
    products = torch.einsum("bd,lnd->bln", query, attention * normalize(keys, dim=-1))
    squares = torch.einsum("bd,lnd->bln", query.square(), attention.square())
    return products / squares.clamp_min(1e-24).sqrt()


def overlap(rows: torch.Tensor) -> torch.Tensor:
    """Mean square of the entries in which the Gram matrix of each layer's rows differs from 1, summed over layers."""
    return (rows @ rows.mT - torch.eye(rows.shape[1], device=rows.device)).square().mean(dim=(1, 2)).sum()


def orthonormal(known: torch.Tensor, count: int) -> torch.Tensor:
    """New rows of length 1, orthogonal to known ones and to each other as long as there is room, else random.

    Args:
        known (`torch.Tensor` of shape `(layers, rows, width)`): Rows, not necessarily orthogonal.
        count (`int`): Number of new ones in each layer.

    Returns:
        `torch.Tensor` of shape `(layers, count, width)`, on the CPU.
    """
    known = known.detach().cpu()
    layers, number, width = known.shape
    rows = torch.randn(layers, count, width)
    if number + count <= width:
        basis = torch.linalg.qr(known.mT).Q
        rows = torch.linalg.qr((rows - rows @ basis @ basis.mT).mT).Q.mT
    return normalize(rows, dim=-1)
