"""Nearest keys by cosine similarity: the router of L2P and L2L."""

import torch

from .routing import Router, Routing


class KeyRouter(Router):
    """Routes an image to the experts of a pool whose keys are nearest to its query features.

    Args:
        query_size (`int`): Width of query features.
        pool_size (`int`): Experts in the pool, each with a key.
        top_n (`int`): Experts selected per image.

    Source: L2P, arXiv 2112.08654; keys start uniform in (-1, 1), as in awslabs/Renate.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing import KeyRouter

    >>> router = KeyRouter(query_size=2, pool_size=3, top_n=2)
    >>> router.keys.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    >>> router(torch.tensor([[0.1, 3.0], [-5.0, 1.0]])).selection.tolist()
    [[1, 0], [2, 1]]

    ```
    """

    title = "nearest keys"
    landmark = "key"

    def __init__(self, query_size: int, pool_size: int, top_n: int):
        super().__init__()
        keys = torch.empty(pool_size, query_size, dtype=torch.float32)
        self.keys = torch.nn.Parameter(keys, requires_grad=False)
        self.top_n = top_n
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the keys at random."""
        torch.nn.init.uniform_(self.keys, -1, 1)

    def points(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.nn.functional.normalize(self.keys, dim=-1), torch.arange(len(self.keys))

    def check(self, tensors: dict[str, torch.Tensor], num_tasks: int, num_classes: int) -> None:
        super().check(tensors, num_tasks, num_classes)
        if tensors["keys"].shape != self.keys.shape:
            raise ValueError(
                f"it has keys of shape {tuple(tensors['keys'].shape)}, but the model needs {tuple(self.keys.shape)}."
            )

    def forward(self, query: torch.Tensor) -> Routing:
        """Routes a batch.

        Args:
            query (`torch.Tensor` of shape `(batch, query_size)`): Query features.

        Returns:
            [`Routing`]: `selection` of shape `(batch, top_n)`, nearest first; `distance` is the mean of 1 − cosine
            over the selected keys, in [0, 2]. It is differentiable and part of the training loss.
        """
        query = torch.nn.functional.normalize(query.to(self.keys), dim=-1)
        keys = torch.nn.functional.normalize(self.keys, dim=-1)
        # Not a matrix product, whose rounding would depend on the rest of the batch.
        cosines = (query[:, None] * keys).sum(dim=-1)
        nearest, selection = cosines.topk(self.top_n, dim=-1)
        return Routing(selection, (1 - nearest).mean(dim=-1), 1 - cosines)
