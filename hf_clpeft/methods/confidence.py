"""Calibrated confidence of a method whose router names the classes."""

from collections.abc import Callable

import torch

from ..backbones.tracing import ReadsOnce
from ..config import ConfigError
from ..routing.confidence import (
    GRID,
    at_other_temperatures,
    best_on_grid,
    calibrate,
    lengthen_tails,
    losses_on_grid,
    plain_temperature,
)


class Confidence(ReadsOnce):
    """Temperature of scores, and share of the probability for all classes alike, from held-out images of the tasks.

    A task is measured among the classes known by then. So removing a task also drops what was measured of those that
    have followed it, of which its classes are a part. Images that have trained the features look easier than others
    are: they count as long as there are no others.

    What is left after a task was removed may have been measured among two classes of ten, and say next to nothing of
    the ten. So probabilities are calibrated if it was measured among at least half of the classes known now. Of models
    that were combined, the classes of each part are added up. Else a rule of thumb gives the temperature, until
    another task is learnt: see [`plain_temperature`].

    Args:
        spreads (callable, *optional*): [`ClassRouter.spreads`] of the router. When a task was measured, they were
            noted, so that its losses can be brought up to date.
        width (`int`, *optional*, defaults to 0): Number of features, for [`lengthen_tails`].
        adapted (callable, *optional*): Whether the first task has trained the features.
        classes (callable, *optional*): The number of classes known now.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.methods.confidence import Confidence

    >>> confidence = Confidence(width=64)
    >>> confidence.fitted() is None, confidence(torch.tensor([[-1.0, -4.0]])).exp()  # nothing was measured
    (True, tensor([[0.9418, 0.0582]]))

    ```
    """

    width: torch.Tensor
    losses: torch.Tensor
    origins: torch.Tensor
    spreads: torch.Tensor
    known: torch.Tensor

    def __init__(
        self,
        spreads: Callable[[torch.Tensor], torch.Tensor] | None = None,
        width: int = 0,
        adapted: Callable[[], bool] | None = None,
        classes: Callable[[], int] | None = None,
    ) -> None:
        super().__init__()
        self._classes_now = classes
        self._spreads_now, self._features, self._adapted = spreads, width, adapted
        self.register_buffer("width", torch.tensor(width))  # 0 in what was saved before tails were lengthened
        self.register_buffer("losses", torch.zeros(0, GRID, dtype=torch.float32))  # of each task; zeros: not measured
        self.register_buffer("origins", torch.zeros(0, dtype=torch.int64))  # the first task that each was beside
        self.register_buffer("spreads", torch.zeros(0, dtype=torch.float32))  # when it was measured; 0: not known
        self.register_buffer("known", torch.zeros(0, dtype=torch.int64))  # classes by then; 0: not known

    def fitted(self) -> tuple[float, float] | None:
        """The temperature, above 0, and the share, in [0, 1]; `None` if too little was measured to calibrate them."""
        return self.once("losses", self._fit)

    def temperature(self) -> float | None:
        """The temperature of calibrated probabilities; `None` if they are not."""
        fitted = self.fitted()
        return None if fitted is None else fitted[0]

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of classes, `(batch, classes)`, from their scores."""
        fitted, width = self.fitted(), self.once("width", int)
        if fitted is None and not width:  # of before anything was measured: as it was
            return scores
        return calibrate(self._lengthen(scores), *(fitted or (plain_temperature(width), 0.0)))

    def measure(self, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Losses of held-out images for [`Confidence.add`]; see [`losses_on_grid`]."""
        if not self.losses.any():
            self.width = torch.tensor(self._features).to(self.width)
        return losses_on_grid(self._lengthen(scores), targets)

    def add(self, losses: torch.Tensor, spread: float = 0.0, known: int = 0) -> None:
        """Adds a task.

        Args:
            losses (`torch.Tensor` of shape `(222,)`): From [`Confidence.measure`].
            spread (`float`, *optional*, defaults to 0.0): Of its classes and those before, at this moment; 0 if that
                is not known.
            known (`int`, *optional*, defaults to 0): Number of classes known by now; 0 if that is not known.
        """
        self.spreads = torch.cat([self.spreads, torch.tensor([spread]).to(self.spreads)])
        self.known = torch.cat([self.known, torch.tensor([known]).to(self.known)])
        self.origins = torch.cat([self.origins, self.origins.new_zeros(1)])
        self.losses = torch.cat([self.losses, losses.to(self.losses)[None]])

    def remove(self, position: int) -> None:
        """Removes a task, and what was measured beside it."""
        later = torch.arange(len(self.losses), device=self.losses.device) > position
        beside = later & (self.origins <= position)
        kept = [place for place in range(len(self.losses)) if place != position]
        self.spreads, self.known = (self.spreads * ~beside)[kept], (self.known * ~beside)[kept]
        self.losses = (self.losses * ~beside[:, None])[kept]
        self.origins = (self.origins - (self.origins > position).to(self.origins))[kept]

    def merge(self, other: "Confidence") -> None:
        """Appends the tasks of another model."""
        self.origins = torch.cat([self.origins, other.origins.to(self.origins) + len(self.losses)])
        self.spreads = torch.cat([self.spreads, other.spreads.to(self.spreads)])
        self.known = torch.cat([self.known, other.known.to(self.known)])
        if not self.losses.any():
            self.width = other.width.to(self.width)
        alike = self.width.tolist() == other.width.tolist()  # else its losses are of other probabilities
        self.losses = torch.cat([self.losses, other.losses.to(self.losses) * alike])

    def check(self, num_tasks: int) -> None:
        """Raises [`ConfigError`] unless it fits a model, after it was read from a file."""
        places = torch.arange(num_tasks, device=self.origins.device)
        counts = {len(self.losses), len(self.origins), len(self.spreads), len(self.known)} - {num_tasks}
        if counts:
            raise ConfigError(f"method.safetensors has the confidence of {min(counts)} tasks, not {num_tasks}.")
        if (
            not (self.losses.isfinite() & (self.losses >= 0)).all()
            or not ((self.origins >= 0) & (self.origins <= places)).all()
        ):
            raise ConfigError("method.safetensors has losses below 0, or of tasks beside later ones.")
        if not (self.spreads.isfinite() & (self.spreads >= 0)).all() or not (self.known >= 0).all():
            raise ConfigError("method.safetensors has distances between classes, or numbers of them, below 0.")
        if self.width.dim() or self.once("width", int) not in (0, self._features):
            raise ConfigError(f"method.safetensors has confidence of {self.width.tolist()} features.")
        self.fitted()  # so that it is known when the model is exported

    def _lengthen(self, scores: torch.Tensor) -> torch.Tensor:
        return lengthen_tails(scores, self.once("width", int))

    def _fit(self, losses: torch.Tensor) -> tuple[float, float] | None:
        """What [`Confidence.fitted`] returns."""
        losses, then, known = losses.cpu().double(), self.spreads.cpu().double(), self.known.cpu().double()
        if self._spreads_now is not None and then.any():
            now = self._spreads_now(self.origins).cpu().double()
            losses = at_other_temperatures(losses, torch.where((then > 0) & (now > 0), now / then, 1))
        first = self.origins.cpu() == torch.arange(len(losses))
        if self._adapted is not None and self._adapted() and losses[~first].any():
            losses = losses * ~first[:, None]
        if known.any():
            losses = losses * torch.where(known > 0, known / known.max(), 1)[:, None]
        return best_on_grid(losses.sum(dim=0)) if self._enough(losses.any(dim=1)) else None

    def _enough(self, measured: torch.Tensor) -> bool:
        """Whether tasks were measured among at least half of the classes known now."""
        if not measured.any() or self._classes_now is None:
            return bool(measured.any())
        known, origins = self.known.cpu()[measured].tolist(), self.origins.cpu()[measured].tolist()
        if 0 in known:  # of before that was noted
            return True
        among = {origin: count for count, origin in sorted(zip(known, origins, strict=True))}  # the most of each
        return 2 * sum(among.values()) >= self._classes_now()
