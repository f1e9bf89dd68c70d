"""Views of images: random ones to train on and for sums over features, fixed ones of an image to predict.

A view is an affine map of shape `(2, 3)` from places in the view to places in the image, both from −1 to 1.
"""

import torch


AUGMENTATIONS = ("none", "flip", "crop", "crop_flip")
LEAST_AREA = 0.5  # of a random crop
SIDE = 0.75**0.5  # of a fixed crop, whose area is the mean of random ones
CENTRES = [(0, 0), (-1, -1), (1, 1), (1, -1), (-1, 1)]  # of fixed crops
MOST_FIXED = {"none": 1, "flip": 2, "crop": 1 + len(CENTRES), "crop_flip": 2 + 2 * len(CENTRES)}
MOST = {"none": 1, "flip": 2, "crop": 64, "crop_flip": 64}


def draw_views(
    count: int, augmentation: str, device: torch.device, generator: torch.Generator | None = None
) -> torch.Tensor | None:
    """Samples random views of images.

    Args:
        count (`int`): Number of images; in training the global batch, so that views do not depend on the number of
            processes.
        augmentation (`str`): `"none"`, `"flip"` (horizontal, with probability 0.5), `"crop"` (of 50 to 100 % of the
            area), or `"crop_flip"` (both).
        device (`torch.device`): Device of the result and of the random generator.
        generator (`torch.Generator`, *optional*): Default: the global one of the device.

    Returns:
        `torch.Tensor` of shape `(count, 2, 3)`: Views for [`augment`]; `None` for `"none"`.
    """
    if augmentation == "none":
        return None
    random = torch.rand(count, 4, device=device, generator=generator)
    flip = 1 - 2 * (random[:, 0] < 0.5).float() if "flip" in augmentation else torch.ones_like(random[:, 0])
    side = (1 - (1 - LEAST_AREA) * random[:, 1]).sqrt() if "crop" in augmentation else torch.ones_like(flip)
    shift = (1 - side)[:, None] * (2 * random[:, 2:] - 1)
    return _affine(side * flip, side, shift)


def views_for_sums(count: int, views: int, augmentation: str, seed: int) -> list[torch.Tensor | None]:
    """Views to sum features over or to train on in turn: each image as it is, mirrored if asked for, then random ones.

    Args:
        count (`int`): Number of images.
        views (`int`): Number of views of each.
        augmentation (`str`): Kind of the views; see [`draw_views`]. With `"flip"` there are two.
        seed (`int`): Seed of the random ones.

    Returns:
        `list` of `views` tensors of shape `(count, 2, 3)` for [`augment`], or `None` for the images as they are.

    Example:

    ```py
    >>> from hf_clpeft.backbones.views import views_for_sums

    >>> image, mirrored, *crops = views_for_sums(100, views=8, augmentation="crop_flip", seed=0)
    >>> image is None, mirrored[0].tolist(), len(crops)
    (True, [[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], 6)

    ```
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: list[torch.Tensor | None] = list(fixed_views(min(views, 2), "flip")) if "flip" in augmentation else [None]
    drawn = [None if view is None else view.expand(count, 2, 3) for view in drawn]
    while len(drawn) < views:
        drawn.append(draw_views(count, augmentation, torch.device("cpu"), generator))
    return drawn


def fixed_views(views: int, augmentation: str) -> list[torch.Tensor | None]:
    """Views of an image to predict: the image, its mirror image if that is asked for, and crops in fixed places.

    Args:
        views (`int`): Number of views, at most `MOST_FIXED`.
        augmentation (`str`): Kind of the views; see [`draw_views`].

    Returns:
        `list` of `views` tensors of shape `(2, 3)`, or `None` for the image as it is.

    Example:

    ```py
    >>> from hf_clpeft.backbones.views import fixed_views

    >>> [view is None for view in fixed_views(2, "crop_flip")]
    [True, False]

    ```
    """
    flips = (1, -1) if "flip" in augmentation else (1,)
    places = [(1.0, flip, (0, 0)) for flip in flips]
    places += [(SIDE, flip, centre) for centre in CENTRES for flip in flips]
    found: list[torch.Tensor | None] = [None]
    for side, flip, centre in places[1:views]:
        shift = (1 - side) * torch.tensor([centre], dtype=torch.float32)
        found.append(_affine(torch.tensor([side * flip]), torch.tensor([side]), shift)[0])
    return found


def augment(pixels: torch.Tensor, views: torch.Tensor | None) -> torch.Tensor:
    """Takes a view of each image of a batch, on its device.

    Args:
        pixels (`torch.Tensor` of shape `(batch, 3, height, width)`): Normalised images.
        views (`torch.Tensor` of shape `(batch, 2, 3)` or `(2, 3)`, *optional*): From [`draw_views`].

    Returns:
        `torch.Tensor` of the same shape.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.backbones.views import augment, draw_views

    >>> augment(torch.zeros(2, 3, 32, 32), draw_views(2, "crop_flip", torch.device("cpu"))).shape
    torch.Size([2, 3, 32, 32])

    ```
    """
    if views is None:
        return pixels
    views = views.to(pixels.device, pixels.dtype, non_blocking=True).expand(pixels.shape[0], 2, 3)
    grid = torch.nn.functional.affine_grid(views, list(pixels.shape), align_corners=False)
    return torch.nn.functional.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)


def _affine(across: torch.Tensor, down: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    theta = torch.zeros(len(shift), 2, 3, dtype=torch.float32, device=shift.device)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = across, down, shift
    return theta
