"""Routers on the first task's expert that do their sums where the backbone is, for whole data sets on a GPU.

Why: a lift to thousands of random features (RanPAC, KLDA) was worse than LDA of four depths on 1,200 to 2,000 images,
and may be better on many. Scatter matrices of 80,000 views with 10,000 numbers each take hours on a CPU. Accuracies
are those of `closed_form_first`; neither rejection nor confidence is measured.
"""

from dataclasses import dataclass

import torch

from hf_clpeft import METHODS
from hf_clpeft.methods.klda import KernelOptions
from hf_clpeft.routing import GaussianRouter, KldaRouter, LinearRidgeRouter, RidgeRouter
from hf_clpeft.routing.covariance import factorize, mean_square
from hf_clpeft.routing.ridge import choose_penalty
from hf_clpeft.routing.routing import count
from hf_clpeft.routing.typicality import PERCENT


class ScatterOnDevice:
    """A Gaussian router whose covariances are factorised on its device."""

    def add_scatter(self, features, residuals, entries):
        factor, rest = factorize(residuals.to(self.prototypes.device), self.covariance_rank)
        ranks, thresholds = torch.tensor([len(factor)]), torch.zeros(1, PERCENT)
        self._append({"factors": factor, "ranks": ranks, "rests": rest[None], "thresholds": thresholds})
        self._append({"few": torch.zeros(count(entries), dtype=torch.int64)})


class RidgeOnDevice:
    """A ridge router that chooses its penalty and is solved on its device."""

    def derive(self):
        if len(self.moments):
            gram = self.gram.double()
            rounding = torch.finfo(self.gram.dtype).eps * gram.trace().item()
            gram.diagonal().add_(max(self.penalty.item(), rounding))
            self._weights = torch.linalg.solve(gram, self.moments.double().T).T.to(self.gram)

    def _add(self, hidden, targets):
        self._add_gram(mean_square(hidden))
        self.penalty = self.penalty.new_tensor(choose_penalty(hidden.double(), targets.double()))


class Gaussian(ScatterOnDevice, GaussianRouter):
    pass


class Klda(ScatterOnDevice, KldaRouter):
    pass


class LinearRidge(RidgeOnDevice, LinearRidgeRouter):
    pass


class Ridge(RidgeOnDevice, RidgeRouter):
    pass


ROUTERS = {"gaussian": Gaussian, "klda": Klda, "linear_ridge": LinearRidge, "ridge": Ridge}


class OnDevice(METHODS["closed_form_first"], name="on_device"):
    title = "Closed form after first-session adaptation, on the device"

    @dataclass
    class Config(METHODS["closed_form_first"].Config, KernelOptions):
        pass

    def __init__(self, backbone, config):
        super().__init__(backbone, config)
        self.router = ROUTERS[self.options.router](self.query_size).configure(self.options)
        self.confidence = None
