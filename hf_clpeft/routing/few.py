"""Classes that are known from a few images only, beside classes of many: how much to favour them."""

import torch


LOST = 0.005  # of images of well-known classes; up to three times as many in fact, as they are no perfect Gaussians


def bonus(far: torch.Tensor, counts: torch.Tensor, dimensions: float, freedom: int, among: int = 1) -> float:
    """What is added to the log-likelihood of a class of few images, so that it can win against classes of many.

    The mean of five images lies far from a sixth one, above all along directions in which classes of many images do
    not vary, and where variances are therefore small. So new images of the class nearly always lose. The bonus makes
    up for it, as far as the well-known classes can afford: the largest by which `LOST` of their images would be taken,
    by the Gaussians that the router has of them. No image is needed for that. All classes of few images share what
    may be taken, as ten of them would else take ten times as much.

    Whether an image of class c is taken depends on its place between the two means alone, which is normally
    distributed. Images that the sums do not hold lie farther from their mean than those in the sums, and vary more
    along any direction that was computed from the sums: by the share of the freedom that the dimensions take.

    Args:
        far (`torch.Tensor` of shape `(classes,)`): Squared Mahalanobis distances of the new mean to those of the
            well-known classes.
        counts (`torch.Tensor` of shape `(classes,)`): Their numbers of images.
        dimensions (`float`): Effective dimensions of the covariance, fewer than `freedom`.
        freedom (`int`): Its degrees of freedom.
        among (`int`, *optional*, defaults to 1): Number of classes of few images.

    Returns:
        `float`: 0 or more.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing.few import bonus

    >>> round(bonus(torch.tensor([100.0]), torch.tensor([1000]), dimensions=10, freedom=1000), 1)
    24.1
    >>> round(bonus(torch.tensor([1.0]), torch.tensor([1000]), dimensions=10, freedom=1000), 1)  # too near
    0.0

    ```
    """
    far, counts = far.double(), counts.double()
    known = 1 - dimensions / freedom
    middle, spread = far / 2 - dimensions / known / counts, (far / known).sqrt().clamp(min=1e-9)

    def lost(by: torch.Tensor) -> torch.Tensor:
        return (counts * torch.special.ndtr((by - middle) / spread)).sum() / counts.sum()

    low, high = far.new_tensor(0.0), middle.max().clamp(min=0)
    most = lost(low) + LOST / among  # what is lost anyway, as all of a class of one image, is no cost of a bonus
    for _ in range(50):  # halved until it is known to the last bit
        half = (low + high) / 2
        low, high = (half, high) if lost(half) <= most else (low, half)
    return float(low)
