"""Base of methods in which the experts of all tasks read every image."""

import torch

from ..backbones import Backbone
from ..backbones.tracing import tracing
from ..config import ContinualConfig, TaskConfig
from ..routing import Routing
from .heads import Heads
from .learning import Batch, FeaturesOf
from .method import Method
from .s_x import check_giver


MOST_AT_ONCE = 64  # images per forward pass, each counted once per expert, so that memory does not grow with the tasks


class AllExperts(Method):
    """Base: one PEFT adapter per task, trained with a temporary head; all of them read every image.

    Experts are trained as in [`SX`], so that a model of any S-X method can give them to `experts_from`.
    """

    independent = takes_one_class = True
    experts = "one PEFT expert per task, all of which read every image"

    def __init__(self, backbone: Backbone, config: ContinualConfig):
        super().__init__(backbone, config)
        self.query_layers = []  # nothing is routed, so that no query features are needed

    @property
    def num_selected(self) -> int:
        return max(1, len(self.bank))

    def route(self, query: torch.Tensor) -> Routing:
        every = torch.arange(self.num_selected, device=query.device).expand(query.shape[0], -1)
        return super().route(query)._replace(selection=every)

    def read(self, pixels: torch.Tensor, selection: torch.Tensor) -> torch.Tensor:
        if selection.dim() == 1 or tracing():
            return super().read(pixels, selection)
        parts = selection.split(max(1, MOST_AT_ONCE // len(pixels)), dim=1)
        return torch.cat([super(AllExperts, self).read(pixels, part) for part in parts], dim=1)

    def begin(self, task: TaskConfig) -> None:
        self.train_expert(task.name, Heads(self.backbone.hidden_size, shared=False).start(self.numbers))

    def loss(self, batch: Batch) -> torch.Tensor:
        return self.expert_loss(batch.pixels, self.rows(batch.labels))

    def end(self, features_of: FeaturesOf) -> None:
        assert self.task is not None
        self.bank.finish(self.task.name)
        del self._head

    def under(self, expert: int, features_of: FeaturesOf) -> tuple[torch.Tensor, torch.Tensor]:
        """For use in [`~Method.end`]: features of all training images with one expert, and their class indices."""

        def features(pixels: torch.Tensor) -> torch.Tensor:
            return self.bank(pixels, torch.full((len(pixels),), expert, device=pixels.device))

        return features_of(features)

    def costs(self) -> tuple[int, int]:
        return super().costs()[0], 0

    def accept(self, giver: Method) -> None:
        check_giver(self, giver)

    def take(self, giver: Method, position: int) -> None:
        self.bank.adopt(giver.bank[position])

    def expert_names(self) -> list[str]:
        return [task.name for task in self.config.tasks]

    def expert_of(self, position: int) -> int | None:
        return position
