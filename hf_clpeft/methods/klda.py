"""KLDA: linear discriminant analysis on random Fourier features."""

import math
from dataclasses import dataclass, field

from ..config import ConfigError
from .closed_form import ClosedForm
from .options import LARGEST_PROJECTION, CovarianceOptions
from .views import ViewOptions


@dataclass
class KernelOptions(ViewOptions, CovarianceOptions):
    """Random Fourier features of KLDA."""

    kernel_features: int = field(default=5_000, metadata={"help": "Random Fourier features, D."})
    kernel_width: float = field(
        default=1.0, metadata={"help": "Width of the kernel, in distances of L2-normalised query features."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.kernel_features <= LARGEST_PROJECTION:
            raise ConfigError(
                f"kernel_features={self.kernel_features} must be between 1 and {LARGEST_PROJECTION:,} features."
            )
        if not (math.isfinite(self.kernel_width) and self.kernel_width > 0):
            raise ConfigError(f"kernel_width={self.kernel_width} must be above 0.")


class Klda(ClosedForm, name="klda"):
    """Linear discriminant analysis on random Fourier features of the frozen features; arXiv 2412.15571.

    **Trains** nothing. **Stores** a mean per class and task, and of each task's covariance a row of `kernel_features`
    numbers for each image, or `covariance_rank` rows. **Costs** one forward pass per image.

    It differs from the paper in three ways:

    - Query features are L2-normalised, and the kernel has one width for all backbones. The paper gives a width per
      backbone, as the norms of its features differ. A width that depends on the images of the first task would make
      models that were trained independently impossible to combine. On held-out images of the first tasks of PACS and
      Caltech-101, whose median distances are 0.6 and 0.7, 1 and 2 were equally good, and 1/2 was worse.
    - The covariance is shrunk towards a multiple of the identity, see [`KldaRouter`]. The paper takes the
      pseudo-inverse of the scatter matrix, which with fewer images than random features ignores all directions in
      which images do not vary within classes, and is no log-likelihood.
    - A class of several tasks has a Gaussian for each, as in [`GaussianRouter`].
    """

    title, paper, which_router = "KLDA", "2412.15571", "klda"

    @dataclass
    class Config(KernelOptions):
        pass
