"""The order in which a task's training images are seen: fixed by seed and epoch, so that it can go on anywhere."""

from collections.abc import Iterator

import torch


class EpochBatches(torch.utils.data.Sampler[list[int]]):
    """Batches of one epoch after another, every epoch in an order of its own.

    Args:
        num_images (`int`): How many images there are.
        batch_size (`int`): Images per batch, over all processes; the last batch of an epoch may have fewer.
        seed (`int`): Seed of the orders.
        fill (`bool`, *optional*, defaults to `False`): Fill the last batch with the first images of the epoch, as
            several processes can share nothing else evenly.

    Attributes:
        epoch (`int`): Which epoch comes next.
        start (`int`): How many of its batches to leave out, because they have been seen.

    Example:

    ```py
    >>> from hf_clpeft.training.batches import EpochBatches

    >>> batches = EpochBatches(num_images=5, batch_size=2, seed=0)
    >>> whole = list(batches)
    >>> batches.start = 1
    >>> list(batches) == whole[1:] and len(batches) == 3
    True

    ```
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, fill: bool = False):
        self.num_images, self.batch_size, self.seed, self.fill = num_images, batch_size, seed, fill
        self.drop_last = False  # Accelerate asks
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.num_images, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        if self.fill:
            missing = len(self) * self.batch_size - self.num_images
            order = torch.cat([order, order.repeat(-(-missing // self.num_images))[:missing]])
        for start in range(self.start * self.batch_size, len(order), self.batch_size):
            yield order[start : start + self.batch_size].tolist()
