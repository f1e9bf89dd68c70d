"""How typical an image is of a task: conformal p-values of distances, calibrated on held-out training images.

A task's thresholds are quantiles of the distances of its own images; the i-th is exceeded by i % of them. They follow
from this task alone, so that they neither change when others are learnt nor keep anything of one that is removed
(Vovk et al., "Algorithmic Learning in a Random World", 2005).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch


PERCENT = 100  # thresholds per task, for reject rates of 1 %, 2 %, ... 100 %
FOLDS = 10
SAME = 1e-3  # distance on the unit sphere: by less, features of one image differ from batch to batch


def fit_thresholds(distances: np.ndarray) -> np.ndarray:
    """Quantiles of the distances of held-out images of a task.

    The distance of a new image of the task exceeds the i-th threshold with a probability of i %, on average over
    training sets, if it is exchangeable with their images. A threshold between two distances is interpolated, as the
    larger of them would be exceeded too seldom, by up to 1 / (images + 1). Small rates of few images need thresholds
    beyond the largest distance: these are Student's prediction bound for normally distributed distances.

    Args:
        distances (array of shape `(images,)`): Two or more.

    Returns:
        Array of shape `(100,)`, decreasing.

    Example:

    ```py
    >>> import numpy as np
    >>> from hf_clpeft.routing.typicality import fit_thresholds

    >>> fit_thresholds(np.arange(1.0, 100.0))[[4, 49]]
    array([95., 50.])

    ```
    """
    from scipy.stats import t as student

    count, seen = len(distances), np.sort(distances)
    rates = np.arange(1, PERCENT + 1) / PERCENT
    ranks = ((1 - rates) * (count + 1)).round(9)  # 1 is the nearest image
    spread = seen.std(ddof=1) * np.sqrt(1 + 1 / count)
    thresholds = np.interp(ranks, np.arange(1, count + 1), seen)
    few = ranks > count
    thresholds[few] = np.maximum(seen[-1], seen.mean() + student.ppf(1 - rates[few], count - 1) * spread)
    return thresholds


def p_values(distances: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Conformal p-values: the fraction of a task's own images that are at least as far, in steps of 1 %.

    Args:
        distances (`torch.Tensor` of any shape): Distances to tasks.
        thresholds (`torch.Tensor` of the same shape and 100): Those of the tasks.

    Returns:
        `torch.Tensor` of the shape of `distances`, in [0, 1].
    """
    return (distances[..., None] <= thresholds).sum(dim=-1) / PERCENT


def cross_fit(
    entries: torch.Tensor, fit: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], seed: int = 0
) -> torch.Tensor:
    """Values of all images of a task, each from a fit to nine tenths of them that do not include it.

    Args:
        entries (integer `torch.Tensor` of shape `(images,)`): Class of each image; folds are balanced over classes.
        fit (callable): Maps the rows to fit and those to measure to values of the latter.
        seed (`int`, *optional*, defaults to 0): Seed of the folds.

    Returns:
        `torch.Tensor` of shape `(images,)`; NaN for the only image of a class.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing.typicality import cross_fit

    >>> cross_fit(torch.zeros(10).long(), lambda fitted, held_out: torch.full((len(held_out),), float(len(fitted))))
    tensor([9., 9., 9., 9., 9., 9., 9., 9., 9., 9.])

    ```
    """
    entries, order = entries.cpu(), torch.randperm(len(entries), generator=torch.Generator().manual_seed(seed))
    order = order[entries[order].argsort(stable=True)]
    folds = torch.empty_like(order)
    folds[order] = torch.arange(len(order)) % FOLDS
    values = torch.full((len(entries),), torch.nan)
    for fold in range(FOLDS):
        fitted, held_out = (folds != fold).nonzero()[:, 0], (folds == fold).nonzero()[:, 0]
        held_out = held_out[torch.isin(entries[held_out], entries[fitted])]
        if len(held_out):
            values[held_out] = fit(fitted, held_out).to(values)
    return values


class Metric(NamedTuple):
    """A Mahalanobis metric whose covariance is diagonal but for a few directions.

    Args:
        inverse (`torch.Tensor` of shape `(width,)`): Inverse of the diagonal part.
        directions (`torch.Tensor` of shape `(rank, width)`): What the directions take off the squared distance.
    """

    inverse: torch.Tensor
    directions: torch.Tensor

    @classmethod
    def of(cls, factor: torch.Tensor, diagonal: torch.Tensor) -> "Metric":
        """The metric of the covariance `factor.T @ factor + diagonal.diag()`, by Woodbury's identity.

        Example:

        ```py
        >>> import torch
        >>> from hf_clpeft.routing.typicality import Metric

        >>> metric = Metric.of(torch.tensor([[3.0, 0.0]]), torch.tensor([1.0, 4.0]))
        >>> metric.squared(torch.tensor([[1.0, 2.0]]))
        tensor([1.1000])

        ```
        """
        weighted = factor / diagonal
        core = torch.eye(len(factor)).to(factor) + weighted @ factor.T
        triangle = torch.linalg.cholesky(core)
        return cls(1 / diagonal, torch.linalg.solve_triangular(triangle, weighted, upper=False))

    def squared(self, residuals: torch.Tensor) -> torch.Tensor:
        """Squared lengths of vectors of shape `(..., width)`, 0 or more."""
        lengths = (residuals**2) @ self.inverse - (residuals @ self.directions.T).square().sum(dim=-1)
        return lengths.clamp(min=0)
