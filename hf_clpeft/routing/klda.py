"""Kernel linear discriminant analysis: Gaussian classes with one covariance, on random Fourier features."""

import math
from typing import Self

import torch

from .gaussian import GaussianRouter, mean_square
from .ridge import check_same_draw


class KldaRouter(GaussianRouter):
    """[`GaussianRouter`] on random Fourier features of the L2-normalised query features.

    √(2/D) cos(ωx + b) with Gaussian ω and uniform b, whose scalar products approximate the kernel
    exp(−‖x − y‖² / 2σ²). Class means and one covariance are those of these features. The covariance is shrunk as in
    [`GaussianRouter`], as if `query_size` features shared its trace: otherwise the more random features there are, the
    less it would be shrunk. The router stores D x D numbers, D = `kernel_features`: 100 MB by default.

    Args:
        query_size (`int`): Width of query features.
        kernel_features (`int`, *optional*, defaults to 5,000): Number of random Fourier features, D; as in the paper.
        kernel_width (`float`, *optional*, defaults to 1): Width of the kernel, σ. Normalised features are at most 2
            apart.

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
    options = ("kernel_features", "kernel_width")
    frequencies: torch.Tensor
    phases: torch.Tensor
    means: torch.Tensor
    _cholesky: torch.Tensor

    def __init__(self, query_size: int, kernel_features: int = 5_000, kernel_width: float = 1.0):
        super().__init__(query_size)
        self.kernel_features, self.kernel_width = kernel_features, kernel_width
        # Allocated with the first task.
        nothing = torch.zeros(0, 0, dtype=torch.float32)
        self.register_buffer("scatter", nothing)
        self.register_buffer("frequencies", torch.zeros(query_size, 0, dtype=torch.float32))
        self.register_buffer("phases", torch.zeros(0, dtype=torch.float32))
        self.register_buffer("means", nothing.clone())  # of the random Fourier features of each entry
        self.register_buffer("_whitening", None)
        self.register_buffer("_cholesky", nothing.clone(), persistent=False)
        self.register_buffer("_centres", nothing.clone(), persistent=False)

    def add_sums(self, features: torch.Tensor, residuals: torch.Tensor, entries: torch.Tensor) -> None:
        self._allocate()
        lifted, entries = self._lift(features), entries.to(self.means.device)
        targets = torch.nn.functional.one_hot(entries).to(lifted)
        means = targets.T @ lifted.mean(dim=1) / targets.sum(dim=0)[:, None]
        self._append({"means": means})
        self.scatter = self.scatter + mean_square(lifted - means[entries, None])
        self.derive()

    def merge_sums(self, other: Self) -> None:
        self._allocate()
        check_same_draw(self.frequencies, other.frequencies, self.options)
        self._append({"means": other.means})
        super().merge_sums(other)

    def shapes(self, entries: int) -> dict[str, tuple[int, ...]]:
        size = self.kernel_features if entries else 0
        shapes = {"frequencies": (self.query_size, size), "phases": (size,), "means": (entries, size)}
        return {"scatter": (size, size), **shapes}

    def derive(self) -> None:
        if not len(self.means):
            return
        factor, means = self._factor(), self.means.cpu().double()
        centres = torch.linalg.solve_triangular(factor, means.T, upper=False).T
        self._cholesky, self._centres = factor.to(self.scatter), centres.to(self.scatter)

    def _whiten(self, query: torch.Tensor) -> torch.Tensor:
        # Solved for each batch, which takes no longer than a product with the inverse, and saves inverting.
        return torch.linalg.solve_triangular(self._cholesky, self._lift(query).T, upper=False).T

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
            self.scatter, self.means = self.scatter.new_zeros(size, size), self.means.new_zeros(0, size)
