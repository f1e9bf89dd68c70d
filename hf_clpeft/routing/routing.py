"""What every router is, and what it says about a batch."""

from typing import ClassVar, NamedTuple, Self

import torch

from ..backbones.precision import KeepsPrecision
from ..config import ConfigError


class Routing(NamedTuple):
    """Where images go.

    Args:
        selection (integer `torch.Tensor` of shape `(batch,)` or `(batch, N)`): Positions of the chosen experts,
            nearest first.
        distance (`torch.Tensor` of shape `(batch,)`): How far they are from the image's query features.
        distances (`torch.Tensor` of shape `(batch, experts)`): How far every expert is.
        scores (`torch.Tensor` of shape `(batch, entries)`, *optional*): Of every class of every task, where the router
            knows them; see [`ClassRouter`].

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
        """The same with all images at one expert, and no other."""
        one = self.selection if self.selection.dim() == 1 else self.selection[:, :1]
        return self._replace(selection=torch.full_like(one, expert))


class Router(KeepsPrecision):
    """Finds the experts of images by their query features, image by image. What it keeps stays in `float32`.

    Attributes:
        title (`str`): How it does so, in a few words for model cards.
        knows_classes (`bool`): Whether it keeps every class, not just prototypes of a task or keys of a pool, and so
            can name one itself.
        gives_likelihoods (`bool`): Whether its scores are log-likelihoods, which add up with an expert's
            log-probabilities: see [`hf_clpeft.methods.mixing`].
        landmark (`str`): What distances are measured to.
        options (`tuple[str, ...]`): Attributes that a method's options of the same name set.

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
    landmark = "prototype"
    options: ClassVar[tuple[str, ...]] = ()
    owners: torch.Tensor  # task of each prototype or class; keys belong to none

    @property
    def num_owners(self) -> int:
        """How many tasks the router knows."""
        return int(self.owners.max()) + 1 if len(self.owners) else 0

    def configure(self, options: object) -> Self:
        """Takes over what it has among a method's options: the attributes that the class names in `options`."""
        for name in self.options:
            setattr(self, name, getattr(options, name, getattr(self, name)))
        return self

    def learn(self, features: torch.Tensor, classes: torch.Tensor, seed: int = 0) -> None:
        """Learns the next task.

        Args:
            features (`torch.Tensor` of shape `(images, query_size)`): Query features of its training images.
            classes (integer `torch.Tensor` of shape `(images,)`): Number of the class of each.
            seed (`int`, *optional*, defaults to 0): Of what is drawn, such as the first centres of k-means.
        """
        raise NotImplementedError(f"A {type(self).__name__} learns with the model.")

    def merge(self, other: Self, numbers: list[int]) -> None:
        """Adds all tasks of another router of the same kind, as if they had been learnt here.

        Args:
            other ([`Router`]): What to add.
            numbers (`list[int]`): Number that each of its classes has here.
        """
        raise NotImplementedError(f"{type(self).__name__}s cannot be merged.")

    def remove(self, owner: int) -> None:
        """Takes a task away, exactly; those behind it move up."""
        raise NotImplementedError(f"A {type(self).__name__} cannot forget.")

    def typicality(self, distances: torch.Tensor) -> torch.Tensor:
        """Conformal p-values of distances, of the same shape: see [`PrototypeRouter`]."""
        raise NotImplementedError(f"A {type(self).__name__} is not calibrated.")

    def points(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What distances are measured to, for a map of the model: vectors among query features.

        Returns:
            Vectors `(points, query_size)`, none by default; and `(points,)`, the position of each one's expert.
        """
        return torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64)

    def calibrated(self) -> list[bool] | None:
        """Whether it is known of each task how far its own images lie; `None` where no router of this kind knows."""
        return None

    def check_knows(self, tasks: list[str], classes: list[str]) -> None:
        """Raises [`ConfigError`] unless it has learnt all tasks and classes of a model. Keys belong to no task.

        Args:
            tasks (`list[str]`): Their names.
            classes (`list[str]`): Theirs.
        """
        if "owners" in self._buffers and self.num_owners != len(tasks):
            missing = tasks[self.num_owners :][:3]
            raise ConfigError(
                f"The router has learnt {self.num_owners} of {len(tasks)} tasks, "
                f"{f'not {missing[0]}' if missing else 'more than that'}. The method's `end` must call "
                "`self.router.learn` once for each task."
            )

    def check(self, tensors: dict[str, torch.Tensor], num_tasks: int, num_classes: int) -> None:
        """Raises `ValueError` unless [`~Router.load`] can take these tensors over. A subclass checks more than names.

        Args:
            tensors (`dict[str, torch.Tensor]`): Content of a file: `float32`, or `int64` where something is counted.
            num_tasks (`int`): How many tasks it should know.
            num_classes (`int`): How many classes there are.
        """
        own = self.state_dict()
        if tensors.keys() != own.keys():
            raise ValueError(f"it holds {sorted(tensors)}, but the model needs {sorted(own)}.")
        for key, tensor in tensors.items():
            wanted = torch.float32 if own[key].is_floating_point() else torch.int64
            if tensor.dtype != wanted:  # whatever the precision that the model computes in
                raise ValueError(f"{key} is of {tensor.dtype}, and is stored as {wanted}.")

    def load(self, tensors: dict[str, torch.Tensor], num_tasks: int, num_classes: int) -> None:
        """Takes over what `state_dict` gave, once [`~Router.check`] has found nothing.

        Args:
            tensors (`dict[str, torch.Tensor]`): Content of a file.
            num_tasks (`int`): How many tasks it should know.
            num_classes (`int`): How many classes there are.

        Raises:
            `ValueError`: Something does not fit.
        """
        self.check(tensors, num_tasks, num_classes)
        for key, own in self.state_dict(keep_vars=True).items():
            own.data = tensors[key].to(own)
