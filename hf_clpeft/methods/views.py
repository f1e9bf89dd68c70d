"""Routers on several views: of every training image in their sums, and of an image to predict."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from ..backbones.views import MOST, MOST_FIXED, augment, fixed_views
from ..config import ConfigError, MethodOptions
from ..config.text import get_logger
from ..routing import ROUTERS, ClassRouter, Router
from ..routing.held_out import held_out_loss
from .keeper import Keeper
from .learning import FeaturesOf
from .method import Method
from .options import QueryOptions


logger = get_logger(__name__)

Kind = Literal["crop", "crop_flip", "flip"]
KINDS: tuple[Kind, ...] = ("crop", "crop_flip", "flip")  # crops come first, as they are right for text and digits, too


@dataclass
class ViewOptions(QueryOptions):
    """Views of images, for routers that know classes."""

    views: int = field(
        default=1, metadata={"help": "Views of each training image in the router's sums; with 1, the image alone."}
    )
    view_kind: Literal["auto", "flip", "crop", "crop_flip"] = field(
        default="auto",
        metadata={"help": "Kind of the views; auto chooses on held-out images of the first task."},
    )
    test_views: int = field(
        default=1, metadata={"help": "Views of an image to predict, whose scores are averaged: a forward pass each."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = "crop_flip" if self.view_kind == "auto" else self.view_kind
        for option, most in (("views", MOST[kind]), ("test_views", MOST_FIXED[kind])):
            if not 1 <= getattr(self, option) <= most:
                raise ConfigError(f"{option}={getattr(self, option)} must be from 1 to {most} with views of {kind}.")


class ManyViews(Method):
    """Base of methods whose router sees several views of an image. Subclasses override [`~ManyViews.look`]."""

    router: Router

    @property
    def query_passes(self) -> int:  # type: ignore[override]
        return getattr(self.options, "test_views", 1)

    def look(self, pixels: torch.Tensor) -> torch.Tensor:
        """Query features of one view of images: `(batch, query_size)`. Default: those of the frozen backbone."""
        return super().query(pixels)

    def query(self, pixels: torch.Tensor) -> torch.Tensor:
        """Query features: `(batch, query_size)`, or `(batch, test_views, query_size)` with several views."""
        count = getattr(self.options, "test_views", 1)
        if count == 1:
            return self.look(pixels)
        views = fixed_views(count, self.options.view_kind)
        return torch.stack([self.look(augment(pixels, view)) for view in views], dim=1)

    def observe(self, features_of: FeaturesOf) -> tuple[torch.Tensor, torch.Tensor]:
        """Query features of all training images of the task, of all their views, and class indices."""
        count = getattr(self.options, "views", 1)
        if count == getattr(self.options, "test_views", 1) == 1:
            return features_of(self.look)
        if self.options.view_kind == "auto":
            self.options.view_kind, found = self._choose_kind(features_of, max(count, 2))
            if count >= 2:
                return found
        return features_of(self.look, count, self.options.view_kind)

    def looks_alike(self) -> dict[str, Any]:
        """What of [`~Method.alike`] decides how an image to predict is looked at. Sums over any views add up."""
        count = getattr(self.options, "test_views", 1)
        if count == 1:
            return {"test_views": count}
        # With mirror images or without them, crops are right.
        return {"test_views": count, "view_kind": "flip" if self.options.view_kind == "flip" else "crop"}

    def merged_options(self, others: list[Keeper]) -> MethodOptions:
        options: Any = super().merged_options(others)
        kinds = {getattr(method.options, "view_kind", None) for method in (self, *others)}
        if getattr(options, "test_views", 1) > 1 and "crop" in kinds:  # right for the images of all of them
            return replace(options, view_kind="crop")
        return options

    def check_removable(self, position: int, first: bool = False) -> None:
        """Raises [`ConfigError`] unless a task can be removed from the router.

        Args:
            position (`int`): Index of the task.
            first (`bool`, *optional*, defaults to `False`): Whether the first task's expert takes query features.
        """
        name, why = self.config.tasks[position].name, self.router.why_not_removed(position)
        if first and position == 0 and len(self.config.tasks) > 1:
            raise ConfigError(f"{name!r} cannot be removed exactly, as its expert takes everyone's query features.")
        if why is not None:
            raise ConfigError(
                f"{name!r} cannot be removed exactly, as {why}. Where tasks must be unlearnt, choose "
                "router='gaussian' or, in an S-X method, router='prototypes'."
            )

    def why_no_reject(self) -> str | None:
        calibrated = self.router.calibrated()
        if calibrated is None:
            return super().why_no_reject()
        unknown = [task.name for task, known in zip(self.config.tasks, calibrated, strict=True) if not known]
        if not unknown:
            return None
        return (
            f"reject_rate needs to know how far a task's own images lie, but {unknown[:3]} had too few images, or "
            "were saved before that was measured. Learn them again in a new model."
        )

    def typicality(self, query: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
        return self.router.typicality(query, distances)

    @classmethod
    def rejects(cls, options: Any) -> bool:
        router = ROUTERS.get(getattr(options, "router", cls.which_router))
        return router is not None and router.rejects

    def _choose_kind(self, features_of: FeaturesOf, count: int) -> tuple[Kind, tuple[torch.Tensor, torch.Tensor]]:
        """The kind of views with which the router tells held-out images apart best; their features, and classes."""
        assert isinstance(self.router, ClassRouter)
        kinds = [kind for kind in KINDS if MOST_FIXED[kind] >= self.options.test_views and MOST[kind] >= count]
        losses, best = {}, None
        for kind in kinds:
            found = features_of(self.look, count, kind)
            losses[kind] = held_out_loss(self.router, *found)
            if best is None or losses[kind] < losses[best[0]]:
                best = kind, found
        logger.info("Loss on held-out images by kind of views: %s", losses)
        assert best is not None
        return best
