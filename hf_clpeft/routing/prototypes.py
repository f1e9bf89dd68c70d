"""Nearest k-means centre: the router of S-Prompts and S-LoRA."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from ..config.text import get_logger
from .few import favour, metric_of
from .routing import Router, Routing, State, distances_to
from .typicality import FOLDS, PERCENT, SAME, fit_thresholds, p_values


if TYPE_CHECKING:
    from sklearn.cluster import KMeans


logger = get_logger(__name__)

CANDIDATES = (1, 2, 5, 10, 20, 50, 100, 200)
FARTHEST = 2.0  # maximum distance on the unit sphere


class PrototypeRouter(Router):
    """Routes an image to the task of the nearest prototype.

    Prototypes are k-means centres of a task's L2-normalised query features; distances are Euclidean. Every image is
    routed independently of the batch.

    For each task, the router also stores 100 quantiles of the distances of the task's own images, cross-fitted on
    images held out of the clustering: the i-th threshold is exceeded by i % of them. They give conformal p-values, by
    which out-of-distribution images are rejected (Vovk et al., "Algorithmic Learning in a Random World", 2005).

    While `learns_few` is true, the prototypes of a task are the means of its classes, and are marked as known from a
    few images. Whether an image is nearer to them than to the nearest of all others is seen in a metric of its own, by
    [`metric_of`], and with a [`bonus`]. Distances to other prototypes stay as they are.

    Args:
        query_size (`int`): Width of query features.
        k (`int` or `"auto"`, *optional*, defaults to 5): Prototypes per task; see [`choose_k`].

    Source: section 3 of arXiv 2406.03216; S-Prompts, arXiv 2207.12819.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing import PrototypeRouter

    >>> router = PrototypeRouter(query_size=2, k=1)
    >>> router.learn(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> router.learn(torch.tensor([[-1.0, 0.0]]))
    >>> router(torch.tensor([[0.1, 3.0], [-5.0, 0.0]])).selection.tolist()
    [0, 1]

    ```
    """

    title = "nearest prototype"
    rejects = True
    options = ("k",)
    learns_few = False
    prototypes: torch.Tensor
    thresholds: torch.Tensor
    few: torch.Tensor
    _metric: torch.Tensor | None
    _placed: torch.Tensor
    _bonus: torch.Tensor

    def __init__(self, query_size: int, k: int | str = 5):
        super().__init__()
        self.query_size, self.k = query_size, k
        self.register_buffer("prototypes", torch.zeros(0, query_size, dtype=torch.float32))
        self.register_buffer("owners", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("thresholds", torch.zeros(0, PERCENT, dtype=torch.float32))
        self.register_buffer("few", torch.zeros(0, dtype=torch.int64))  # 1 for a prototype of few images
        self.register_buffer("_metric", None, persistent=False)  # if there are some of few and some of many
        self.register_buffer("_placed", None, persistent=False)  # prototypes in that metric
        self.register_buffer("_bonus", None, persistent=False)

    def learn(self, features: torch.Tensor, classes: torch.Tensor | None = None, seed: int = 0) -> None:
        if isinstance(self.k, int) and self.k > len(features):
            logger.warning(
                "A task has %d images, fewer than k=%d prototypes: using %d.", n := len(features), self.k, n
            )
        if self.learns_few and classes is not None:
            groups = [features[classes == number] for number in classes.unique()]
            prototypes = torch.cat([fit_prototypes(group, 1) for group in groups])
        else:
            prototypes = fit_prototypes(features, self.k, seed)
        self.add_prototypes(prototypes, thresholds_of(features, len(prototypes), seed), self.learns_few)

    def add_prototypes(self, prototypes: torch.Tensor, thresholds: torch.Tensor, few: bool = False) -> None:
        """Appends the prototypes of the next task.

        Args:
            prototypes (`torch.Tensor` of shape `(k, query_size)`): Centres of L2-normalised features.
            thresholds (`torch.Tensor` of shape `(100,)`): From [`thresholds_of`].
            few (`bool`, *optional*, defaults to `False`): Whether they are of a few images only.
        """
        prototypes = prototypes.to(self.prototypes)
        owners = torch.full((len(prototypes),), self.num_owners, device=self.owners.device)
        self.prototypes = torch.cat([self.prototypes, prototypes])
        self.owners = torch.cat([self.owners, owners])
        self.thresholds = torch.cat([self.thresholds, thresholds.to(self.thresholds)[None]])
        self.few = torch.cat([self.few, torch.full_like(owners, int(few))])
        self.derive()

    def derive(self) -> None:
        """Updates what is computed from the prototypes."""
        few = self.few.bool().cpu()
        self._metric = None
        if 0 < int(few.sum()) < len(few):
            prototypes, owners = self.prototypes.cpu().double(), self.owners.cpu()
            known = self.thresholds.cpu().double()[owners[~few].unique()]
            variance = known.square().mean() / self.query_size
            metric = metric_of(prototypes[~few], owners[~few], variance)
            self._metric, self._placed = metric.to(self.prototypes), (prototypes @ metric).to(self.prototypes)
            self._bonus = favour(prototypes, metric, few, variance).to(self.prototypes)

    def why_not_removed(self, owner: int) -> str | None:
        return None

    def remove(self, owner: int, number_of: dict[int, int]) -> None:
        kept = self.owners != owner
        self.prototypes, self.few, owners = self.prototypes[kept], self.few[kept], self.owners[kept]
        self.owners = owners - (owners > owner).to(owners.dtype)
        self.thresholds = torch.cat([self.thresholds[:owner], self.thresholds[owner + 1 :]])
        self.derive()

    def merge(self, other: "PrototypeRouter", numbers: list[int]) -> None:
        for owner in range(other.num_owners):
            own = other.owners == owner
            self.add_prototypes(other.prototypes[own], other.thresholds[owner], bool(other.few[own].any()))

    def split(self, tasks: list[list[int]]) -> tuple[State, list[State]]:
        state, parts = super().split(tasks)
        return {name: tensor for name, tensor in state.items() if name != "few" or tensor.any()}, parts

    def join(self, shared: State, parts: list[State], tasks: list[list[int]]) -> State:
        return {"few": torch.zeros_like(shared.get("owners", self.owners)), **super().join(shared, parts, tasks)}

    def check(self, tensors: dict[str, torch.Tensor], num_tasks: int, num_classes: int) -> None:
        super().check(tensors, num_tasks, num_classes)
        owners = tensors["owners"]
        shapes = (tuple(tensors["prototypes"].shape), tuple(tensors["thresholds"].shape))
        wanted = ((owners.numel(), self.query_size), (num_tasks, PERCENT))
        if owners.unique().tolist() != list(range(num_tasks)) or owners.dim() != 1 or shapes != wanted:
            raise ValueError(
                f"it has prototypes of shape {shapes[0]} and thresholds of shape {shapes[1]} for tasks "
                f"{owners.unique().tolist()[:20]}, but the model has tasks {list(range(num_tasks))[:20]} and width "
                f"{self.query_size}."
            )
        if tensors["few"].shape != owners.shape or not torch.isin(tensors["few"], torch.arange(2)).all():
            raise ValueError("few is not 0 or 1 for every prototype.")
        own = self.state_dict()
        for key in tensors.keys() - {"prototypes", "owners", "thresholds", "few"}:
            # Further buffers of a subclass have a fixed shape, unless the subclass checks them itself.
            if tensors[key].shape != own[key].shape:
                raise ValueError(f"{key} has shape {tuple(tensors[key].shape)}, not {tuple(own[key].shape)}.")

    def load(self, tensors: dict[str, torch.Tensor], num_tasks: int, num_classes: int) -> None:
        if tensors.keys() == {"prototypes", "owners", "few"}:  # saved before thresholds were measured
            shape = (len(tensors["owners"].unique()), PERCENT)
            tensors["thresholds"] = torch.full(shape, FARTHEST, dtype=torch.float32)
        super().load(tensors, num_tasks, num_classes)
        self.derive()

    def distances(self, query: torch.Tensor) -> torch.Tensor:
        """Distance of each image to the nearest prototype of every task.

        Args:
            query (`torch.Tensor` of shape `(batch, query_size)`): Query features, normalised here.

        Returns:
            `torch.Tensor` of shape `(batch, tasks)`.
        """
        query = torch.nn.functional.normalize(query.to(self.prototypes), dim=-1)
        distances = distances_to(self.prototypes, query)
        if self._metric is not None:
            few = self.few.bool()
            placed = distances_to(self._placed, query @ self._metric).square() - self._bonus
            old, old_placed = (far.masked_fill(few, torch.inf).amin(dim=1)[:, None] for far in (distances, placed))
            # Nearer than all others by as much as in the metric.
            distances = torch.where(few, (old.square() + placed - old_placed).clamp(min=0).sqrt(), distances)
        return self._nearest(distances)

    def _nearest(self, distances: torch.Tensor) -> torch.Tensor:
        """Of every task, from the distances to all prototypes."""
        nearest = distances.new_full((distances.shape[0], self.num_owners), torch.inf)
        return nearest.scatter_reduce(1, self.owners.expand(distances.shape[0], -1), distances, reduce="amin")

    def forward(self, query: torch.Tensor) -> Routing:
        """Routes a batch of query features of shape `(batch, query_size)`.

        Returns:
            [`Routing`]: `selection` of shape `(batch,)`; `distance` is Euclidean, to the nearest prototype, in [0, 2].
        """
        distances = self.distances(query)
        distance, owner = distances.min(dim=1)
        return Routing(owner, distance, distances)

    def points(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.prototypes, self.owners

    def calibrated(self) -> list[bool] | None:
        return self.once("thresholds", lambda thresholds: (thresholds < FARTHEST).any(dim=1).tolist())

    def typicality(self, query: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
        """The largest of the p-values of all tasks: an image must be typical of none to be rejected."""
        if self._metric is not None:  # thresholds are of distances that do not depend on other tasks
            first = torch.nn.functional.normalize(query if query.dim() == 2 else query[:, 0], dim=-1)
            plain = self._nearest(distances_to(self.prototypes, first.to(self.prototypes)))
            distances = torch.where(self._nearest(1.0 - self.few[None]) == 0, plain, distances)
        return p_values(distances, self.thresholds).amax(dim=1)


def fit_prototypes(features: torch.Tensor, k: int | str, seed: int = 0) -> torch.Tensor:
    """k-means centres of L2-normalised features.

    Args:
        features (`torch.Tensor` of shape `(images, query_size)`): Query features of a task.
        k (`int` or `"auto"`): Number of centres, at most one per image. `"auto"`: see [`choose_k`].
        seed (`int`, *optional*, defaults to 0): Seed of k-means.

    Returns:
        `torch.Tensor` of shape `(k, query_size)`, `float32`, on the CPU.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing.prototypes import fit_prototypes

    >>> fit_prototypes(torch.tensor([[3.0, 0.0], [4.0, 0.0]]), k=1)
    tensor([[1., 0.]])

    ```
    """
    count = choose_k(features, seed) if k == "auto" else int(k)
    normalized = torch.nn.functional.normalize(features.float(), dim=-1).cpu()
    return torch.from_numpy(_k_means(normalized, min(count, len(normalized)), seed).cluster_centers_).float()


def thresholds_of(features: torch.Tensor, k: int, seed: int = 0) -> torch.Tensor:
    """Thresholds of the distances of a task's images to its prototypes, by cross-fitting; see [`fit_thresholds`].

    For a single image all thresholds are the maximum distance, so nothing is rejected. None is below `SAME`, so that
    rounding does not reject an image of which a task has only copies.

    Args:
        features (`torch.Tensor` of shape `(images, query_size)`): Query features of a task.
        k (`int`): Number of prototypes of the task.
        seed (`int`, *optional*, defaults to 0): Seed of the folds and of k-means.

    Returns:
        `torch.Tensor` of shape `(100,)`, `float32`, on the CPU, decreasing.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing.prototypes import thresholds_of

    >>> features = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    >>> thresholds = thresholds_of(features, k=5)
    >>> bool(thresholds[0] > thresholds[49] > thresholds[99])
    True

    ```
    """
    normalized = torch.nn.functional.normalize(features.float(), dim=-1).cpu()
    count = len(normalized)
    if count < 2:
        return torch.full((PERCENT,), FARTHEST, dtype=torch.float32)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
    distances = np.zeros(count)
    for fold in np.array_split(order, min(FOLDS, count)):
        fitted = np.ones(count, dtype=bool)
        fitted[fold] = False
        k_means = _k_means(normalized[fitted], min(k, int(fitted.sum())), seed)
        distances[fold] = k_means.transform(normalized[fold].numpy()).min(axis=1)
    return torch.from_numpy(fit_thresholds(distances)).float().clamp(min=SAME)


def choose_k(features: torch.Tensor, seed: int = 0) -> int:
    """Chooses the number of k-means centres on a held-out fifth of a task's features.

    It returns the smallest k whose mean distance of held-out features to the nearest centre is within 1 % of the
    minimum.

    Args:
        features (`torch.Tensor` of shape `(images, query_size)`): Query features of a task.
        seed (`int`, *optional*, defaults to 0): Seed of the split and of k-means.

    Returns:
        `int`: One of `CANDIDATES`.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing.prototypes import choose_k

    >>> noise = 0.01 * torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    >>> choose_k(torch.eye(2).repeat(50, 1) + noise) > 1
    True

    ```
    """
    normalized = torch.nn.functional.normalize(features.float(), dim=-1).cpu()
    order = torch.randperm(len(normalized), generator=torch.Generator().manual_seed(seed))
    held_out, fitted = normalized[order].tensor_split([len(order) // 5])
    candidates = [k for k in CANDIDATES if k <= len(fitted) // 2]
    if not len(held_out) or not candidates:
        return 1
    distances = [float(_k_means(fitted, k, seed).transform(held_out.numpy()).min(axis=1).mean()) for k in candidates]
    return next(k for k, distance in zip(candidates, distances, strict=True) if distance <= 1.01 * min(distances))


def _k_means(features: torch.Tensor, k: int, seed: int) -> "KMeans":
    from sklearn.cluster import KMeans

    return KMeans(n_clusters=k, n_init=3, random_state=seed).fit(features.numpy())
