"""Streaming linear discriminant analysis: Gaussian classes with one shared covariance."""

from typing import Self

import torch

from .classes import ClassRouter


class GaussianRouter(ClassRouter):
    """Routes an image to the task of its likeliest class; classes are Gaussians with one shared covariance.

    The router stores the scatter matrix within classes, a sum over images, so that tasks add up exactly. The
    covariance is shrunk towards a multiple of the identity by oracle approximating shrinkage, which has no
    hyperparameter.

    Args:
        query_size (`int`): Width of query features.

    Source: streaming LDA, arXiv 1909.01520; shrinkage: Chen et al., arXiv 0907.4698, equation 23.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing import GaussianRouter

    >>> generator = torch.Generator().manual_seed(0)
    >>> long = torch.tensor([[0.1, 1.0, 1.0]])  # all classes vary much in one direction
    >>> noise = 0.1 * torch.randn(200, 3, generator=generator) * torch.tensor([[0.0, 1.0, 5.0]])
    >>> router = GaussianRouter(query_size=3)
    >>> router.learn(torch.tensor([[9.0, 1.0, 0.0]]) + noise, classes=torch.zeros(200, dtype=torch.int64))
    >>> router.learn(torch.tensor([[9.0, -1.0, 0.0]]) + noise, classes=torch.ones(200, dtype=torch.int64))
    >>> router(torch.tensor([[9.0, 0.5, 4.0], [9.0, -0.5, 4.0]])).selection.tolist()
    [0, 1]

    ```
    """

    title = "Gaussian per class, one covariance"
    gives_likelihoods = True
    scatter: torch.Tensor
    _whitening: torch.Tensor
    _centres: torch.Tensor

    def __init__(self, query_size: int):
        super().__init__(query_size)
        square = torch.zeros(query_size, query_size, dtype=torch.float32)
        self.register_buffer("scatter", square)
        self.register_buffer("_whitening", square.clone(), persistent=False)
        self.register_buffer("_centres", square[:0].clone(), persistent=False)

    def scores(self, query: torch.Tensor) -> torch.Tensor:
        # Without the matrix-product shortcut, which loses precision for large distances.
        distances = torch.cdist(self._whiten(query), self._centres, compute_mode="donot_use_mm_for_euclid_dist")
        return -(distances**2) / 2

    def class_scores(self, scores: torch.Tensor) -> torch.Tensor:
        return log_sum_exp(scores, self.classes)

    def to_distances(self, scores: torch.Tensor) -> torch.Tensor:
        return (-2 * scores).sqrt()

    def add_sums(self, features: torch.Tensor, residuals: torch.Tensor, entries: torch.Tensor) -> None:
        self.scatter = self.scatter + mean_square(residuals).to(self.scatter)
        self.derive()

    def merge_sums(self, other: Self) -> None:
        self.scatter = self.scatter + other.scatter.to(self.scatter)
        self.derive()

    def shapes(self, entries: int) -> dict[str, tuple[int, ...]]:
        return {"scatter": (self.query_size, self.query_size)}

    def check(self, tensors: dict[str, torch.Tensor], num_tasks: int, num_classes: int) -> None:
        super().check(tensors, num_tasks, num_classes)
        if (tensors["scatter"].diagonal() < 0).any():
            raise ValueError("scatter has variances below 0.")

    def derive(self) -> None:
        whitening = torch.linalg.inv(self._factor()).T
        self._whitening = whitening.to(self.scatter)
        self._centres = (self.prototypes.cpu().double() @ whitening).to(self.scatter)

    def _factor(self) -> torch.Tensor:
        """Cholesky factor of the shrunk covariance, `float64`, on the CPU."""
        freedom = max(1, int(self.counts.sum()) - len(self.counts))
        return torch.linalg.cholesky(shrink(self.scatter.cpu().double() / freedom, freedom, self.query_size))

    def _whiten(self, query: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(query.to(self._whitening), dim=-1) @ self._whitening


def mean_square(features: torch.Tensor) -> torch.Tensor:
    """Sum over images of the mean over views of outer products; the Gram matrix of images of one view.

    Args:
        features (`torch.Tensor` of shape `(images, views, width)`): Features of several views of images.

    Returns:
        `torch.Tensor` of shape `(width, width)`.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing.gaussian import mean_square

    >>> mean_square(torch.tensor([[[1.0, 0.0], [0.0, 3.0]]]))
    tensor([[0.5000, 0.0000],
            [0.0000, 4.5000]])

    ```
    """
    rows = features.flatten(0, 1)
    return rows.T @ rows / features.shape[1]


def shrink(covariance: torch.Tensor, freedom: int, dimensions: int | None = None) -> torch.Tensor:
    """Oracle approximating shrinkage of a covariance towards a multiple of the identity.

    Args:
        covariance (`torch.Tensor` of shape `(width, width)`, `float64`): Sample covariance.
        freedom (`int`): Its degrees of freedom.
        dimensions (`int`, *optional*): Number of dimensions among which the variance is shared, for features that are
            functions of fewer numbers. Default: `width`.

    Returns:
        `torch.Tensor` of shape `(width, width)`: Invertible.

    Source: Chen et al., arXiv 0907.4698, equation 23, as scikit-learn's `OAS` has it.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing.gaussian import shrink

    >>> shrink(torch.diag(torch.tensor([2.0, 0.0], dtype=torch.float64)), freedom=1)
    tensor([[1., 0.],
            [0., 1.]], dtype=torch.float64)

    ```
    """
    width = len(covariance)
    dimensions = dimensions or width
    scale = covariance.trace() / dimensions
    squares = (covariance**2).mean() * (width / dimensions) ** 2
    spread = (freedom + 1) * (squares - scale**2 / dimensions)
    weight = 1.0 if spread <= 0 else min(1.0, float((squares + scale**2) / spread))
    # With one image per class all residuals are zero, and the scale is arbitrary.
    scale = scale if scale > 0 else torch.ones_like(scale)
    return (1 - weight) * covariance + max(weight, 1e-6) * scale * torch.eye(width, dtype=covariance.dtype)


def log_sum_exp(scores: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp over groups of columns.

    Args:
        scores (`torch.Tensor` of shape `(batch, columns)`): May hold −inf.
        groups (integer `torch.Tensor` of shape `(columns,)`): Group of each column; every group from 0 on has one.

    Returns:
        `torch.Tensor` of shape `(batch, groups)`.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing.gaussian import log_sum_exp

    >>> log_sum_exp(torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([0, 0, 1])).exp()
    tensor([[2., 0.]])

    ```
    """
    groups = groups.expand_as(scores)
    largest = scores.new_full((len(scores), int(groups.max()) + 1), -torch.inf)
    largest = largest.scatter_reduce(1, groups, scores, reduce="amax")
    finite = largest.nan_to_num(neginf=0.0)
    sums = torch.zeros_like(largest).scatter_add(1, groups, (scores - finite.gather(1, groups)).exp())
    return sums.log() + finite
