"""Routers that know every class, from sums over query features that do not depend on the order of tasks."""

from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch

from ..backbones.precision import for_sums, without_autocast
from ..config import ConfigError
from .routing import Router, Routing, count


MOST_IMAGES = 2**40  # per class


class ClassRouter(Router, ABC):
    """Routes an image to the task of its likeliest class; without experts, it is a classifier.

    It stores one *entry* per class and task: mean and number of the L2-normalised query features, and further sums
    that a subclass needs. No images are stored, and the result does not depend on the order of tasks.

    A subclass implements the scores of entries (`scores`), of classes (`class_scores`), and distances
    (`to_distances`); `recipes/tutorials/new_router.py` is an example. If scores are log-likelihoods, it sets
    `gives_likelihoods = True` and can be mixed with experts.

    Args:
        query_size (`int`): Width of query features.

    Attributes:
        of_entries (`tuple[str, ...]`): Buffers with a row for each entry, besides its class and task.

    Example:

    ```py
    >>> from hf_clpeft import ROUTERS, ClassRouter

    >>> [name for name, router in ROUTERS.items() if issubclass(router, ClassRouter)]
    ['gaussian', 'class_means', 'ridge', 'linear_ridge', 'low_rank_ridge', 'klda']

    ```
    """

    knows_classes = True
    landmark = "class"
    of_entries: ClassVar[tuple[str, ...]] = ("prototypes", "counts")
    measures = True  # how typical held-out images are, when a task is learnt
    learns_few = False  # whether the next task has a few images of each class only; see [`GaussianRouter`]
    prototypes: torch.Tensor
    counts: torch.Tensor
    classes: torch.Tensor

    def __init__(self, query_size: int):
        super().__init__()
        self.query_size = query_size
        self.register_buffer("prototypes", torch.zeros(0, query_size, dtype=torch.float32))
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("owners", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("classes", torch.zeros(0, dtype=torch.int64))

    def learn(self, features: torch.Tensor, classes: torch.Tensor, seed: int = 0) -> None:
        place = self.place(features.numel())
        features = features.detach().to(place, torch.float64)
        features = features if features.dim() == 3 else features[:, None]
        numbers, entries = classes.to(place).unique(return_inverse=True)
        counts = torch.bincount(entries)
        normalized = torch.nn.functional.normalize(features, dim=-1)
        sums = normalized.new_zeros(len(numbers), self.query_size).index_add(0, entries, normalized.mean(dim=1))
        means = sums / counts[:, None]
        owners = torch.full_like(numbers, self.num_owners)
        self._append({"prototypes": means, "counts": counts, "owners": owners, "classes": numbers})
        with without_autocast(self.prototypes.device):
            self.add_sums(features, normalized - means[entries, None], entries)

    def merge(self, other: Self, numbers: list[int]) -> None:
        renumbered = torch.tensor(numbers, device=other.classes.device)[other.classes]
        columns = {"prototypes": other.prototypes, "counts": other.counts, "classes": renumbered}
        self._append({**columns, "owners": other.owners + self.num_owners})
        self.merge_sums(other)

    def place(self, count: int = 0) -> torch.device:
        """Where sums over so many features are computed in `float64`; see [`for_sums`]."""
        return for_sums(self.prototypes.device, count + self.prototypes.shape[1] ** 2)

    @property
    def num_classes(self) -> int:
        """One more than the highest class index."""
        return self.once("classes", count)

    def why_not_removed(self, owner: int) -> str | None:
        return "the sums of its router hold the images of all tasks"

    def remove(self, owner: int, number_of: dict[int, int]) -> None:
        why = self.why_not_removed(owner)
        if why is not None:
            raise ConfigError(f"Task {owner} cannot be removed exactly, as {why}.")
        kept = self.owners != owner
        for name in self.of_entries:
            setattr(self, name, getattr(self, name)[kept])
        owners, classes = self.owners[kept], self.classes[kept].tolist()
        self.owners = owners - (owners > owner).to(owners)
        self.classes = torch.tensor([number_of[number] for number in classes], dtype=torch.int64).to(owners)

    def points(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.prototypes, self.owners

    def check_knows(self, tasks: list[str], classes: list[str]) -> None:
        super().check_knows(tasks, classes)
        assert self.num_classes >= 0  # read here, so that it is known when the model is exported
        unknown = sorted(set(range(len(classes))) - set(self.classes.tolist()))
        if unknown:
            raise ConfigError(
                f"The router knows no image of {len(unknown)} of the classes, {[classes[i] for i in unknown[:3]]}: "
                "every class of a task needs one among its training images."
            )

    def check(self, tensors: dict[str, torch.Tensor], num_tasks: int, num_classes: int) -> None:
        super().check(tensors, num_tasks, num_classes)
        entries = (tensors["owners"].numel(),)
        shapes = {"prototypes": (*entries, self.query_size), "counts": entries, "owners": entries, "classes": entries}
        shapes |= self.shapes(*entries)
        wrong = [key for key, shape in shapes.items() if tuple(tensors[key].shape) != shape]
        if wrong:
            raise ValueError(f"{wrong[0]} has shape {tuple(tensors[wrong[0]].shape)}, not {shapes[wrong[0]]}.")
        owners, classes = tensors["owners"].unique().tolist(), tensors["classes"].unique().tolist()
        if owners != list(range(num_tasks)):
            raise ValueError(f"its tasks are {owners[:20]}, but the model has {num_tasks}.")
        if classes != list(range(num_classes)):
            missing = sorted(set(range(num_classes)) - set(classes))
            raise ValueError(
                f"it does not know each of the {num_classes} classes; it lacks the numbers {missing[:20]}."
            )
        if not ((tensors["counts"] > 0) & (tensors["counts"] <= MOST_IMAGES)).all():
            raise ValueError(f"a class has no images, or more than {MOST_IMAGES:,}.")

    def load(self, tensors: dict[str, torch.Tensor], num_tasks: int, num_classes: int) -> None:
        super().load(tensors, num_tasks, num_classes)
        try:
            self.derive()
        except RuntimeError as error:  # of linear algebra
            raise ValueError(f"its sums are those of no images: {error}") from error
        broken = [key for key, buffer in self.named_buffers() if not torch.isfinite(buffer).all()]
        if broken:
            raise ValueError(f"its sums are those of no images: {broken[0]} is not finite.")

    def forward(self, query: torch.Tensor) -> Routing:
        """Routes a batch of images; `selection` has shape `(batch,)`.

        Args:
            query (`torch.Tensor` of shape `(batch, query_size)` or `(batch, views, query_size)`): Query features. The
                scores of several views of an image are averaged.
        """
        scores = self.scores(query.reshape(-1, self.query_size))
        if query.dim() == 3:
            scores = scores.unflatten(0, query.shape[:2]).mean(dim=1)
        best = scores.new_full((scores.shape[0], self.num_owners), -torch.inf)
        best = best.scatter_reduce(1, self.owners.expand_as(scores), scores, reduce="amax")
        distances = self.to_distances(best)
        distance, selection = distances.min(dim=1)
        return Routing(selection, distance, distances, scores)

    @abstractmethod
    def class_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores of classes, each of which may have entries from several tasks.

        Args:
            scores (`torch.Tensor` of shape `(batch, entries)`): From [`~ClassRouter.scores`].

        Returns:
            `torch.Tensor` of shape `(batch, classes)`.
        """

    def leave_one_out(
        self, features: torch.Tensor, classes: torch.Tensor, views: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Scores of the next task's training images, each as if all but it had been learnt. The router stays as it is.

        Args:
            features (`torch.Tensor` of shape `(images, query_size)` or `(images, views, query_size)`): Query features.
            classes (integer `torch.Tensor` of shape `(images,)`): Class index of each image.
            views (`int`, *optional*, defaults to 1): Scores are averaged over so many of the first views.

        Returns:
            Scores of classes of shape `(images, classes)`, `float64`, on the CPU, and class indices, without images
            that are alone in their class; `None` if there is no formula for it, or nothing to tell apart.
        """
        return None

    def spreads(self, origins: torch.Tensor | None = None) -> torch.Tensor:
        """How far a task's classes are from one another and from those before, in the metric of the scores.

        Args:
            origins (integer `torch.Tensor` of shape `(tasks,)`, *optional*): The first task that counts as before
                each. Default: the first of all.

        Returns:
            `torch.Tensor` of shape `(tasks,)`, on the CPU: Mean squared distance between means of classes, of which
            scores are multiples; 0 where there is one class, or no such metric.
        """
        return torch.zeros(self.num_owners)

    @abstractmethod
    def scores(self, query: torch.Tensor) -> torch.Tensor:
        """Scores of all entries, of shape `(batch, entries)`; higher is better."""

    @abstractmethod
    def to_distances(self, scores: torch.Tensor) -> torch.Tensor:
        """Converts scores to distances, 0 or more."""

    def _append(self, columns: dict[str, torch.Tensor]) -> None:
        for name, values in columns.items():
            own = getattr(self, name)
            values = values.to(own)
            setattr(self, name, torch.cat([own, values]) if len(own) else values)

    # Further state of a subclass

    def add_sums(self, features: torch.Tensor, residuals: torch.Tensor, entries: torch.Tensor) -> None:
        """Adds the images of a task to further sums.

        An image counts once, with the mean over its views.

        Args:
            features (`torch.Tensor` of shape `(images, views, query_size)`, `float64`): Query features.
            residuals (`torch.Tensor` of shape `(images, views, query_size)`, `float64`): L2-normalised query features
                minus the mean of their entry.
            entries (integer `torch.Tensor` of shape `(images,)`): Entry of each image; 0 is the task's first.
        """
        self.derive()

    def merge_sums(self, other: Self) -> None:
        """Adds the further sums of another router of the same class."""
        self.derive()

    def shapes(self, entries: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the further buffers, given the number of entries."""
        return {}

    def derive(self) -> None:
        """Updates buffers that are computed from the sums."""


class ClassMeanRouter(ClassRouter):
    """Nearest class mean by cosine similarity (NCM), also known as SimpleCIL.

    Args:
        query_size (`int`): Width of query features.

    Source: SimpleCIL, arXiv 2303.07338.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing import ClassMeanRouter

    >>> router = ClassMeanRouter(query_size=2)
    >>> router.learn(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), classes=torch.tensor([0, 1]))
    >>> router.learn(torch.tensor([[-1.0, 0.0]]), classes=torch.tensor([2]))
    >>> router(torch.tensor([[0.1, 3.0], [-5.0, 0.0]])).selection.tolist()
    [0, 1]

    ```
    """

    title = "nearest class mean"

    def why_not_removed(self, owner: int) -> str | None:
        return None

    def scores(self, query: torch.Tensor) -> torch.Tensor:
        query = torch.nn.functional.normalize(query.to(self.prototypes), dim=-1)
        return query @ torch.nn.functional.normalize(self.prototypes, dim=-1).T

    def class_scores(self, scores: torch.Tensor) -> torch.Tensor:
        # The mean of a class is the mean of its entries, weighted by their image counts.
        sums = self.prototypes * self.counts[:, None]
        shape = (scores.shape[0], self.num_classes)
        weighted = scores * sums.norm(dim=-1)
        norms = sums.new_zeros(shape[1], self.query_size).index_add(0, self.classes, sums).norm(dim=-1)
        return scores.new_zeros(shape).index_add(1, self.classes, weighted) / norms

    def to_distances(self, scores: torch.Tensor) -> torch.Tensor:
        return 1 - scores
