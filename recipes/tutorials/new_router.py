"""A router of your own: every class is a Gaussian, and all share the variance of each feature, but no covariance.

python recipes/tutorials/new_router.py --benchmark digits

It keeps one number per feature where `gaussian` keeps a square matrix. The name goes into `config.json`; whoever loads
the model puts the class into `ROUTERS` first.
"""

import sys

import torch

from hf_clpeft import ROUTERS, ClassRouter, run_recipe


class VarianceRouter(ClassRouter):
    title = "Gaussian per class, one variance per feature"

    def __init__(self, query_size: int):
        super().__init__(query_size)
        self.register_buffer("squares", torch.zeros(query_size))  # of all residuals: what is saved besides the means

    # How it decides

    def scores(self, query: torch.Tensor) -> torch.Tensor:
        query = torch.nn.functional.normalize(query.to(self.prototypes), dim=-1)
        variance = self.squares / self.counts.sum() + 1e-6
        return -((query[:, None] - self.prototypes).square() / variance).sum(dim=-1) / 2

    def class_scores(self, scores: torch.Tensor) -> torch.Tensor:
        best = scores.new_full((len(scores), int(self.classes.max()) + 1), -torch.inf)
        return best.scatter_reduce(1, self.classes.expand_as(scores), scores, "amax")  # a class may be of many tasks

    def to_distances(self, scores: torch.Tensor) -> torch.Tensor:
        return (-2 * scores).sqrt()

    # What it learns

    def add_sums(self, features: torch.Tensor, residuals: torch.Tensor, entries: torch.Tensor) -> None:
        self.squares = self.squares + residuals.square().mean(dim=1).sum(dim=0).to(self.squares)

    def merge_sums(self, other: "VarianceRouter") -> None:
        self.squares = self.squares + other.squares

    def shapes(self, entries: int) -> dict[str, tuple[int, ...]]:
        return {"squares": (self.query_size,)}


ROUTERS["variance"] = VarianceRouter


if __name__ == "__main__":
    run_recipe("s_lora", argv=["--router", "variance", *sys.argv[1:]])
