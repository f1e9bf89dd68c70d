"""Ridge regression on random features whose Gram matrix is kept as low-rank factors: the classifier of LoRanPAC."""

from typing import Self

import torch

from .ridge import RIDGES, RidgeRouter, best_penalty, penalty_errors


ROWS_AT_ONCE = 1_000  # per update of the factors
ROUNDING = 1e-5  # singular values below this share of the largest are rounding errors of float32


class LowRankRidgeRouter(RidgeRouter):
    """[`RidgeRouter`] that keeps the Gram matrix of the random features as U Σ² Uᵀ, of limited rank.

    Random features of new images are projected on U; a QR decomposition of the rest and an SVD of a small matrix give
    the new factors, of which the `rank` largest singular values are kept. While the rank suffices, which it does for
    up to `rank` images, this is the regression of [`RidgeRouter`]. After that the smallest singular values are
    dropped: the regression ignores these directions, in which the images vary least. The router stores
    `projection_size` x `rank` numbers, by default 40 MB instead of 400, and no square matrix is ever inverted.

    The held-out errors of all tasks are added up for each penalty, and the best penalty is taken. So the result does
    not depend on the order of tasks, up to rounding and to what is dropped.

    Args:
        query_size (`int`): Width of query features.
        projection_size (`int`, *optional*, defaults to 10,000): Number of random features, M.
        rank (`int`, *optional*, defaults to 1,000): Largest rank.

    Source: LoRanPAC, arXiv 2410.00645, and its code (liangzu/loranpac).

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing import LowRankRidgeRouter

    >>> router = LowRankRidgeRouter(query_size=2, projection_size=50, rank=4)
    >>> router.learn(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), classes=torch.tensor([0, 1]))
    >>> router.learn(torch.tensor([[-1.0, 0.0]]), classes=torch.tensor([2]))
    >>> router(torch.tensor([[0.1, 1.0], [-1.0, 0.1]])).selection.tolist(), router.basis.shape
    ([0, 1], torch.Size([50, 3]))

    ```
    """

    title = "ridge regression on random features, of low rank"
    options = ("projection_size", "rank")
    basis: torch.Tensor
    spectrum: torch.Tensor
    errors: torch.Tensor

    def __init__(self, query_size: int, projection_size: int = 10_000, rank: int = 1_000):
        super().__init__(query_size, projection_size)
        self.rank = rank
        self.register_buffer("gram", None)
        self.register_buffer("penalty", None)
        self.register_buffer("basis", torch.zeros(0, 0, dtype=torch.float32))  # U, with orthonormal columns
        self.register_buffer("spectrum", torch.zeros(0, dtype=torch.float32))  # Σ, falling
        self.register_buffer("errors", torch.zeros(len(RIDGES), dtype=torch.float32))  # of each penalty

    def check(self, tensors: dict[str, torch.Tensor], num_tasks: int, num_classes: int) -> None:
        super().check(tensors, num_tasks, num_classes)
        basis, spectrum, entries = tensors["basis"], tensors["spectrum"], tensors["owners"].numel()
        size, rank = self.projection_size if entries else 0, min(spectrum.numel(), self.rank)
        if spectrum.shape != (rank,) or basis.shape != (size, rank):
            raise ValueError(
                f"basis has shape {tuple(basis.shape)} and spectrum {tuple(spectrum.shape)}, not ({size}, r) and (r,) "
                f"with r up to {self.rank}."
            )
        for name in ("spectrum", "errors"):
            if not (tensors[name] >= 0).all():
                raise ValueError(f"{name} has numbers below 0.")

    def shapes(self, entries: int) -> dict[str, tuple[int, ...]]:
        size = self.projection_size if entries else 0
        return {"projection": (self.query_size, size), "moments": (entries, size), "errors": (len(RIDGES),)}

    def derive(self) -> None:
        if not len(self.moments):
            return
        basis, values = self.basis.double(), self.spectrum.double().square() + best_penalty(self.errors)
        self._weights = (self.moments.double() @ basis / values @ basis.T).to(self.moments)

    def _allocate(self) -> None:
        super()._allocate()
        if not len(self.basis):
            self.basis = self.basis.new_zeros(self.projection_size, 0)

    def _add(self, hidden: torch.Tensor, targets: torch.Tensor) -> None:
        held_out = len(hidden) // 5 * targets.shape[1]
        exact = hidden.to(self.place(hidden.numel()), torch.float64)
        errors = held_out * penalty_errors(exact, targets.to(exact))
        self.errors = self.errors + errors.to(self.errors)
        for images in (hidden.flatten(0, 1) / hidden.shape[1] ** 0.5).split(ROWS_AT_ONCE):
            self._add_columns(images.T.double())

    def _merge(self, other: Self) -> None:
        self.errors = self.errors + other.errors.to(self.errors)
        self._add_columns((other.basis * other.spectrum).to(self.basis.device).double())

    def _add_columns(self, columns: torch.Tensor) -> None:
        """Adds `columns @ columns.T` to the Gram matrix."""
        basis = self.basis.double()
        inside = basis.T @ columns
        outside, triangle = torch.linalg.qr(columns - basis @ inside)
        core = torch.cat(
            [
                torch.cat([self.spectrum.double().diag(), inside], dim=1),
                torch.cat([inside.new_zeros(len(triangle), len(inside)), triangle], dim=1),
            ]
        )
        rotation, spectrum, _ = torch.linalg.svd(core, full_matrices=False)
        kept = min(self.rank, int((spectrum > ROUNDING * spectrum[0]).sum()))
        self.basis = (torch.cat([basis, outside], dim=1) @ rotation[:, :kept]).to(self.basis)
        self.spectrum = spectrum[:kept].to(self.spectrum)
