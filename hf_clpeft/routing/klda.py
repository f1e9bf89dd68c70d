"""Kernel linear discriminant analysis: Gaussian classes with one covariance, on random Fourier features."""

import math
from typing import Self

import torch

from ..backbones.precision import in_float32
from .gaussian import GaussianRouter
from .ridge import check_same_draw


class KldaRouter(GaussianRouter):
    """[`GaussianRouter`] on random Fourier features of the L2-normalised query features.

    √(2/D) cos(ωx + b) with Gaussian ω and uniform b, whose scalar products approximate the kernel
    exp(−‖x − y‖² / 2σ²). Class means and one covariance are those of these features. The covariance is shrunk as in
    [`GaussianRouter`], as if `query_size` features shared its trace: otherwise the more random features there are, the
    less it would be shrunk. Of each task the router stores at most as many rows of D = `kernel_features` numbers as
    it has images and views: 6 MB for 300 images by default. In memory it has D x D numbers.

    Args:
        query_size (`int`): Width of query features.
        kernel_features (`int`, *optional*, defaults to 5,000): Number of random Fourier features, D; as in the paper.
        kernel_width (`float`, *optional*, defaults to 1): Width of the kernel, σ. Normalised features are at most 2
            apart.
        covariance_rank (`int`, *optional*): Most rows of a task's factor; see [`GaussianRouter`].

    Source: KLDA, arXiv 2412.15571.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing import KldaRouter

    >>> angles = torch.linspace(0, 6.28, 60)
    >>> router = KldaRouter(query_size=2, kernel_features=100)
    >>> router.learn(torch.stack([angles.cos(), angles.sin()], dim=1), classes=(4 * angles.cos()).int() % 2)
    >>> router(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).scores.shape
    torch.Size([2, 2])

    ```
    """

    title = "Gaussian per class on random Fourier features"
    options = ("kernel_features", "kernel_width", "covariance_rank")
    of_entries = ("prototypes", "counts", "means")
    frequencies: torch.Tensor
    phases: torch.Tensor
    means: torch.Tensor
    _cholesky: torch.Tensor

    def __init__(
        self,
        query_size: int,
        kernel_features: int = 5_000,
        kernel_width: float = 1.0,
        covariance_rank: int | None = None,
    ):
        super().__init__(query_size, covariance_rank)
        self.kernel_features, self.kernel_width = kernel_features, kernel_width
        # Allocated with the first task.
        nothing = torch.zeros(0, 0, dtype=torch.float32)
        self.register_buffer("frequencies", torch.zeros(query_size, 0, dtype=torch.float32))
        self.register_buffer("phases", torch.zeros(0, dtype=torch.float32))
        self.register_buffer("means", nothing.clone())  # of the random Fourier features of each entry
        self.register_buffer("_whitening", None)
        self.register_buffer("_cholesky", nothing.clone(), persistent=False)

    @property
    def num_features(self) -> int:
        return self.kernel_features

    def add_sums(self, features: torch.Tensor, residuals: torch.Tensor, entries: torch.Tensor) -> None:
        self._allocate()
        lifted, entries = self._lift(features), entries.to(self.means.device)
        targets = torch.nn.functional.one_hot(entries).to(lifted)
        means = targets.T @ lifted.mean(dim=1) / targets.sum(dim=0)[:, None]
        self._append({"means": means})
        place = self.place(lifted.numel())
        lifted, means, entries = lifted.to(place, torch.float64), means.to(place, torch.float64), entries.to(place)
        self.add_scatter(lifted, lifted - means[entries, None], entries)
        self.derive()

    def leave_one_out(
        self, features: torch.Tensor, classes: torch.Tensor, views: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        self._allocate()
        return super().leave_one_out(features, classes, views)

    def merge_sums(self, other: Self) -> None:
        self._allocate()
        check_same_draw(self.frequencies, other.frequencies, ("kernel_features", "kernel_width"))
        self._append({"means": other.means})
        super().merge_sums(other)

    def remove(self, owner: int, number_of: dict[int, int]) -> None:
        super().remove(owner, number_of)  # and means with it, as they are of entries

    def shapes(self, entries: int) -> dict[str, tuple[int, ...]]:
        size = self.kernel_features if entries else 0
        return {"frequencies": (self.query_size, size), "phases": (size,), "means": (entries, size)}

    def derive(self) -> None:
        self._metrics = {}
        if not len(self.means):
            return
        factor = self._factor()
        centres = torch.linalg.solve_triangular(factor, self.means.to(factor).T, upper=False).T
        self._cholesky, self._centres = factor.to(self.means), centres.to(self.means)
        self._bonus = self._favour()

    def _whiten(self, query: torch.Tensor) -> torch.Tensor:
        # Solved for each batch, which takes no longer than a product with the inverse, and saves inverting.
        return torch.linalg.solve_triangular(self._cholesky, self._lift(query).T, upper=False).T

    @property
    def _means(self) -> torch.Tensor:
        return self.means

    @in_float32
    def _lift(self, features: torch.Tensor) -> torch.Tensor:
        features = torch.nn.functional.normalize(features.to(self.frequencies), dim=-1)
        return math.sqrt(2 / self.kernel_features) * torch.cos(features @ self.frequencies + self.phases)

    def _allocate(self) -> None:
        if not len(self.phases):
            # With a fixed seed, so that independently trained models can be merged.
            size, generator = self.kernel_features, torch.Generator().manual_seed(0)
            frequencies = torch.randn(self.query_size, size, generator=generator, dtype=torch.float32)
            self.frequencies = (frequencies / self.kernel_width).to(self.frequencies)
            self.phases = 2 * math.pi * torch.rand(size, generator=generator, dtype=torch.float32).to(self.phases)
