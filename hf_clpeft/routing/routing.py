"""What every router is, and what it says about a batch."""

from typing import NamedTuple

import torch

from ..backbones.precision import KeepsPrecision
from ..config.model import MethodConfig


class Routing(NamedTuple):
    """Where images go.

    Args:
        selection (integer `torch.Tensor` of shape `(batch,)` or `(batch, N)`): Positions of the chosen experts,
            nearest first.
        distance (`torch.Tensor` of shape `(batch,)`): How far they are from the image's query features.
        distances (`torch.Tensor` of shape `(batch, experts)`): How far every expert is.
        scores (`torch.Tensor` of shape `(batch, entries)`, *optional*): Of every class of every task, where the router
            knows them; see [`ClassRouter`].
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
    """

    title = "unknown"
    knows_classes = False
    gives_likelihoods = False
    owners: torch.Tensor  # task of each prototype or class; keys belong to none

    @property
    def num_owners(self) -> int:
        """How many tasks the router knows."""
        return int(self.owners.max()) + 1 if len(self.owners) else 0

    @classmethod
    def from_method(cls, method: MethodConfig, query_size: int) -> "Router":
        """A router that knows no task yet.

        Args:
            method ([`MethodConfig`]): May say more about it.
            query_size (`int`): Width of query features.

        Returns:
            [`Router`]
        """
        return cls(query_size)

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
