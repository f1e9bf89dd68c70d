"""Ridge regression on query features, and on random features of them: the classifiers of LayUP and RanPAC."""

from typing import ClassVar, Self

import torch

from ..backbones.precision import in_float32
from ..config import ConfigError
from .classes import ClassRouter
from .covariance import mean_square


RIDGES = [10.0**power for power in range(-8, 9)]


class LinearRidgeRouter(ClassRouter):
    """Routes an image to the task of the class with the highest output of a ridge regression on query features.

    A linear map from unnormalised query features to one output per entry is fitted in closed form. The router stores
    their Gram matrix, `query_size` squared numbers, so that tasks add up exactly. The penalty is chosen anew with each
    task, on a held-out fifth of its images.

    Args:
        query_size (`int`): Width of query features.

    Source: LayUP, arXiv 2312.08888.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing.ridge import LinearRidgeRouter

    >>> router = LinearRidgeRouter(query_size=2)
    >>> router.learn(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), classes=torch.tensor([0, 1]))
    >>> router.learn(torch.tensor([[-1.0, 0.0]]), classes=torch.tensor([2]))
    >>> router(torch.tensor([[0.1, 1.0], [-1.0, 0.1]])).selection.tolist()
    [0, 1]

    ```
    """

    title = "ridge regression"
    gram: torch.Tensor
    moments: torch.Tensor
    penalty: torch.Tensor
    _weights: torch.Tensor

    def __init__(self, query_size: int):
        super().__init__(query_size)
        # Allocated with the first task.
        self.register_buffer("gram", torch.zeros(0, 0, dtype=torch.float32))
        self.register_buffer("moments", torch.zeros(0, 0, dtype=torch.float32))  # sum of features by entry
        self.register_buffer("penalty", torch.tensor(1.0, dtype=torch.float32))
        self.register_buffer("_weights", torch.zeros(0, 0, dtype=torch.float32), persistent=False)

    @property
    def num_features(self) -> int:
        """Width of the features that the regression sees."""
        return self.query_size

    def scores(self, query: torch.Tensor) -> torch.Tensor:
        return self._lift(query) @ self._weights.T

    def class_scores(self, scores: torch.Tensor) -> torch.Tensor:
        # The regression is linear in its targets, and those of a class are the sum over its entries.
        return scores.new_zeros(scores.shape[0], self.num_classes).index_add(1, self.classes, scores)

    def to_distances(self, scores: torch.Tensor) -> torch.Tensor:
        return (1 - scores).clamp(min=0)

    def add_sums(self, features: torch.Tensor, residuals: torch.Tensor, entries: torch.Tensor) -> None:
        self._allocate()
        hidden = self._lift(features)
        targets = torch.nn.functional.one_hot(entries).to(hidden)
        self._append({"moments": targets.T @ hidden.mean(dim=1)})
        self._add(hidden, targets)
        self.derive()

    def merge_sums(self, other: Self) -> None:
        self._allocate()
        self._append({"moments": other.moments})
        self._merge(other)
        self.derive()

    def shapes(self, entries: int) -> dict[str, tuple[int, ...]]:
        size = self.num_features if entries else 0
        return {"gram": (size, size), "moments": (entries, size), "penalty": ()}

    def derive(self) -> None:
        if not len(self.moments):
            return
        gram = self.gram.to(self.place(self.gram.numel()), torch.float64, copy=True)
        # With fewer images than features, the Gram matrix is singular up to rounding, which must not be fitted.
        rounding = torch.finfo(self.gram.dtype).eps * gram.trace().item()
        gram.diagonal().add_(max(self.penalty.item(), rounding))
        self._weights = torch.linalg.solve(gram, self.moments.to(gram).T).T.to(self.gram)

    # How features are lifted, and which sums are kept besides moments

    def _lift(self, features: torch.Tensor) -> torch.Tensor:
        return features.to(self.moments)

    def _allocate(self) -> None:
        if not self.moments.shape[1]:
            self.moments = self.moments.new_zeros(0, self.num_features)

    def _add(self, hidden: torch.Tensor, targets: torch.Tensor) -> None:
        self._add_gram(mean_square(hidden))
        exact = hidden.to(self.place(hidden.numel()), torch.float64)
        self.penalty = torch.tensor(choose_penalty(exact, targets.to(exact))).to(self.penalty)

    def _merge(self, other: Self) -> None:
        self._add_gram(other.gram.to(self.gram))
        self.penalty = other.penalty.to(self.penalty)

    def _add_gram(self, gram: torch.Tensor) -> None:
        self.gram = self.gram + gram if self.gram.numel() else gram


class RidgeRouter(LinearRidgeRouter):
    """Routes an image to the task of the class with the highest output of a ridge regression on random features.

    Unnormalised query features pass a fixed random projection and a ReLU; a linear map to one output per entry is
    fitted in closed form. The router stores the Gram matrix of the random features, `projection_size` squared numbers,
    so that tasks add up exactly. The penalty is chosen anew with each task, on a held-out fifth of its images.

    Args:
        query_size (`int`): Width of query features.
        projection_size (`int`, *optional*, defaults to 10,000): Number of random features, M; 10,000 in the paper.

    Source: RanPAC, arXiv 2307.02251, algorithm 1; penalties as in its code (RanPAC/RanPAC).

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing import RidgeRouter

    >>> router = RidgeRouter(query_size=2, projection_size=50)
    >>> router.learn(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), classes=torch.tensor([0, 1]))
    >>> router.learn(torch.tensor([[-1.0, 0.0]]), classes=torch.tensor([2]))
    >>> router(torch.tensor([[0.1, 1.0], [-1.0, 0.1]])).selection.tolist()
    [0, 1]

    ```
    """

    title = "ridge regression on random features"
    options: ClassVar[tuple[str, ...]] = ("projection_size",)
    projection: torch.Tensor

    def __init__(self, query_size: int, projection_size: int = 10_000):
        super().__init__(query_size)
        self.projection_size = projection_size
        self.register_buffer("projection", torch.zeros(query_size, 0, dtype=torch.float32))

    @property
    def num_features(self) -> int:
        return self.projection_size

    def merge_sums(self, other: Self) -> None:
        self._allocate()
        check_same_draw(self.projection, other.projection, self.options)
        super().merge_sums(other)

    def shapes(self, entries: int) -> dict[str, tuple[int, ...]]:
        projection = (self.query_size, self.projection_size if entries else 0)
        return {"projection": projection, **super().shapes(entries)}

    @in_float32
    def _lift(self, features: torch.Tensor) -> torch.Tensor:
        return torch.relu(features.to(self.projection) @ self.projection)

    def _allocate(self) -> None:
        super()._allocate()
        if not self.projection.shape[1]:
            # With a fixed seed, so that independently trained models can be merged.
            shape, generator = (self.query_size, self.projection_size), torch.Generator().manual_seed(0)
            self.projection = torch.randn(shape, generator=generator, dtype=torch.float32).to(self.projection)


def check_same_draw(own: torch.Tensor, other: torch.Tensor, options: tuple[str, ...]) -> None:
    """Raises [`ConfigError`] unless two routers to be merged drew the same random features."""
    if own.shape != other.shape or not torch.equal(own, other.to(own)):
        raise ConfigError(
            f"The routers have different random features, so their sums cannot be added: {' and '.join(options)} must "
            "be the same in all models to combine."
        )


def penalty_errors(features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Errors of a ridge regression with each penalty of `RIDGES`, on a held-out fifth of the images.

    Args:
        features (`torch.Tensor` of shape `(images, views, width)`, `float64`): Random features of a task.
        targets (`torch.Tensor` of shape `(images, outputs)`, `float64`): Regression targets.

    Returns:
        `torch.Tensor` of shape `(len(RIDGES),)`: Mean squared errors; zeros if there are fewer than five images.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing.ridge import penalty_errors

    >>> features = torch.randn(500, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> errors = penalty_errors(features, features[:, 0])  # nothing but signal
    >>> bool(errors[0] < errors[-1])
    True

    ```
    """
    count, views, width = features.shape
    if count < 5:
        return features.new_zeros(len(RIDGES))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    held_out, fitted = order[: count // 5], order[count // 5 :][: max(1, width // views)]
    rows = features[fitted].flatten(0, 1) / views**0.5  # an image counts once
    # In the dual, all penalties share one eigendecomposition.
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    rotated = vectors.T @ (targets[fitted].repeat_interleave(views, dim=0) / views**0.5)
    to_held_out = features[held_out, 0] @ rows.T @ vectors

    def error(penalty: float) -> torch.Tensor:
        predicted = to_held_out @ (rotated / (values.clamp(min=0) + penalty)[:, None])
        return (predicted - targets[held_out]).square().mean()

    return torch.stack([error(penalty) for penalty in RIDGES])


def best_penalty(errors: torch.Tensor) -> float:
    """The penalty of `RIDGES` with the least error; 1 if none was measured."""
    return RIDGES[int(errors.argmin())] if errors.any() else 1.0


def choose_penalty(features: torch.Tensor, targets: torch.Tensor) -> float:
    """Chooses the penalty of a ridge regression by the squared error on a held-out fifth of the images.

    Args:
        features (`torch.Tensor` of shape `(images, views, width)`, `float64`): Random features of a task.
        targets (`torch.Tensor` of shape `(images, outputs)`, `float64`): Regression targets.

    Returns:
        `float`: One of `RIDGES`; 1 if there are fewer than five images.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing.ridge import choose_penalty

    >>> features = torch.randn(500, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> choose_penalty(features, features[:, 0]) < 1  # nothing but signal
    True

    ```
    """
    return best_penalty(penalty_errors(features, targets))
