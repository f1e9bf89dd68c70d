"""LoRanPAC: RanPAC with low-rank factors in place of the Gram matrix."""

from dataclasses import dataclass, field

from ..config import ConfigError
from .closed_form import ClosedForm, FirstExpert
from .options import LARGEST_PROJECTION, LoraOptions, ProjectionOptions
from .views import ViewOptions


@dataclass
class LowRankOptions(ViewOptions, ProjectionOptions):
    """Random projection, and the rank of its Gram matrix."""

    rank: int = field(default=1_000, metadata={"help": "Largest rank of the Gram matrix; the rest is dropped."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.rank <= LARGEST_PROJECTION:
            raise ConfigError(f"rank={self.rank} must be between 1 and {LARGEST_PROJECTION:,}.")


class LoRanPac(ClosedForm, name="loranpac"):
    """Ridge regression on random projections of the frozen features, of low rank; arXiv 2410.00645.

    **Trains** nothing. **Stores** a basis of `rank` x `projection_size` numbers, 40 MB by default, and a sum per class
    and task. **Costs** one forward pass per image.

    It differs from the paper in three ways:

    - Singular values are dropped only when the rank is full. The paper always drops the smallest quarter, as it has no
      penalty that would keep them from being overfitted.
    - A ridge penalty is chosen on held-out images. So the model is RanPAC's while the rank suffices, and does not
      depend on the order of tasks.
    - 10,000 random features and rank 1,000, where the paper has 100,000 and up to 10,000: a hundredth of the memory.
    """

    title, paper, which_router = "LoRanPAC", "2410.00645", "low_rank_ridge"

    @dataclass
    class Config(LowRankOptions):
        pass


class LoRanPacFirst(FirstExpert, name="loranpac_first"):
    """LoRanPAC on features with the first task's expert; arXiv 2410.00645.

    **Trains** an adapter on the first task, with a temporary head. **Stores** it, and what LoRanPAC stores.
    **Costs** one forward pass per image.

    It differs from the paper as LoRanPAC does, and in the adapter, which is LoRA.
    """

    title, paper, which_router = "LoRanPAC, first-session adaptation", "2410.00645", "low_rank_ridge"

    @dataclass
    class Config(LowRankOptions, LoraOptions):
        pass
