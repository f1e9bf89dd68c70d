"""Second moments of the inputs of layers, over all tokens of all training images of a task."""

from collections.abc import Sequence

import torch

from .learning import Features, FeaturesOf


@torch.no_grad()
def second_moments(
    layers: Sequence[torch.nn.Module], run: Features, features_of: FeaturesOf, combinations: int, seed: int
) -> list[torch.Tensor]:
    """Estimates Σ x xᵀ over the inputs x of each layer.

    An image's tokens are replaced by a few random combinations of them, as all tokens of all images would be too many
    to gather: see [`combine_tokens`]. The estimate is unbiased, and exact with as many combinations as tokens. It
    depends neither on batches nor on the number of processes.

    Args:
        layers (sequence of `torch.nn.Module`): Layers with inputs `(batch, tokens, width)`, in order of execution.
        run (callable): Runs them, given a batch of normalised images.
        features_of (callable): See [`FeaturesOf`].
        combinations (`int`): Random combinations per image and layer.
        seed (`int`): Seed of the combinations.

    Returns:
        `list[torch.Tensor]`: A matrix `(width, width)` per layer, `float64`, on the CPU.
    """
    shapes: list[torch.Size] = []

    def combined(pixels: torch.Tensor) -> torch.Tensor:
        inputs: list[torch.Tensor] = []
        hooks = [layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in layers]
        try:
            run(pixels)
        finally:
            for hook in hooks:
                hook.remove()
        seeds = checksums(pixels) + seed
        rows = [combine_tokens(tokens.float(), seeds, combinations) for tokens in inputs]
        shapes[:] = [row.shape[1:] for row in rows]
        return torch.cat([row.flatten(1) for row in rows], dim=1)

    found, _ = features_of(combined)
    parts = found.split([shape.numel() for shape in shapes], dim=1)
    matrices = []
    for part, shape in zip(parts, shapes, strict=True):
        rows = part.reshape(-1, shape[-1]).double()
        matrices.append(rows.mT @ rows)
    return matrices


def combine_tokens(tokens: torch.Tensor, seeds: torch.Tensor, count: int) -> torch.Tensor:
    """Random combinations z of the tokens x of each image, with E Σ z zᵀ = Σ x xᵀ.

    Tokens get random signs, and are then mixed by rows of a Hadamard matrix, which are orthogonal: with as many rows
    as columns, it holds exactly.

    Args:
        tokens (`torch.Tensor` of shape `(batch, tokens, width)`): Tokens of each image.
        seeds (`int64` `torch.Tensor` of shape `(batch,)`): Seed of each image.
        count (`int`): Number of combinations; at most the next power of two of the number of tokens is used.

    Returns:
        `torch.Tensor` of shape `(batch, combinations, width)`.

    Source: subsampled randomised Hadamard transform, arXiv 1011.1595.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.methods.inputs import combine_tokens

    >>> tokens = torch.randn(1, 5, 3)
    >>> few, all = (combine_tokens(tokens, torch.tensor([0]), count)[0] for count in (2, 8))
    >>> len(few), torch.allclose(all.T @ all, tokens[0].T @ tokens[0], atol=1e-5)
    (2, True)

    ```
    """
    number = tokens.shape[1]
    size = 1 << (number - 1).bit_length()
    hadamard = torch.ones(1, 1)
    while len(hadamard) < size:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], dim=1), torch.cat([hadamard, -hadamard], dim=1)])
    mixed = hadamard[:count, :number] / min(count, size) ** 0.5
    signs = random_signs(seeds, number).to(tokens)
    return (mixed.to(tokens, non_blocking=True) * signs[:, None]) @ tokens


def random_signs(seeds: torch.Tensor, count: int) -> torch.Tensor:
    """Signs that are drawn on the device of their seeds: 1 and −1, of shape `(len(seeds), count)`.

    Source: the mixing function of SplitMix64, Steele et al., "Fast splittable pseudorandom number generators", 2014.
    """
    state = (seeds[:, None] * count + torch.arange(1, count + 1, device=seeds.device)) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        state = (state ^ (state >> shift & (1 << 64 - shift) - 1)) * factor
    return 1 - 2 * (state >> 31 & 1 ^ state & 1)


def checksums(pixels: torch.Tensor) -> torch.Tensor:
    """An integer per image, which depends on its pixels alone; of shape `(batch,)`."""
    return pixels.float().contiguous().view(torch.int32).flatten(1).sum(dim=1, dtype=torch.int64)
