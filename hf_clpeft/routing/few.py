"""Classes that are known from a few images only, beside classes of many: how much to favour them."""

import torch


LOST = 0.01  # of images of well-known classes; up to 2.5 times as many in fact, as they are no perfect Gaussians
WIDE = 3  # variance of images along the way to another thing, relative to that of an average direction


def bonus(middle: torch.Tensor, spread: torch.Tensor, counts: torch.Tensor, among: int = 1) -> float:
    """What is added to the score of a class of few images, so that it can win against classes of many.

    The mean of five images lies far from a sixth one, above all along directions in which classes of many images do
    not vary, and where variances are therefore small. So new images of the class nearly always lose. The bonus makes
    up for it, as far as the well-known classes can afford: the largest by which `LOST` of their images would be taken,
    if they are normally distributed. No image is needed for that. All classes of few images share what may be taken,
    as ten of them would else take ten times as much.

    Args:
        middle (`torch.Tensor` of shape `(classes,)`): By how much images of each well-known class are expected to be
            nearer to it than to the new one.
        spread (`torch.Tensor` of shape `(classes,)`): Standard deviation of that.
        counts (`torch.Tensor` of shape `(classes,)`): Their numbers of images.
        among (`int`, *optional*, defaults to 1): Number of classes of few images.

    Returns:
        `float`: 0 or more.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing.few import bonus

    >>> round(bonus(torch.tensor([50.0]), torch.tensor([10.0]), torch.tensor([1000])), 1)
    26.7
    >>> round(bonus(torch.tensor([0.5]), torch.tensor([1.0]), torch.tensor([1000])), 1)  # too near
    0.0

    ```
    """
    middle, spread, counts = middle.double(), spread.double().clamp(min=1e-9), counts.double()

    def lost(by: torch.Tensor) -> torch.Tensor:
        return (counts * torch.special.ndtr((by - middle) / spread)).sum() / counts.sum()

    low, high = middle.new_tensor(0.0), middle.max().clamp(min=0)
    most = lost(low) + LOST / among  # what is lost anyway, as all of a class of one image, is no cost of a bonus
    for _ in range(50):  # halved until it is known to the last bit
        half = (low + high) / 2
        low, high = (half, high) if lost(half) <= most else (low, half)
    return float(low)


def metric_of(prototypes: torch.Tensor, owners: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """A metric in which directions count less, the more well-known tasks vary in them.

    Prototypes of a task are spread as its images are, but for what lies between an image and its nearest prototype.

    Args:
        prototypes (`torch.Tensor` of shape `(prototypes, query_size)`): Those of well-known tasks.
        owners (integer `torch.Tensor` of shape `(prototypes,)`): Task of each.
        variance (scalar `torch.Tensor`): Of images about their nearest prototype, in an average direction.

    Returns:
        `torch.Tensor` of shape `(query_size, query_size)`, symmetric: the identity, if no task has two prototypes.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing.few import metric_of

    >>> prototypes = torch.tensor([[3.0, 0.0], [-3.0, 0.0]])
    >>> metric_of(prototypes, torch.tensor([0, 0]), torch.tensor(3.0)).round(decimals=3)
    tensor([[0.5000, 0.0000],
            [0.0000, 1.0000]])

    ```
    """
    same = (owners[:, None] == owners).to(prototypes)
    apart = prototypes - same @ prototypes / same.sum(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(apart.T @ apart / len(apart))
    return vectors @ (variance / (values.clamp(min=0) + variance)).sqrt().diag() @ vectors.T


def favour(prototypes: torch.Tensor, metric: torch.Tensor, few: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """The [`bonus`] of every prototype of few images, in squared distances under [`metric_of`]; 0 for all others."""
    placed, found = prototypes @ metric, torch.zeros_like(prototypes[:, 0])
    for place in few.nonzero()[:, 0].tolist():
        apart = placed[~few] - placed[place]
        spread = 2 * (WIDE * variance).sqrt() * (apart @ metric).norm(dim=1)
        counts = torch.ones(len(apart))  # of a task's images, about as many are near each of its prototypes
        found[place] = bonus(apart.square().sum(dim=1), spread, counts, int(few.sum()))
    return found
