"""Calibrated confidence: how to turn scores of classes into probabilities, from losses on held-out images.

Scores are divided by a temperature, and a share of the probability goes to all classes alike, for images that look
like none of them in particular. For every pair of a grid, a task adds up the loss of its held-out images among the
classes known by then: a sum, as everything else that a router stores. No image is needed later. Temperature scaling:
Guo et al., arXiv 1706.04599.

Before, scores are given longer tails, as some images are noisier than others: one temperature for all would be too
sure of photos, which lie far from every class, and not sure enough of sketches, which lie near.

What was measured early is brought up to date in two ways. Distances between the same classes change while the
covariance becomes better known, and scores and temperatures change with them. And among few classes there is less to
be mistaken about, so that a task counts by how many were known.
"""

import torch


TEMPERATURES = 2.0 ** (torch.arange(-16, 21, dtype=torch.float64) / 2)
SHARES = torch.tensor([0.0, 0.01, 0.03, 0.1, 0.2, 0.4], dtype=torch.float64)
GRID = len(TEMPERATURES) * len(SHARES)
# Sums of losses that differ by less tell no temperature from another. If all of n images are right, what is as unsure
# as this allows expects half a mistake among them, about as the estimate of Krichevsky and Trofimov does.
UNCLEAR = 0.5


def lengthen_tails(scores: torch.Tensor, width: int) -> torch.Tensor:
    """Log-likelihoods under a Student's t distribution, in the place of a Gaussian.

    A squared distance d² counts as `width · log(1 + d² / width)`. So the scale of the noise is no longer the same for
    all images: it is unknown, was guessed from as many numbers as an image has, and follows from the image as well.

    Args:
        scores (`torch.Tensor`): Log-likelihoods, −d²/2. May hold −inf. Where they are above 0, they stay.
        width (`int`): Number of features; 0: scores stay as they are.

    Returns:
        `torch.Tensor` of the same shape, in the same order.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing.confidence import lengthen_tails

    >>> lengthen_tails(torch.tensor([-1.0, -500.0, -1000.0]), width=1000).round()
    tensor([  -1., -347., -549.])

    ```
    """
    if not width:
        return scores
    return scores.clamp(min=0) - width / 2 * torch.log1p(scores.clamp(max=0) * (-2 / width))


def losses_on_grid(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sums over images of the negative log-likelihood, for every temperature and every share.

    Args:
        scores (`torch.Tensor` of shape `(images, classes)`, `float64`): May hold −inf.
        targets (integer `torch.Tensor` of shape `(images,)`): Class index of each image.

    Returns:
        `torch.Tensor` of shape `(222,)`: 37 temperatures from 2⁻⁸ to 2¹⁰, times 6 shares from 0 to 0.4.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing.confidence import best_on_grid, losses_on_grid

    >>> scores = 6 * torch.randn(5_000, 4, generator=torch.Generator().manual_seed(0)).double()
    >>> drawn = (scores / 2).softmax(dim=1).cumsum(dim=1)  # classes are half as sure as the scores say
    >>> targets = (drawn < torch.rand(5_000, 1, generator=torch.Generator().manual_seed(1))).sum(dim=1)
    >>> temperature, share = best_on_grid(losses_on_grid(scores, targets))
    >>> round(temperature, 1), share
    (2.0, 0.0)

    ```
    """
    apart = scores.shape[1]
    found = []
    for temperature in TEMPERATURES:
        logs = (scores / temperature).log_softmax(dim=1).gather(1, targets[:, None])
        found.append([-log_probabilities_of(logs, float(share), apart).sum() for share in SHARES])
    return torch.tensor(found, dtype=torch.float64).flatten()


def best_on_grid(losses: torch.Tensor) -> tuple[float, float]:
    """The temperature and the share of the least loss; the temperature between the grid's by a parabola.

    A few images that are all right would like the lowest temperature there is, and be sure beyond all measure. So if
    that is no worse than the best by more than half a nat, the highest one of which that holds is taken.

    Args:
        losses (`torch.Tensor` of shape `(222,)`): From [`losses_on_grid`], or sums of them. If all are zero, nothing
            is known, and scores stay as they are.

    Returns:
        `tuple[float, float]`
    """
    if not losses.any():
        return 1.0, 0.0
    table = losses.reshape(len(TEMPERATURES), len(SHARES)).double()
    place, column = divmod(int(table.argmin()), len(SHARES))
    alike = table[:, column] <= table[place, column] + UNCLEAR
    if alike[0]:
        return float(TEMPERATURES[alike].max()), float(SHARES[column])
    step = 0.0
    if 0 < place < len(TEMPERATURES) - 1:
        below, here, above = table[place - 1 : place + 2, column].tolist()
        bend = below - 2 * here + above
        step = (below - above) / (2 * bend) if bend > 1e-9 * here else 0.0
    return float(TEMPERATURES[place]) * 2 ** (step / 2), float(SHARES[column])


def at_other_temperatures(losses: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Losses of scores that are so many times as large by now, as are the temperatures that suit them.

    Args:
        losses (`torch.Tensor` of shape `(tasks, 222)`, `float64`): From [`losses_on_grid`].
        factors (`torch.Tensor` of shape `(tasks,)`, `float64`): More than 0.

    Returns:
        `torch.Tensor` of shape `(tasks, 222)`. The loss at a temperature τ is what it was at τ / factor.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing.confidence import at_other_temperatures, best_on_grid, losses_on_grid

    >>> scores = 6 * torch.randn(5_000, 4, generator=torch.Generator().manual_seed(0)).double()
    >>> losses = losses_on_grid(scores, scores.softmax(dim=1).multinomial(1).flatten())[None]
    >>> later = at_other_temperatures(losses, torch.tensor([1.3]).double())
    >>> ratio = best_on_grid(later[0])[0] / best_on_grid(losses[0])[0]
    >>> 1.2 < ratio < 1.4
    True

    ```
    """
    table, last = losses.reshape(len(losses), len(TEMPERATURES), len(SHARES)), len(TEMPERATURES) - 1
    places = torch.arange(last + 1) - 2 * factors.log2()[:, None]  # of the grid, whose steps are half octaves
    below = places.floor().clamp(0, last - 1).long()
    above = (places - below).clamp(0, 1)[..., None]
    tasks = torch.arange(len(losses))[:, None]
    return ((1 - above) * table[tasks, below] + above * table[tasks, below + 1]).flatten(1)


def plain_temperature(width: int) -> float:
    """A temperature for scores of which none were measured: √width / 8, a rule of thumb.

    Differences of squared distances grow with the number of features. Of SLDA++ on four benchmarks, with 1,536
    features, the fitted temperatures are 2.2, 4.4, 5.5 and 6.5; this one is 4.9.

    Args:
        width (`int`): Number of features, as for [`lengthen_tails`]; 0: not known.

    Example:

    ```py
    >>> from hf_clpeft.routing.confidence import plain_temperature

    >>> round(plain_temperature(1536), 1), plain_temperature(0)
    (4.9, 1.0)

    ```
    """
    return width**0.5 / 8 if width else 1.0


def calibrate(scores: torch.Tensor, temperature: float, share: float) -> torch.Tensor:
    """Log-probabilities of classes; their order is that of the scores.

    Args:
        scores (`torch.Tensor` of shape `(batch, classes)`): May hold −inf.
        temperature (`float`), share (`float`): From [`best_on_grid`].

    Returns:
        `torch.Tensor` of shape `(batch, classes)`.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing.confidence import calibrate

    >>> calibrate(torch.tensor([[100.0, 0.0]]), temperature=10.0, share=0.1).exp()
    tensor([[0.9500, 0.0500]])

    ```
    """
    return log_probabilities_of((scores / temperature).log_softmax(dim=1), share, scores.shape[1])


def log_probabilities_of(logs: torch.Tensor, share: float, classes: int) -> torch.Tensor:
    """Gives a share of the probability to all classes alike."""
    return logs if share == 0 else ((1 - share) * logs.exp() + share / classes).log()
