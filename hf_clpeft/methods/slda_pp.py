"""SLDA++: linear discriminant analysis over many views and several depths, with the first task's expert."""

from dataclasses import dataclass, field

from .closed_form import FirstExpert
from .options import CovarianceOptions, LoraOptions
from .views import ViewOptions


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
    """SLDA++: the recommended method. It rejects, unlearns, combines, continues, and knows how sure it is.

    Streaming linear discriminant analysis ([`GaussianRouter`]) of the [CLS] features of the last four layers, side by
    side, taken with the first task's expert. Means and covariance are sums over eight views of each image, as few
    images do not tell the covariance of 4 x `hidden_size` numbers. Scores are averaged over two views of an image to
    predict.

    **Trains** a LoRA adapter on the first task, with a temporary head. **Stores** it, and for each task a mean per
    class and a factor of its covariance: 0.8 MB for four depths of a ViT-S. **Costs** `test_views` forward passes per
    image: 2, or 1 with `test_views=1`.
    """

    title, paper, which_router = "SLDA++", "1909.01520", "gaussian"

    @dataclass
    class Config(ManyLooks, LoraOptions):
        pass
