"""Calibrated confidence of a method whose router names the classes."""

import torch

from ..backbones.tracing import ReadsOnce
from ..config import ConfigError
from ..routing.confidence import GRID, best_on_grid, calibrate


class Confidence(ReadsOnce):
    """Temperature of scores, and share of the probability for all classes alike, from held-out images of the tasks.

    A task is measured among the classes known by then. So removing a task also drops what was measured of those that
    have followed it, of which its classes are a part.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.methods.confidence import Confidence

    >>> Confidence()(torch.tensor([[3.0, 0.0]]))  # nothing was measured: scores are taken as they are
    tensor([[3., 0.]])

    ```
    """

    losses: torch.Tensor
    origins: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("losses", torch.zeros(0, GRID, dtype=torch.float32))  # of each task; zeros: not measured
        self.register_buffer("origins", torch.zeros(0, dtype=torch.int64))  # the first task that each was beside

    def fitted(self) -> tuple[float, float]:
        """The temperature, above 0, and the share, in [0, 1]."""
        return self.once("losses", _fit)[0]

    def temperature(self) -> float | None:
        """The temperature, if it was measured."""
        (temperature, _), measured = self.once("losses", _fit)
        return temperature if measured else None

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of classes, `(batch, classes)`, from their scores; the scores if nothing was measured."""
        fitted, measured = self.once("losses", _fit)
        return calibrate(scores, *fitted) if measured else scores

    def add(self, losses: torch.Tensor) -> None:
        """Adds a task; see [`losses_on_grid`]."""
        self.losses = torch.cat([self.losses, losses.to(self.losses)[None]])
        self.origins = torch.cat([self.origins, self.origins.new_zeros(1)])

    def remove(self, position: int) -> None:
        """Removes a task, and what was measured beside it."""
        later = torch.arange(len(self.losses), device=self.losses.device) > position
        beside = later & (self.origins <= position)
        kept = [place for place in range(len(self.losses)) if place != position]
        self.losses = (self.losses * ~beside[:, None])[kept]
        self.origins = (self.origins - (self.origins > position).to(self.origins))[kept]

    def merge(self, other: "Confidence") -> None:
        """Appends the tasks of another model."""
        self.origins = torch.cat([self.origins, other.origins.to(self.origins) + len(self.losses)])
        self.losses = torch.cat([self.losses, other.losses.to(self.losses)])

    def check(self, num_tasks: int) -> None:
        """Raises [`ConfigError`] unless it fits a model, after it was read from a file."""
        places = torch.arange(num_tasks, device=self.origins.device)
        if len(self.losses) != num_tasks or len(self.origins) != num_tasks:
            raise ConfigError(f"method.safetensors has the confidence of {len(self.losses)} tasks, not {num_tasks}.")
        if (
            not (self.losses.isfinite() & (self.losses >= 0)).all()
            or not ((self.origins >= 0) & (self.origins <= places)).all()
        ):
            raise ConfigError("method.safetensors has losses below 0, or of tasks beside later ones.")
        self.fitted()  # so that it is known when the model is exported


def _fit(losses: torch.Tensor) -> tuple[tuple[float, float], bool]:
    """What [`Confidence.fitted`] returns, and whether anything was measured."""
    losses = losses.cpu().double().sum(dim=0)
    return best_on_grid(losses), bool(losses.any())
