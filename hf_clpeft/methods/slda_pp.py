"""SLDA++: linear discriminant analysis over many views and several depths, with the first task's expert."""

from dataclasses import dataclass, field
from typing import Any

import torch

from ..backbones import Backbone
from ..config import ContinualConfig, TaskConfig
from .closed_form import ClosedForm, FirstExpert
from .options import CovarianceOptions, LoraOptions
from .views import ViewOptions


VIEW_KINDS = {"flip": "mirror images", "crop": "crops", "crop_flip": "crops and mirror images"}


@dataclass
class ManyLooks(ViewOptions, CovarianceOptions):
    """Eight views of a training image, two of one to predict, and four depths."""

    views: int = field(
        default=8, metadata={"help": "Views of each training image in the router's sums; with 1, the image alone."}
    )
    test_views: int = field(
        default=2, metadata={"help": "Views of an image to predict, whose scores are averaged: a forward pass each."}
    )
    covariance_rank: int | None = field(
        default=128, metadata={"help": "Principal components of a task's covariance that are kept."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.query_layers is None:
            self.query_layers = [-4, -3, -2, -1]


class SldaPp(FirstExpert, name="slda_pp"):
    """SLDA++: the recommended method. It rejects, unlearns, combines, continues, and says how sure it is.

    Streaming linear discriminant analysis of the [CLS] features of the last four layers, side by side, taken with the
    first task's expert. Means and covariance are sums over eight views of each image, as few images do not tell the
    covariance of 4 x `hidden_size` numbers. Scores are averaged over two views of an image to predict, and calibrated
    on training images that are left out in turn. **Trains** a LoRA adapter on the first task, with a temporary head;
    with `adapt=False`, nothing. **Stores** it, and for each task a mean per class and a factor of its covariance: 0.8
    MB for four depths of a ViT-S. **Costs** `test_views` forward passes per image: 2, or 1 with `test_views=1`.

    With `adapt=False`, features are those of the frozen backbone: a task takes a pass over its views, any task can be
    removed exactly, and models of different people can be combined. Adapted features are better if the first task is
    rich, but belong to it: it cannot be removed, and models are combined only if they share it.
    """

    title, paper, which_router = "SLDA++", "1909.01520", "gaussian"

    @dataclass
    class Config(ManyLooks, LoraOptions):
        adapt: bool = field(
            default=True,
            metadata={"help": "Take features with the first task's expert; without, any models can be combined."},
        )

    def __init__(self, backbone: Backbone, config: ContinualConfig):
        super().__init__(backbone, config)
        self.trains = self.options.adapt  # type: ignore[misc]

    def look(self, pixels: torch.Tensor) -> torch.Tensor:
        return super().look(pixels) if self.options.adapt else super(FirstExpert, self).look(pixels)

    def begin(self, task: TaskConfig) -> None:
        if self.options.adapt:
            super().begin(task)

    def expert_names(self) -> list[str]:
        return super().expert_names() if self.options.adapt else []

    @classmethod
    def facts(cls, options: Any) -> dict[str, str]:
        none = {} if options.adapt else {"experts": ClosedForm.experts, "PEFT": "none"}
        kind = VIEW_KINDS.get(options.view_kind, "of a kind that the first task decides")
        views = f"{options.views} of a training image, {options.test_views} of one to predict: {kind}"
        return super().facts(options) | none | {"views": views}
