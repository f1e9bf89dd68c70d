"""LayUP: ridge regression on the [CLS] features of several layers."""

from dataclasses import dataclass

from .closed_form import ClosedForm, FirstExpert
from .options import LoraOptions
from .views import ViewOptions


@dataclass
class LastLayers(ViewOptions):
    """The last six layers as query features."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.query_layers is None:
            self.query_layers = [-6, -5, -4, -3, -2, -1]


class LayUp(ClosedForm, name="layup"):
    """Ridge regression on the frozen [CLS] features of the last six layers, side by side; arXiv 2312.08888.

    `query_layers` selects other layers. **Trains** nothing. **Stores** the Gram matrix of the query features,
    (layers x width) squared numbers, and a sum per class and task. **Costs** one forward pass per image.

    It differs from the paper in two ways:

    - The features of each layer are centred and L2-normalised, the last ones after the final layer norm. The paper
      takes the outputs of the layers as they are, whose norms differ, so that the penalty weighs on them unequally.
    - The penalty is chosen by the squared error on a held-out fifth of each task's images, as in RanPAC; the paper
      chooses it by the accuracy in a fourfold cross-validation that includes the sums of earlier tasks.
    """

    title, paper, which_router = "LayUP", "2312.08888", "linear_ridge"

    @dataclass
    class Config(LastLayers):
        pass


class LayUpFirst(FirstExpert, name="layup_first"):
    """LayUP on features with the first task's expert; arXiv 2312.08888.

    **Trains** an adapter on the first task, with a temporary head. **Stores** it, and what LayUP stores. **Costs** one
    forward pass per image.

    It differs from the paper as LayUP does, and in the adapter, which is LoRA.
    """

    title, paper, which_router = "LayUP, first-session adaptation", "2312.08888", "linear_ridge"

    @dataclass
    class Config(LastLayers, LoraOptions):
        pass
