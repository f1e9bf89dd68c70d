"""Base class of routers, and the result of routing a batch."""

from typing import ClassVar, NamedTuple, Self

import torch

from ..backbones.precision import KeepsPrecision
from ..backbones.tracing import ReadsOnce, tracing
from ..config import ConfigError


State = dict[str, torch.Tensor]


class Routing(NamedTuple):
    """The result of routing a batch.

    Args:
        selection (integer `torch.Tensor` of shape `(batch,)` or `(batch, N)`): Indices of the selected experts,
            nearest first.
        distance (`torch.Tensor` of shape `(batch,)`): Distance of the query features to the selected experts.
        distances (`torch.Tensor` of shape `(batch, experts)`): Distances to all experts.
        scores (`torch.Tensor` of shape `(batch, entries)`, *optional*): Scores of every class of every task, if the
            router knows classes; see [`ClassRouter`].

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft import Routing

    >>> routing = Routing(torch.tensor([1, 0]), distance=torch.zeros(2), distances=torch.zeros(2, 2))
    >>> routing.sent_to(1).selection
    tensor([1, 1])

    ```
    """

    selection: torch.Tensor
    distance: torch.Tensor
    distances: torch.Tensor
    scores: torch.Tensor | None = None

    def sent_to(self, expert: int) -> "Routing":
        """A copy with all images routed to one expert."""
        one = self.selection if self.selection.dim() == 1 else self.selection[:, :1]
        return self._replace(selection=torch.full_like(one, expert))


class Router(KeepsPrecision, ReadsOnce):
    """Selects the experts of each image by its query features. Its state is always `float32`.

    Attributes:
        title (`str`): Short description, for model cards.
        knows_classes (`bool`): Whether it stores every class, rather than prototypes of tasks or keys of a pool, and
            can be used as a classifier.
        gives_likelihoods (`bool`): Whether its scores are log-likelihoods, which can be added to an expert's
            log-probabilities: see [`hf_clpeft.methods.mixing`].
        rejects (`bool`): Whether it measures how typical an image is of a task; see [`~Router.typicality`].
        landmark (`str`): What distances are measured to: `"prototype"`, `"class"` or `"key"`.
        options (`tuple[str, ...]`): Attributes that are set by the method's options of the same name.

    Example:

    ```py
    >>> from hf_clpeft import ROUTERS, s_lora

    >>> ROUTERS["prototypes"](query_size=32).configure(s_lora(k=20)).k
    20

    ```
    """

    title = "unknown"
    knows_classes = False
    gives_likelihoods = False
    rejects = False
    landmark = "prototype"
    options: ClassVar[tuple[str, ...]] = ()
    owners: torch.Tensor  # task of each prototype or class; keys belong to none

    @property
    def num_owners(self) -> int:
        """Number of tasks learnt."""
        return self.once("owners", count)

    def configure(self, options: object) -> Self:
        """Sets the attributes named in `options` from a method's options; returns the router."""
        for name in self.options:
            setattr(self, name, getattr(options, name, getattr(self, name)))
        return self

    def learn(self, features: torch.Tensor, classes: torch.Tensor, seed: int = 0) -> None:
        """Learns the next task.

        Args:
            features (`torch.Tensor` of shape `(images, query_size)`): Query features of its training images.
            classes (integer `torch.Tensor` of shape `(images,)`): Class index of each image.
            seed (`int`, *optional*, defaults to 0): Random seed, for example of k-means.
        """
        raise NotImplementedError(f"A {type(self).__name__} learns with the model.")

    def merge(self, other: Self, numbers: list[int]) -> None:
        """Appends all tasks of another router of the same class.

        Args:
            other ([`Router`]): Router to merge.
            numbers (`list[int]`): Maps its class indices to those of this model.
        """
        raise NotImplementedError(f"{type(self).__name__}s cannot be merged.")

    def remove(self, owner: int, number_of: dict[int, int]) -> None:
        """Removes a task exactly; the following ones move up.

        Args:
            owner (`int`): Index of the task.
            number_of (`dict[int, int]`): Maps old to new indices of the remaining classes.
        """
        raise NotImplementedError(f"A {type(self).__name__} cannot forget.")

    def why_not_removed(self, owner: int) -> str | None:
        """Why a task cannot be removed exactly; `None` if it can."""
        return "the router does not implement `remove`"

    def typicality(self, query: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
        """Conformal p-values of images: how many of the task's own images are at least as far, in steps of 1 %.

        That of an image of a task that was learnt is below r with a probability of about r, or less.

        Args:
            query (`torch.Tensor` of shape `(batch, query_size)` or `(batch, views, query_size)`): Query features; of
                several views the first counts.
            distances (`torch.Tensor` of shape `(batch, tasks)`): From [`Routing`].

        Returns:
            `torch.Tensor` of shape `(batch,)`, in [0, 1].
        """
        raise NotImplementedError(f"A {type(self).__name__} is not calibrated.")

    def points(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The points that distances are measured to, for plots: prototypes, class means or keys.

        Returns:
            Vectors `(points, query_size)`, none by default; and `(points,)`, the index of each one's expert.
        """
        return torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64)

    def calibrated(self) -> list[bool] | None:
        """Whether each task has calibrated thresholds; `None` if routers of this class have none."""
        return None

    def check_knows(self, tasks: list[str], classes: list[str]) -> None:
        """Raises [`ConfigError`] unless it has learnt all tasks and classes of a model, given by name."""
        if "owners" in self._buffers and self.num_owners != len(tasks):
            missing = tasks[self.num_owners :][:3]
            raise ConfigError(
                f"The router has learnt {self.num_owners} of {len(tasks)} tasks, "
                f"{f'not {missing[0]}' if missing else 'more than that'}. The method's `end` must call "
                "`self.router.learn` once for each task."
            )

    def split(self, tasks: list[list[int]]) -> tuple[State, list[State]]:
        """Splits the state dict into what belongs to all tasks and what belongs to one, which has a file of its own.

        Args:
            tasks (`list[list[int]]`): Class indices of each task.

        Returns:
            The state of all tasks together; and of each, by default nothing. The latter must not change when other
            tasks are learnt or removed.
        """
        return self.state_dict(), []

    def join(self, shared: State, parts: list[State], tasks: list[list[int]]) -> State:
        """Inverse of [`~Router.split`], from untrusted files; raises `ValueError` if they do not fit together."""
        if parts:
            raise ValueError("the router has no sums of single tasks, but the model has files of them.")
        return shared

    def check(self, tensors: dict[str, torch.Tensor], num_tasks: int, num_classes: int) -> None:
        """Raises `ValueError` unless a state dict can be loaded. Subclasses also check shapes.

        Args:
            tensors (`dict[str, torch.Tensor]`): State dict, from a file: `float32`, or `int64` for counts and indices.
            num_tasks (`int`): Number of tasks of the model.
            num_classes (`int`): Number of classes of the model.
        """
        own = self.state_dict()
        if tensors.keys() != own.keys():
            raise ValueError(f"it holds {sorted(tensors)}, but the model needs {sorted(own)}.")
        for key, tensor in tensors.items():
            wanted = torch.float32 if own[key].is_floating_point() else torch.int64
            if tensor.dtype != wanted:  # independent of the dtype of the model
                raise ValueError(f"{key} is of {tensor.dtype}, and is stored as {wanted}.")

    def load(self, tensors: dict[str, torch.Tensor], num_tasks: int, num_classes: int) -> None:
        """Checks and loads a state dict; arguments and errors as for [`~Router.check`]."""
        self.check(tensors, num_tasks, num_classes)
        for key, own in self.state_dict(keep_vars=True).items():
            own.data = tensors[key].to(own)
        self._known.clear()


def count(index: torch.Tensor) -> int:
    """One more than the largest index; 0 without any."""
    return int(index.max()) + 1 if len(index) else 0


def distances_to(points: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Euclidean distances, each as if it were alone.

    Args:
        points (`torch.Tensor` of shape `(points, width)`): Prototypes or class means.
        query (`torch.Tensor` of shape `(batch, width)`): Query features.

    Returns:
        `torch.Tensor` of shape `(batch, points)`.
    """
    if tracing():  # in operators that runtimes have
        return (query[:, None] - points).square().sum(dim=-1).sqrt()
    # Without the matrix-product shortcut, by which others in the batch matter, and which is imprecise for far points.
    return torch.cdist(query, points, compute_mode="donot_use_mm_for_euclid_dist")
