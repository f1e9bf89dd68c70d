"""Scatter matrices within classes: summed over views, stored as factors, and shrunk to covariances."""

import torch


ROUNDING = 1e-12  # eigenvalues below this share of the largest are rounding errors


def factorize(residuals: torch.Tensor, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A scatter matrix as a triangular factor of limited rank, and the variances that this lacks.

    Args:
        residuals (`torch.Tensor` of shape `(images, views, width)`, `float64`): Features minus their class means.
        rank (`int`, *optional*): Most rows of the factor. Default: no limit.

    Returns:
        `torch.Tensor` of shape `(rows, width)`, zero below its diagonal, and `torch.Tensor` of shape `(width,)`:
        `factor.T @ factor + rest.diag()` is the scatter matrix, up to the off-diagonal part of what is dropped.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing.covariance import factorize

    >>> factor, rest = factorize(torch.tensor([[[3.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]]).double(), rank=1)
    >>> factor.abs().round(decimals=4).tolist(), rest.round(decimals=4).tolist()
    ([[3.0, 0.0, 0.0]], [0.0, 1.0, 0.0])

    ```
    """
    _, views, width = residuals.shape
    rows = residuals.reshape(-1, width)  # without copies, as there may be many
    variances = torch.linalg.vector_norm(rows, dim=0) ** 2 / views
    if len(rows) < width:
        values, vectors = torch.linalg.eigh(rows @ rows.T / views)
        rows = vectors.T @ rows / views**0.5
    else:
        values, vectors = torch.linalg.eigh(rows.T @ rows / views)
        rows = values.clamp(min=0).sqrt()[:, None] * vectors.T
    kept = values > ROUNDING * values.max().clamp(min=0)
    if rank is not None:
        kept[:-rank] = False
    factor = torch.linalg.qr(rows[kept].flip(0)).R
    return factor, (variances - factor.square().sum(dim=0)).clamp(min=0)


def unpack_triangle(packed: torch.Tensor, rank: torch.Tensor, width: int) -> torch.Tensor:
    """The factor of shape `(rank, width)` whose upper triangle a file holds; raises `ValueError` if it cannot be.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing.covariance import unpack_triangle

    >>> unpack_triangle(torch.tensor([1.0, 2.0, 3.0]), torch.tensor(2), width=2).tolist()
    [[1.0, 2.0], [0.0, 3.0]]

    ```
    """
    rows = int(rank) if rank.numel() == 1 else -1
    if not 0 <= rows <= width or packed.shape != (rows * width - rows * (rows - 1) // 2,):
        raise ValueError(f"a factor of rank {rank.tolist()} and width {width} has {packed.numel():,} numbers.")
    factor = packed.new_zeros(rows, width)
    factor[tuple(torch.triu_indices(rows, width))] = packed
    return factor


def mean_square(features: torch.Tensor) -> torch.Tensor:
    """Sum over images of the mean over views of outer products; the Gram matrix of images of one view.

    Args:
        features (`torch.Tensor` of shape `(images, views, width)`): Features of several views of images.

    Returns:
        `torch.Tensor` of shape `(width, width)`.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing.covariance import mean_square

    >>> mean_square(torch.tensor([[[1.0, 0.0], [0.0, 3.0]]]))
    tensor([[0.5000, 0.0000],
            [0.0000, 4.5000]])

    ```
    """
    rows = features.flatten(0, 1)
    return rows.T @ rows / features.shape[1]


def shrink(covariance: torch.Tensor, freedom: int, dimensions: int | None = None) -> torch.Tensor:
    """Oracle approximating shrinkage of a covariance towards a multiple of the identity.

    Args:
        covariance (`torch.Tensor` of shape `(width, width)`, `float64`): Sample covariance.
        freedom (`int`): Its degrees of freedom.
        dimensions (`int`, *optional*): Number of dimensions among which the variance is shared, for features that are
            functions of fewer numbers. Default: `width`.

    Returns:
        `torch.Tensor` of shape `(width, width)`: Invertible.

    Source: Chen et al., arXiv 0907.4698, equation 23, as scikit-learn's `OAS` has it.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing.covariance import shrink

    >>> shrink(torch.diag(torch.tensor([2.0, 0.0], dtype=torch.float64)), freedom=1)
    tensor([[1., 0.],
            [0., 1.]], dtype=torch.float64)

    ```
    """
    width = len(covariance)
    weight, scale = shrinkage(covariance.trace(), (covariance**2).sum(), freedom, dimensions or width)
    return (1 - weight) * covariance + weight * scale * torch.eye(width).to(covariance)


def shrinkage(trace: torch.Tensor, squares: torch.Tensor, freedom: int, dimensions: int) -> tuple[float, torch.Tensor]:
    """Weight and variance of the identity in [`shrink`].

    Args:
        trace, squares (scalar `torch.Tensor`): Trace of the sample covariance, and the sum of its squared elements.
        freedom (`int`): Its degrees of freedom.
        dimensions (`int`): Number of dimensions among which the variance is shared.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.routing.covariance import shrinkage

    >>> shrinkage(torch.tensor(2.0), torch.tensor(4.0), freedom=1, dimensions=2)
    (1.0, tensor(1.))

    ```
    """
    scale, mean = trace / dimensions, squares / dimensions**2
    spread = (freedom + 1) * (mean - scale**2 / dimensions)
    weight = 1.0 if spread <= 0 else min(1.0, float((mean + scale**2) / spread))
    # With one image per class all residuals are zero, and the scale is arbitrary.
    return max(weight, 1e-6), scale if scale > 0 else torch.ones_like(scale)


def leave_one_out(
    residuals: torch.Tensor, centres: torch.Tensor, owns: torch.Tensor, share: float, views: int = 1
) -> torch.Tensor:
    """Log-likelihoods of images, up to a constant, each without it in the covariance and in the mean of its class.

    What an image adds to the covariance is of low rank, so that the inverse without it follows by Woodbury's identity
    from the inverse with it. Without the image, the mean of its class would be less exact than it is: the image is as
    far from it, on average, as new ones are from the mean of all n images, by √((n + 1) / (n − 1)) of what it is from
    the mean with it.

    Args:
        residuals (`torch.Tensor` of shape `(images, views, width)`): Features minus the mean of their entry, whitened.
        centres (`torch.Tensor` of shape `(entries, width)`): Means of all entries, whitened.
        owns (integer `torch.Tensor` of shape `(images,)`): Entry of each image. Those of an image that is alone in its
            entry are not defined.
        share (`float`): What the covariance has of an outer product of residuals.
        views (`int`, *optional*, defaults to 1): Log-likelihoods are averaged over so many of the first views.

    Returns:
        `torch.Tensor` of shape `(images, entries)`.
    """
    others = (owns.bincount(minlength=len(centres))[owns] - 1).clamp(min=1)[:, None]
    mean = residuals.mean(dim=1)
    parts = torch.cat([residuals / residuals.shape[1] ** 0.5, (mean / others.sqrt())[:, None]], dim=1) * share**0.5
    values, vectors = torch.linalg.eigh(parts @ parts.mT)
    further = (1 + 2 / others) ** 0.5 - 1
    gain = vectors @ torch.diag_embed(1 / (1 - values.clamp(max=1 - 1e-6))) @ vectors.mT
    far, rows = parts @ centres.T, torch.arange(len(owns), device=owns.device)
    scores = torch.zeros(len(owns), len(centres)).to(centres)
    for view in residuals[:, :views].unbind(dim=1):
        place, own = centres[owns] + view, view + mean * further
        squared = torch.cdist(place, centres) ** 2
        squared[rows, owns] = own.square().sum(dim=1)
        along = (parts @ place[:, :, None] - far).mT
        along[rows, owns] = (parts @ own[:, :, None])[:, :, 0]
        scores -= (squared + ((along @ gain) * along).sum(dim=2)) / 2
    return scores / min(views, residuals.shape[1])
