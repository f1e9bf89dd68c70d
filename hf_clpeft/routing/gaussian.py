"""Streaming linear discriminant analysis: Gaussian classes with one shared covariance."""

from typing import ClassVar, Self

import torch

from .classes import ClassRouter
from .covariance import factorize, leave_one_out, mean_square, shrink, shrinkage, unpack_triangle
from .few import bonus
from .routing import State, count, distances_to
from .typicality import PERCENT, SAME, Metric, cross_fit, fit_thresholds, p_values


# Variance of images along the way to a new class, relative to what the covariance says of it: the least at which
# held-out training images of four benchmarks lose at most `LOST`.
ALONG = 2
LEFT = 0.3  # least share of the freedom that is thought to be left


class GaussianRouter(ClassRouter):
    """Routes an image to the task of its likeliest class; classes are Gaussians with one shared covariance.

    For each task, the router stores the scatter matrix within its classes, a sum over images, as a factor F and the
    variances that F lacks: `F.T @ F + diag(rest)`. So tasks add up exactly, and removing one gives bit for bit the
    router that never knew it. The covariance is shrunk towards a multiple of the identity by oracle approximating
    shrinkage, which has no hyperparameter.

    While `learns_few` is true, classes that are learnt are marked as known from a few images. They are favoured over
    all others as [`bonus`] says, and leave the covariance as it is.

    Args:
        query_size (`int`): Width of query features.
        covariance_rank (`int`, *optional*): Most rows of a task's factor; the largest principal components are kept.
            Default: no limit, which stores at most the triangle of the scatter matrix.

    Source: streaming LDA, arXiv 1909.01520; shrinkage: Chen et al., arXiv 0907.4698, equation 23.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing import GaussianRouter

    >>> generator = torch.Generator().manual_seed(0)
    >>> long = torch.tensor([[0.1, 1.0, 1.0]])  # all classes vary much in one direction
    >>> noise = 0.1 * torch.randn(200, 3, generator=generator) * torch.tensor([[0.0, 1.0, 5.0]])
    >>> router = GaussianRouter(query_size=3)
    >>> router.learn(torch.tensor([[9.0, 1.0, 0.0]]) + noise, classes=torch.zeros(200, dtype=torch.int64))
    >>> router.learn(torch.tensor([[9.0, -1.0, 0.0]]) + noise, classes=torch.ones(200, dtype=torch.int64))
    >>> router(torch.tensor([[9.0, 0.5, 4.0], [9.0, -0.5, 4.0]])).selection.tolist()
    [0, 1]

    ```
    """

    title = "Gaussian per class, one covariance"
    gives_likelihoods = rejects = True
    options: ClassVar[tuple[str, ...]] = ("covariance_rank",)
    few: torch.Tensor
    scatter: torch.Tensor
    factors: torch.Tensor
    ranks: torch.Tensor
    rests: torch.Tensor
    thresholds: torch.Tensor
    _whitening: torch.Tensor
    _centres: torch.Tensor

    def __init__(self, query_size: int, covariance_rank: int | None = None):
        super().__init__(query_size)
        self.covariance_rank = covariance_rank
        nothing = torch.zeros(0, 0, dtype=torch.float32)
        self.register_buffer("few", torch.zeros(0, dtype=torch.int64))  # 1 for an entry of few images
        self.register_buffer("scatter", nothing)  # of the tasks of a model whose file has one sum for all
        self.register_buffer("factors", nothing.clone())  # of all tasks, one below the other
        self.register_buffer("ranks", torch.zeros(0, dtype=torch.int64))  # rows of each task
        self.register_buffer("rests", nothing.clone())
        self.register_buffer("thresholds", torch.zeros(0, PERCENT, dtype=torch.float32))  # zeros if not measured
        self.register_buffer("_whitening", nothing.clone(), persistent=False)
        self.register_buffer("_centres", nothing.clone(), persistent=False)
        self.register_buffer("_bonus", None, persistent=False)  # of every entry, if there are any of few images
        self._sum, self._summed = torch.zeros(0, 0), list[int]()  # over which tasks with a factor
        self._metrics: dict[int, tuple[torch.Tensor, Metric, torch.Tensor]] = {}  # of the tasks

    @property
    def num_features(self) -> int:
        """Width of the features that the Gaussians are of."""
        return self.query_size

    def scores(self, query: torch.Tensor) -> torch.Tensor:
        distances = distances_to(self._centres, self._whiten(query))
        return -(distances**2) / 2 if self._bonus is None else (self._bonus - distances**2 / 2).clamp(max=0)

    def class_scores(self, scores: torch.Tensor) -> torch.Tensor:
        return log_sum_exp(scores, self.classes, self.num_classes)

    def to_distances(self, scores: torch.Tensor) -> torch.Tensor:
        return (-2 * scores).sqrt()

    def add_sums(self, features: torch.Tensor, residuals: torch.Tensor, entries: torch.Tensor) -> None:
        self.add_scatter(torch.nn.functional.normalize(features, dim=-1), residuals, entries)
        self.derive()

    def add_scatter(self, features: torch.Tensor, residuals: torch.Tensor, entries: torch.Tensor) -> None:
        """Stores the scatter matrix of a task, and the thresholds of its distances.

        Args:
            features (`torch.Tensor` of shape `(images, views, num_features)`, `float64`): What the Gaussians are of.
            residuals (`torch.Tensor` of the same shape): Features minus the mean of their entry.
            entries (integer `torch.Tensor` of shape `(images,)`): Entry of each image.
        """
        factor, rest = factorize(residuals, self.covariance_rank)
        rank = torch.tensor([len(factor)])
        thresholds = torch.zeros(PERCENT)
        if self.measures:
            variance = residuals.square().sum() / residuals.shape[1] / max(1, len(residuals) - count(entries))
            thresholds = self._fit_thresholds(features, entries, variance)
        self._append({"factors": factor, "ranks": rank, "rests": rest[None], "thresholds": thresholds[None]})
        self._append({"few": torch.full((count(entries),), int(self.learns_few))})

    def leave_one_out(
        self, features: torch.Tensor, classes: torch.Tensor, views: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        place = self.place(features.numel())
        numbers, entries = classes.to(place).unique(return_inverse=True)
        known, counts = torch.cat([self.classes.to(place), numbers]), entries.bincount()
        kept = counts[entries] > 1
        if type(self).scores is not GaussianRouter.scores or len(known.unique()) < 2 or not kept.any():
            return None
        lifted = self._lift(features if features.dim() == 3 else features[:, None]).to(place, torch.float64)
        sums = lifted.new_zeros(len(numbers), self.num_features).index_add(0, entries, lifted.mean(dim=1))
        means = sums / counts[:, None]
        residuals = lifted - means[entries, None]
        summed = self._well_known()
        freedom = max(1, int(self.counts[summed].sum() + counts.sum()) - int(summed.sum()) - len(counts))
        covariance = (self.sum_up().to(place) + mean_square(residuals)) / freedom
        triangle = torch.linalg.cholesky(shrink(covariance, freedom, self.query_size))
        weight, _ = shrinkage(covariance.trace(), (covariance**2).sum(), freedom, self.query_size)
        centres = torch.cat([self._means.to(means).reshape(-1, self.num_features), means])
        centres = torch.linalg.solve_triangular(triangle, centres.T, upper=False).T
        flat = torch.linalg.solve_triangular(triangle, residuals.flatten(0, 1).T, upper=False).T
        scores = leave_one_out(
            flat.unflatten(0, residuals.shape[:2]), centres, len(self.classes) + entries, (1 - weight) / freedom, views
        )
        return log_sum_exp(scores[kept], known, count(known)).cpu(), classes.to(place)[kept].cpu()

    def spreads(self, origins: torch.Tensor | None = None) -> torch.Tensor:
        centres, owners = self._centres.cpu().double(), self.owners.cpu()
        centres = centres - centres.mean(dim=0)
        # Of all classes up to a task: their number, and the sums of their means and of the squares of these.
        rows = torch.cat([torch.ones(len(centres), 1), centres.square().sum(dim=1, keepdim=True), centres], dim=1)
        sums = rows.new_zeros(self.num_owners + 1, rows.shape[1]).index_add(0, owners + 1, rows).cumsum(dim=0)
        start = sums[0] if origins is None else sums[origins.cpu()]
        (squares, pairs), (old_squares, old_pairs) = (_between(part - start) for part in (sums[1:], sums[:-1]))
        return (squares - old_squares) / (pairs - old_pairs).clamp(min=1)

    def merge_sums(self, other: Self) -> None:
        if len(other.scatter):
            # Tasks with one sum for all come first: those that are here join them.
            total = other.scatter.to(self._sum) + (self._sum if len(self._sum) else 0)
            self.scatter, self._summed = total.to(self.scatter), []
            for name in ("factors", "ranks", "rests", "thresholds"):
                setattr(self, name, getattr(self, name)[:0])
        self._append({name: getattr(other, name) for name in ("few", "factors", "ranks", "rests", "thresholds")})
        self.derive()

    def remove(self, owner: int, number_of: dict[int, int]) -> None:
        place = owner - (self.num_owners - len(self.ranks))  # tasks with one sum for all come first
        few = self.few[self.owners != owner]
        super().remove(owner, number_of)
        blocks = list(self.factors.split(self.ranks.tolist()))
        del blocks[place]
        kept = torch.arange(len(self.ranks), device=self.ranks.device) != place
        self.factors = torch.cat([self.factors[:0], *blocks])
        self.ranks, self.rests, self.thresholds = self.ranks[kept], self.rests[kept], self.thresholds[kept]
        self.few, self._summed = few, []
        self.derive()

    def why_not_removed(self, owner: int) -> str | None:
        adds, removes = type(self).add_sums is GaussianRouter.add_sums, type(self).remove is GaussianRouter.remove
        if removes and not adds:
            return f"{type(self).__name__} adds sums of its own, and does not implement `remove`"
        pooled = self.num_owners - len(self.ranks)
        return None if owner >= pooled else "it was saved when the sums of all tasks were one"

    def split(self, tasks: list[list[int]]) -> tuple[State, list[State]]:
        state, pooled = self.state_dict(), self.num_owners - len(self.ranks)
        apart = {"few", "factors", "ranks", "rests", "thresholds"}
        if not len(self.ranks):  # as it was read, or new
            return {name: tensor for name, tensor in state.items() if name not in apart}, []
        blocks, parts = self.factors.split(self.ranks.tolist()), list[State]()
        for owner, numbers in enumerate(tasks):
            own = self.owners == owner
            part = {name: state[name][own] for name in self.of_entries}
            part["classes"] = torch.tensor([numbers.index(number) for number in self.classes[own].tolist()])
            if self.few[own].any():
                part["few"] = self.few[own]
            if owner >= pooled:
                block = blocks[owner - pooled]
                rows, columns = torch.triu_indices(*block.shape)
                part |= {"factor": block[rows, columns], "rank": self.ranks[owner - pooled]}
                part |= {"rest": self.rests[owner - pooled], "thresholds": self.thresholds[owner - pooled]}
            parts.append(part)
        apart |= {*self.of_entries, "owners", "classes"} | (set() if pooled else {"scatter"})
        return {name: tensor for name, tensor in state.items() if name not in apart}, parts

    def join(self, shared: State, parts: list[State], tasks: list[list[int]]) -> State:
        if not parts:  # of a model whose file has one sum for all
            return {**self.state_dict(), "few": torch.zeros_like(shared.get("owners", self.owners)), **shared}
        columns = dict[str, list[torch.Tensor]]()
        for owner, (part, numbers) in enumerate(zip(parts, tasks, strict=True)):
            pooled = {*self.of_entries, "classes"}
            if part.keys() - {"few"} not in (pooled, pooled | {"factor", "rank", "rest", "thresholds"}):
                raise ValueError(f"the sums of task {owner} are {sorted(part)}.")
            places = part["classes"]
            if places.dim() != 1 or not ((places >= 0) & (places < len(numbers))).all():
                raise ValueError(f"the sums of task {owner} are of other classes than its own.")
            found = {name: part[name] for name in self.of_entries}
            found["classes"] = torch.tensor(numbers)[places]
            found["owners"], found["few"] = torch.full_like(places, owner), part.get("few", torch.zeros_like(places))
            if "factor" in part:
                found["factors"] = unpack_triangle(part["factor"], part["rank"], self.num_features)
                found["ranks"] = part["rank"].reshape(1)
                found |= {"rests": part["rest"].reshape(1, -1), "thresholds": part["thresholds"].reshape(1, -1)}
            for name, tensor in found.items():
                columns.setdefault(name, []).append(tensor)
        try:
            return {**self.state_dict(), **shared, **{name: torch.cat(found) for name, found in columns.items()}}
        except RuntimeError as error:
            raise ValueError(f"the sums of its tasks do not fit together: {error}") from error

    def shapes(self, entries: int) -> dict[str, tuple[int, ...]]:
        return {}

    def check(self, tensors: dict[str, torch.Tensor], num_tasks: int, num_classes: int) -> None:
        super().check(tensors, num_tasks, num_classes)
        width, ranks = self.num_features, tensors["ranks"]
        total = int(ranks.clamp(0, width).sum())
        wanted = {"factors": (total, width), "rests": (len(ranks), width), "thresholds": (len(ranks), PERCENT)}
        for name, shape in {**wanted, "scatter": (width, width)}.items():
            empty = not tensors[name].numel() and (name == "scatter" or not len(ranks))
            if tensors[name].shape != shape and not empty:
                raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, not {shape}.")
        if tensors["few"].shape != tensors["owners"].shape or not torch.isin(tensors["few"], torch.arange(2)).all():
            raise ValueError("few is not 0 or 1 for every class.")
        if ranks.dim() != 1 or not ((ranks >= 0) & (ranks <= width)).all():
            raise ValueError(f"a factor has fewer than 0 rows, or more than {width}.")
        if len(ranks) > num_tasks or (len(ranks) < num_tasks and not tensors["scatter"].numel()):
            raise ValueError(f"it has the sums of {len(ranks)} tasks, but the model has {num_tasks}.")
        if (tensors["scatter"].diagonal() < 0).any() or (tensors["rests"] < 0).any():
            raise ValueError("it has variances below 0.")

    def calibrated(self) -> list[bool] | None:
        pooled = self.num_owners - len(self.ranks)
        return pooled * [False] + self.once("thresholds", lambda thresholds: (thresholds[:, 0] > 0).tolist())

    def typicality(self, query: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
        """The p-value of the nearest task, by Mahalanobis distances to its classes under its own covariance."""
        features = self._lift(query if query.dim() == 2 else query[:, 0])
        # One copy to the CPU, where every task's images are measured with its own metric.
        features, nearest = (
            torch.cat([features, distances.argmin(dim=1)[:, None]], dim=1)
            .cpu()
            .split_with_sizes([self.num_features, 1], dim=1)
        )
        features, nearest, found = features.double(), nearest[:, 0].long(), torch.zeros(len(features))
        for owner in nearest.unique().tolist():
            if owner not in self._metrics:
                self._metrics[owner] = self._metric_of(owner)
            means, metric, thresholds = self._metrics[owner]
            far = metric.squared(features[nearest == owner][:, None] - means).amin(dim=1)
            found[nearest == owner] = p_values(far.sqrt(), thresholds)
        return found.to(distances, non_blocking=True)

    def _metric_of(self, owner: int) -> tuple[torch.Tensor, Metric, torch.Tensor]:
        """Means, metric and thresholds of a task, `float64`, on the CPU."""
        own, place = (self.owners == owner).cpu(), owner - (self.num_owners - len(self.ranks))
        block, rest = self.factors.split(self.ranks.tolist())[place].cpu().double(), self.rests[place].cpu().double()
        freedom = int(self.counts.cpu()[own].sum()) - int(own.sum())
        return (
            self._means.cpu()[own].double(),
            self._metric(block, rest, freedom),
            self.thresholds[place].cpu().double(),
        )

    def _fit_thresholds(self, features: torch.Tensor, entries: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        """Thresholds of shape `(100,)`, from distances of images held out of means and covariance.

        The mean of n images is nearer to a new one than that of fewer, by √((1 + 1/n) / (1 + 1/fewer)). None is below
        what `SAME` is under the task's own `variance`, of all directions together.
        """

        def distances(fitted: torch.Tensor, held_out: torch.Tensor) -> torch.Tensor:
            known, places = entries[fitted].unique(return_inverse=True)
            sizes = places.bincount(minlength=len(known))
            sums = features.new_zeros(len(known), self.num_features).index_add(0, places, features[fitted].mean(dim=1))
            means = sums / sizes[:, None]
            factor, rest = factorize(features[fitted] - means[places, None], self.covariance_rank)
            metric = self._metric(factor, rest, len(fitted) - len(known))
            nearer = (1 + 1 / entries.bincount()[known]) / (1 + 1 / sizes)
            return (metric.squared(features[held_out, :1] - means) * nearer).amin(dim=1).sqrt()

        values = cross_fit(entries, distances) if len(entries) > count(entries) else torch.zeros(0)
        values = values[values.isfinite()]
        if len(values) < 2:
            return torch.zeros(PERCENT)
        scale = (variance / self.num_features).clamp(min=self._least_variance) if variance > 0 else torch.ones(())
        return torch.from_numpy(fit_thresholds(values.double().numpy())).clamp(min=SAME / float(scale.sqrt()))

    @property
    def _least_variance(self) -> float:
        """In one direction, that of rounding, which is all by which copies of one image vary."""
        return SAME**2 / self.num_features

    def _metric(self, factor: torch.Tensor, rest: torch.Tensor, freedom: int) -> Metric:
        """Metric of the shrunk covariance of a task."""
        freedom, gram = max(1, freedom), factor @ factor.T
        trace = gram.trace() + rest.sum()
        squares = (gram**2).sum() + 2 * (factor.square().sum(dim=0) * rest).sum() + (rest**2).sum()
        weight, scale = shrinkage(trace / freedom, squares / freedom**2, freedom, self.query_size)
        diagonal = (1 - weight) / freedom * rest + weight * scale.clamp(min=self._least_variance)
        return Metric.of(factor * ((1 - weight) / freedom) ** 0.5, diagonal)

    def derive(self) -> None:
        self._metrics = {}
        whitening = torch.linalg.inv(self._factor()).T
        self._whitening = whitening.to(self.prototypes)
        self._centres = (self.prototypes.to(whitening) @ whitening).to(self.prototypes)
        self._bonus = self._favour()

    def _favour(self) -> torch.Tensor | None:
        """The bonus of every entry; `None` if none has any."""
        few = self.few.bool()
        if not 0 < int(few.sum()) < len(few):
            return None
        freedom, covariance = self._freedom(), self._covariance()
        weight, _ = shrinkage(covariance.trace(), (covariance**2).sum(), freedom, self.query_size)
        precision = torch.cholesky_inverse(self._factor())
        noise = (1 - weight) * (precision * covariance).sum()
        single = (1 - weight) * (precision.diagonal() * self.rests[self._summed].sum(dim=0).to(precision)).sum()
        far = torch.cdist(self._centres[few].double(), self._centres[~few].double()).square().cpu()
        # Directions that were computed from the sums are those in which just these images vary little: others vary
        # more, by the share of the freedom that the directions leave. Many views may have more of them than that.
        left = (1 - (noise - single / freedom) / freedom).clamp(min=LEFT).cpu()
        counts = self.counts[~few].cpu()
        middle, spread = far / 2 - noise.cpu() / counts, (ALONG * far).sqrt() / left
        favour = torch.zeros(len(few))
        favour[few.cpu()] = torch.tensor([bonus(*pair, counts, len(far)) for pair in zip(middle, spread, strict=True)])
        return favour.to(self._centres)

    def _factor(self) -> torch.Tensor:
        """Cholesky factor of the shrunk covariance, `float64`; see [`~ClassRouter.place`]."""
        return torch.linalg.cholesky(shrink(self._covariance(), self._freedom(), self.query_size))

    def _covariance(self) -> torch.Tensor:
        return self.sum_up() / self._freedom()

    def _freedom(self) -> int:
        """Degrees of freedom of the sums."""
        known = self._well_known()
        return max(1, int(self.counts[known].sum()) - int(known.sum()))

    def _well_known(self) -> torch.Tensor:
        """Whether the images of an entry are in the sums: those of few images are not, unless there are no others."""
        few = self.few.bool()
        return torch.ones_like(few) if few.all() else ~few

    def sum_up(self) -> torch.Tensor:
        """The scatter matrix of all tasks but those of few images, `float64`; in their order, for the same bits."""
        place, width, pooled = self.place(), self.num_features, self.num_owners - len(self.ranks)
        owners = self.owners[self._well_known()].unique() - pooled
        places = owners[owners >= 0].tolist()
        if not self._summed or self._summed != places[: len(self._summed)]:
            self._sum = self.scatter.double() if len(self.scatter) else torch.zeros(width, width).double()
            self._summed = []
        self._sum = self._sum.to(place)
        blocks = self.factors.split(self.ranks.tolist())
        for task in places[len(self._summed) :]:
            factor, rest = blocks[task].to(self._sum), self.rests[task].to(self._sum)
            self._sum = self._sum + factor.T @ factor + rest.diag()
        self._summed = places
        return self._sum

    def _whiten(self, query: torch.Tensor) -> torch.Tensor:
        return self._lift(query) @ self._whitening

    @property
    def _means(self) -> torch.Tensor:
        """Means of the Gaussians, of shape `(entries, num_features)`."""
        return self.prototypes

    def _lift(self, query: torch.Tensor) -> torch.Tensor:
        """What the Gaussians are of, from query features."""
        return torch.nn.functional.normalize(query.to(self.prototypes), dim=-1)


def _between(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over all pairs of points of their squared distance, and the number of pairs."""
    count, squares, totals = sums[:, 0], sums[:, 1], sums[:, 2:]
    return count * squares - totals.square().sum(dim=1), count * (count - 1) / 2


def log_sum_exp(scores: torch.Tensor, groups: torch.Tensor, count: int) -> torch.Tensor:
    """Log-sum-exp over groups of columns.

    Args:
        scores (`torch.Tensor` of shape `(batch, columns)`): May hold −inf.
        groups (integer `torch.Tensor` of shape `(columns,)`): Group of each column.
        count (`int`): Number of groups.

    Returns:
        `torch.Tensor` of shape `(batch, groups)`.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing.gaussian import log_sum_exp

    >>> log_sum_exp(torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([0, 0, 1]), count=2).exp()
    tensor([[2., 0.]])

    ```
    """
    groups = groups.expand_as(scores)
    largest = scores.new_full((scores.shape[0], count), -torch.inf)
    largest = largest.scatter_reduce(1, groups, scores, reduce="amax")
    finite = largest.nan_to_num(neginf=0.0)
    sums = torch.zeros_like(largest).scatter_add(1, groups, (scores - finite.gather(1, groups)).exp())
    return sums.log() + finite
