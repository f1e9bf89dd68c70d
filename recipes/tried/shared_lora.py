"""SLDA++ whose adapter goes on learning: one LoRA for all tasks, kept near by distillation, old sums carried over.

Why: joint training adapts features to all classes, and SLDA++ to those of the first task alone. From the second task
on, the adapter is trained further, and the features of the current images are held near to what they were. What is
left of the drift is measured on these images: a ridge map from old to new features moves old means and scatter
matrices (SLDC, arXiv 2511.09926, after SSIAT, arXiv 2403.19979). Its penalty is chosen by leaving classes of the task
out, as old classes are other ones, too.
"""

from dataclasses import dataclass, field

import torch
from torch.nn.functional import cross_entropy, normalize

from hf_clpeft import METHODS, ConfigError
from hf_clpeft.config.checks import check_ranges
from hf_clpeft.methods.closed_form import EXPERT, FirstExpert
from hf_clpeft.methods.heads import Heads
from hf_clpeft.methods.method import Method
from hf_clpeft.routing import GaussianRouter
from hf_clpeft.routing.covariance import mean_square


SldaPp = METHODS["slda_pp"]
PENALTIES = [10.0**power for power in range(-3, 4)]  # as shares of the mean eigenvalue; with the last, nothing moves
FOLDS = 3


class CarriedRouter(GaussianRouter):
    """A Gaussian router whose sums can move. Those of a task are no file of its own, as they change with each task."""

    def carry(self, matrix):
        """Applies a linear map of the features, `(width, width)`. Variances beside a factor stay a diagonal."""
        self.prototypes = (self.prototypes.cpu().double() @ matrix).to(self.prototypes)
        blocks = [factor.cpu().double() @ matrix for factor in self.factors.split(self.ranks.tolist())]
        self.factors = torch.cat([torch.linalg.qr(block).R for block in blocks]).to(self.factors)
        self.rests = (self.rests.cpu().double() @ matrix.square()).to(self.rests)
        self._summed = 0  # they are added up anew

    def split(self, tasks):
        return self.state_dict(), []


class SharedLora(SldaPp, name="shared_lora"):
    title, trains, fixed_query = "SLDA++, one LoRA through all tasks", True, False
    experts = "one LoRA expert that all of them trained"

    @dataclass
    class Config(SldaPp.Config):
        distillation: float = field(
            default=10.0, metadata={"help": "Weight of the squared distance to the features before the task."}
        )
        trained_tasks: int = field(default=10**6, metadata={"help": "First tasks that train the adapter."})

        def __post_init__(self):
            super().__post_init__()
            check_ranges(self, distillation=(0, 1e6), trained_tasks=(1, 10**6))
            if not self.adapt:
                raise ConfigError("adapt=False: shared_lora is all about the adapter; choose slda_pp.")

    def __init__(self, backbone, config):
        super().__init__(backbone, config)
        self.router = CarriedRouter(self.query_size).configure(self.options)
        self.router.measures = False  # old thresholds would be those of other features

    def begin(self, task):
        self.trains = len(self.config.tasks) < self.options.trained_tasks
        if self.trains:
            self.train_expert(EXPERT, Heads(self.backbone.hidden_size, shared=False).start(self.numbers))

    def loss(self, batch):
        if not self.config.tasks:
            return super().loss(batch)
        with torch.no_grad():
            before = self.look(batch.pixels)
        after = self.bank.slot(batch.pixels, self._cut).float()
        # Of unit length each: a layer norm leaves about the root of their number.
        last = self.backbone.hidden_size**0.5 * after[:, -self.backbone.hidden_size :]
        losses = cross_entropy(self._head(last), self.rows(batch.labels), reduction="none")
        drift = normalize(after, dim=-1) - normalize(before, dim=-1)
        return losses + self.options.distillation * drift.square().sum(dim=1)

    def end(self, features_of):
        moves = self.trains and self.config.tasks
        before = self.observe(features_of)[0] if moves else None  # while the bank holds the old adapter
        if self.trains:
            self.bank.finish(EXPERT)
            del self._head
        learnt = self.observe(features_of)
        if before is not None:
            self.router.carry(drift_map(before.to(self.backbone.device), *learnt))
        super(FirstExpert, self).end(lambda *_: learnt)

    def accept(self, giver):
        Method.accept(self, giver)  # as it would take over the first task's expert for every task

    def remove(self, position, number_of):
        Method.remove(self, position, number_of)

    def alike(self):
        return Method.alike(self)


def drift_map(before, after, classes):
    """The linear map from old to new features of unit length, of shape `(width, width)`, by ridge regression.

    Args:
        before, after (`torch.Tensor` of shape `(images, views, width)`): Features of the current images.
        classes (integer `torch.Tensor` of shape `(images,)`): Class of each image.
    """
    before = normalize(before.double(), dim=-1)
    drift = normalize(after.to(before), dim=-1) - before
    _, entries = classes.unique(return_inverse=True)
    folds = [(entries % FOLDS == fold).to(before.device) for fold in range(min(FOLDS, int(entries.max()) + 1))]
    grams = [mean_square(before[fold]) for fold in folds]
    moments = [before[fold].flatten(0, 1).T @ drift[fold].flatten(0, 1) / before.shape[1] for fold in folds]
    gram, moment = sum(grams), sum(moments)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)

    def slope(gram, moment, penalty):
        triangle = torch.linalg.cholesky(gram + penalty * gram.trace() / len(gram) * identity)
        return torch.cholesky_solve(moment, triangle)

    def error(penalty):
        found = 0.0
        for own, of_own in zip(grams, moments, strict=True):
            left_out = slope(gram - own, moment - of_own, penalty)
            found += float((left_out * (own @ left_out)).sum() - 2 * (left_out * of_own).sum())
        return found

    penalty = min(PENALTIES, key=error) if len(folds) > 1 else PENALTIES[len(PENALTIES) // 2]
    return (identity + slope(gram, moment, penalty)).cpu()
