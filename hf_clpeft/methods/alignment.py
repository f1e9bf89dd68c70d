"""Gaussians of all classes seen so far, and the alignment of a head on features sampled from them."""

from collections.abc import Iterable

import torch
from torch.nn.functional import cross_entropy

from ..backbones.precision import KeepsPrecision, without_autocast
from ..config import ConfigError
from ..routing.covariance import shrink
from .heads import Heads, Rows


PRIOR = 0.1  # images of the pooled covariance in that of a class, per dimension
LEAST_STEPS = 100  # of alignment: with few classes, five epochs are too few


class ClassGaussians(KeepsPrecision):
    """A Gaussian for every class of every task, from which features are sampled in place of old images.

    There is one *entry* per class and task: a class that several tasks bring has several.

    A covariance is stored as a factor `F`, with `F @ F.T` the covariance: features are sampled without a
    decomposition, a linear map of the features multiplies it, and no file can hold one that is not a covariance.

    A class often has fewer images than features have dimensions. So its covariance is estimated from its images and
    `m = width / 10` more of the task's pooled covariance: with scatter matrix `S` of `n` images,
    `(S + m * pooled) / (n - 1 + m)`. The pooled covariance is shrunk by [`shrink`]. With many images this is the
    covariance of the class alone. On held-out training images of Caltech-101, 24 images a class, heads aligned on it
    were half a point better than with `m = width`, three points better than with one covariance for all classes, and
    twenty better than with variances alone: so there is no smaller form.

    Args:
        width (`int`): Width of the features.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.methods.alignment import ClassGaussians

    >>> gaussians = ClassGaussians(width=2)
    >>> gaussians.learn(torch.tensor([[0.0, 1.0], [0.0, 3.0], [8.0, 8.0]]), classes=torch.tensor([0, 0, 1]))
    >>> gaussians.means.tolist(), gaussians.counts.tolist()
    ([[0.0, 2.0], [8.0, 8.0]], [2, 1])
    >>> features, classes = gaussians.sample(5, torch.Generator().manual_seed(0))
    >>> features.shape, classes.bincount().tolist()
    (torch.Size([10, 2]), [5, 5])

    ```
    """

    means: torch.Tensor
    factors: torch.Tensor
    counts: torch.Tensor
    owners: torch.Tensor
    classes: torch.Tensor

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.register_buffer("means", torch.zeros(0, width, dtype=torch.float32))
        self.register_buffer("factors", torch.zeros(0, width, width, dtype=torch.float32))
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("owners", torch.zeros(0, dtype=torch.int64))  # task of each entry
        self.register_buffer("classes", torch.zeros(0, dtype=torch.int64))  # class index of each entry

    def __len__(self) -> int:
        return len(self.means)

    @property
    def num_owners(self) -> int:
        """Number of tasks learnt."""
        return int(self.owners.max()) + 1 if len(self) else 0

    @property
    def covariances(self) -> torch.Tensor:
        """Covariances of all entries, of shape `(entries, width, width)`."""
        return self.factors @ self.factors.mT

    def learn(self, features: torch.Tensor, classes: torch.Tensor) -> None:
        """Adds the entries of the next task.

        Args:
            features (`torch.Tensor` of shape `(images, width)`): Features of its training images.
            classes (integer `torch.Tensor` of shape `(images,)`): Class index of each image.
        """
        features = features.detach().cpu().double()
        numbers, entries = classes.cpu().unique(return_inverse=True)
        counts = torch.bincount(entries)
        means = features.new_zeros(len(numbers), self.width).index_add(0, entries, features) / counts[:, None]
        residuals = features - means[entries]
        freedom = max(1, len(features) - len(numbers))
        pooled = shrink(residuals.T @ residuals / freedom, freedom)
        factors, prior = [], self.width * PRIOR
        for entry, count in enumerate(counts.tolist()):
            own = residuals[entries == entry]
            covariance = (own.T @ own + prior * pooled) / (count - 1 + prior)
            factors.append(torch.linalg.cholesky(covariance))
        columns = {"means": means, "factors": torch.stack(factors), "counts": counts, "classes": numbers}
        for name, values in {**columns, "owners": torch.full_like(numbers, self.num_owners)}.items():
            own = getattr(self, name)
            setattr(self, name, torch.cat([own, values.to(own)]))

    def move(self, shifts: torch.Tensor) -> None:
        """Adds a vector to the mean of each entry; `shifts` has shape `(entries, width)`."""
        self.means = self.means + shifts.to(self.means)

    def transform(self, matrix: torch.Tensor) -> None:
        """Applies the linear map `features @ matrix`, of shape `(width, width)`, to means and covariances."""
        matrix = matrix.to(self.means)
        self.means, self.factors = self.means @ matrix, matrix.T @ self.factors

    def sample(self, per_class: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples features, as many of every class, and within a class as many of every entry, up to rounding.

        Args:
            per_class (`int`): Number of features per class.
            generator (`torch.Generator`): Of the CPU.

        Returns:
            Features `(classes * per_class, width)` and class indices `(classes * per_class,)`, on the CPU.
        """
        features, labels = [], []
        means, factors = self.means.cpu(), self.factors.cpu()
        for number in self.classes.unique().tolist():
            own = (self.classes == number).nonzero()[:, 0].tolist()
            for place, entry in enumerate(own):
                count = (per_class + place) // len(own)  # these add up to per_class
                noise = torch.randn(count, self.width, generator=generator)
                features.append(means[entry] + noise @ factors[entry].T)
                labels.append(torch.full((count,), number))
        return torch.cat(features), torch.cat(labels)

    def check(self, num_tasks: int, num_classes: int) -> None:
        """Raises [`ConfigError`] unless there are Gaussians of all tasks and classes of a model; for [`Method.check`].

        Args:
            num_tasks (`int`): Number of tasks of the model.
            num_classes (`int`): Number of its classes.
        """
        entries = {len(tensor) for tensor in self.buffers()}
        owners, classes = self.owners.unique().tolist(), self.classes.unique().tolist()
        if len(entries) > 1 or owners != list(range(num_tasks)) or classes != list(range(num_classes)):
            raise ConfigError(
                f"The class Gaussians are of the tasks {owners[:20]} and the classes {classes[:20]}, but the model "
                f"has {num_tasks} tasks and {num_classes} classes. Every class of a task needs a training image."
            )
        if len(self) and self.counts.min() < 1:
            raise ConfigError("A class Gaussian is of no images.")


class AlignedHeads(Heads):
    """A shared head whose rows are all trained after every task, and so apply to all images.

    That holds for the row of a single-class task, too, which Gaussians of all classes train against the others.

    Args:
        hidden_size (`int`): Size of a feature vector.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.methods.alignment import AlignedHeads

    >>> heads = AlignedHeads(hidden_size=2)
    >>> heads.write(torch.eye(2)[:1], torch.zeros(1), classes=[0], single=True)
    >>> heads.extended(torch.eye(2)[1:], torch.zeros(1), classes=[1]).weight.tolist()
    [[1.0, 0.0], [0.0, 1.0]]

    ```
    """

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, shared=True)

    def extend(self, tasks: Iterable[Rows]) -> None:
        super().extend((weight, bias, classes, False) for weight, bias, classes, _ in tasks)

    def extended(self, weight: torch.Tensor, bias: torch.Tensor, classes: list[int]) -> torch.nn.Linear:
        """A layer for all classes: the given rows for `classes`, and those of this head for all others."""
        layer = self.start(list(range(max(self.num_classes, 1 + max(classes)))))
        with torch.no_grad():
            layer.weight[classes], layer.bias[classes] = weight.to(layer.weight), bias.to(layer.bias)
        return layer


def align(
    head: torch.nn.Module,
    gaussians: ClassGaussians,
    seed: int,
    epochs: int = 5,
    per_class: int = 256,
    learning_rate: float = 0.1,
    temperature: float | None = None,
) -> None:
    """Trains a head of all classes on features sampled from their Gaussians.

    A head whose rows were trained task by task compares old and new classes poorly. New features are sampled in each
    epoch, and a step takes `per_class` of them, so that an epoch has as many steps as there are classes.

    Everything is done on the CPU, where all processes and devices sample the same features.

    Args:
        head (`torch.nn.Module`): Maps features to logits, one per class index; its parameters are trained in place.
        gaussians ([`ClassGaussians`]): Gaussians of all classes.
        seed (`int`): Random seed.
        epochs (`int`, *optional*, defaults to 5): Passes over as many features as are sampled at once; more, if these
            make fewer than 100 steps.
        per_class (`int`, *optional*, defaults to 256): Features per class and epoch.
        learning_rate (`float`, *optional*, defaults to 0.1): Of SGD with momentum 0.9, decayed by a cosine. The
            code of SLCA has 0.01; on held-out training images of Caltech-101 heads were then 2 to 3 points worse.
        temperature (`float`, *optional*): Normalises logits as in SLCA; see [`normalize_logits`]. Default: not.

    Source: SLCA, arXiv 2303.05118; epochs and samples as in its code (GengDavid/SLCA).

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.methods.alignment import ClassGaussians, align

    >>> gaussians, head = ClassGaussians(width=2), torch.nn.Linear(2, 2)
    >>> gaussians.learn(torch.tensor([[0.0, 9.0], [0.0, 7.0]]), classes=torch.tensor([0, 0]))
    >>> gaussians.learn(torch.tensor([[9.0, 0.0], [7.0, 0.0]]), classes=torch.tensor([1, 1]))
    >>> align(head, gaussians, seed=0)
    >>> head(gaussians.means).argmax(dim=1).tolist()
    [0, 1]

    ```
    """
    generator = torch.Generator().manual_seed(seed)
    place = next(head.parameters()).device
    head.to("cpu").requires_grad_(True)
    optimizer = torch.optim.SGD(head.parameters(), lr=learning_rate, momentum=0.9, weight_decay=5e-4)
    classes = len(gaussians.classes.unique())
    epochs = max(epochs, -(-LEAST_STEPS // classes))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * classes)
    groups = _membership(gaussians)
    with torch.enable_grad(), without_autocast(torch.device("cpu")):
        for _ in range(epochs):
            features, labels = gaussians.sample(per_class, generator)
            for rows in torch.randperm(len(labels), generator=generator).split(per_class):
                logits = head(features[rows])
                if temperature is not None:
                    logits = normalize_logits(logits, groups) / temperature
                optimizer.zero_grad()
                cross_entropy(logits, labels[rows]).backward()
                optimizer.step()
                scheduler.step()
    head.to(place)


def normalize_logits(logits: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Divides logits by the mean, over tasks, of the norm of the logits of a task's classes.

    Args:
        logits (`torch.Tensor` of shape `(batch, classes)`): Logits.
        groups (`torch.Tensor` of shape `(tasks, classes)`): 1 for the classes of each task, else 0.

    Returns:
        `torch.Tensor` of shape `(batch, classes)`.

    Source: SLCA, arXiv 2303.05118, as its code has it.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.methods.alignment import normalize_logits

    >>> normalize_logits(torch.tensor([[3.0, 4.0, 1.0]]), torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    tensor([[1.0000, 1.3333, 0.3333]])

    ```
    """
    norms = (logits.square() @ groups.T + 1e-14).sqrt()  # the gradient of a norm of zero is not finite
    return logits / norms.mean(dim=1, keepdim=True)


def _membership(gaussians: ClassGaussians) -> torch.Tensor:
    """Which classes each task has, of shape `(tasks, classes)`."""
    groups = torch.zeros(gaussians.num_owners, int(gaussians.classes.max()) + 1)
    groups[gaussians.owners.cpu(), gaussians.classes.cpu()] = 1.0
    return groups
