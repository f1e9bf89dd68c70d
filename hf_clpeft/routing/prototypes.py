"""Nearest k-means centre: the router of S-Prompts and S-LoRA."""

from typing import NamedTuple

import torch


class Routing(NamedTuple):
    """Where images go.

    Args:
        owner (integer `torch.Tensor` of shape `(batch,)`): Position of the chosen task.
        distance (`torch.Tensor` of shape `(batch,)`): Euclidean distance to its nearest prototype.
    """

    owner: torch.Tensor
    distance: torch.Tensor


class PrototypeRouter(torch.nn.Module):
    """Sends an image to the owner of the nearest prototype.

    Prototypes are k-means centres of a task's L2-normalised query features; distances are Euclidean. Routing is per
    image, always: nothing but its own features decides where an image goes.

    Args:
        hidden_size (`int`): Width of a feature.

    Source: section 3 of arXiv 2406.03216; S-Prompts, arXiv 2207.12819.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing import PrototypeRouter

    >>> router = PrototypeRouter(hidden_size=2)
    >>> router.add(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), k=2)
    >>> router.add(torch.tensor([[-1.0, 0.0]]), k=1)
    >>> router(torch.tensor([[0.1, 3.0], [-5.0, 0.0]])).owner.tolist()
    [0, 1]

    ```
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.register_buffer("prototypes", torch.zeros(0, hidden_size))
        self.register_buffer("owners", torch.zeros(0, dtype=torch.int64))

    @property
    def num_owners(self) -> int:
        """How many tasks have prototypes."""
        return int(self.owners.max()) + 1 if len(self.owners) else 0

    def fit(self, features: torch.Tensor, k: int, seed: int = 0) -> torch.Tensor:
        """k-means centres of L2-normalised features.

        Args:
            features (`torch.Tensor` of shape `(images, hidden_size)`): Query features of a task.
            k (`int`): How many centres; fewer when there are fewer images.
            seed (`int`, *optional*, defaults to 0): Seed of k-means.

        Returns:
            `torch.Tensor` of shape `(k, hidden_size)`, `float32`, on the CPU.
        """
        from sklearn.cluster import KMeans

        features = torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy()
        means = KMeans(n_clusters=min(k, len(features)), n_init=3, random_state=seed).fit(features)
        return torch.from_numpy(means.cluster_centers_).float()

    def add(self, features: torch.Tensor, k: int, seed: int = 0) -> None:
        """Adds prototypes, owned by the next task.

        Args:
            features (`torch.Tensor` of shape `(images, hidden_size)`): Query features of the task's training images.
            k (`int`): How many prototypes.
            seed (`int`, *optional*, defaults to 0): Seed of k-means.
        """
        self.add_prototypes(self.fit(features, k, seed))

    def add_prototypes(self, prototypes: torch.Tensor) -> None:
        """Adds prototypes as they are, owned by the next task.

        Args:
            prototypes (`torch.Tensor` of shape `(k, hidden_size)`): Centres of L2-normalised features.
        """
        prototypes = prototypes.to(self.prototypes)
        owners = torch.full((len(prototypes),), self.num_owners, device=self.owners.device)
        self.prototypes = torch.cat([self.prototypes, prototypes])
        self.owners = torch.cat([self.owners, owners])

    def distances(self, query: torch.Tensor) -> torch.Tensor:
        """Distance of each image to the nearest prototype of every task.

        Args:
            query (`torch.Tensor` of shape `(batch, hidden_size)`): Query features, normalised here.

        Returns:
            `torch.Tensor` of shape `(batch, tasks)`.
        """
        query = torch.nn.functional.normalize(query.to(self.prototypes), dim=-1)
        # Without the matrix-product shortcut a distance does not depend on what else is in the batch.
        distances = torch.cdist(query, self.prototypes, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distances.new_full((len(query), self.num_owners), torch.inf)
        return nearest.scatter_reduce(1, self.owners.expand(len(query), -1), distances, reduce="amin")

    def forward(self, query: torch.Tensor) -> Routing:
        """Routes a batch.

        Args:
            query (`torch.Tensor` of shape `(batch, hidden_size)`): Query features, normalised here.

        Returns:
            [`Routing`]
        """
        distance, owner = self.distances(query).min(dim=1)
        return Routing(owner, distance)
