"""The order in which a task's training images are seen: fixed by seed and epoch, so that it can go on anywhere."""

from collections.abc import Iterable, Iterator

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard

from ..streams import StreamedImages, TaskImages
from .arguments import ContinualTrainingArguments


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


class CachedBatches:
    """Batches of images on disk.

    Args:
        images ([`TaskImages`]): What to train on.
        args ([`ContinualTrainingArguments`]): Batch size, seed, workers.
        accelerator (`accelerate.Accelerator`): How many processes there are.

    Attributes:
        loader (`torch.utils.data.DataLoader`): To be replaced by what Accelerate makes of it.
    """

    def __init__(self, images: TaskImages, args: ContinualTrainingArguments, accelerator: Accelerator):
        several = accelerator.num_processes > 1
        self._order = EpochBatches(len(images), args.train_batch_size, args.seed, fill=several)
        self.loader = images.loader(batch_sampler=self._order, num_workers=args.dataloader_num_workers)

    def __len__(self) -> int:
        return len(self._order)

    def read(self, epoch: int, start: int, position: dict | None) -> Iterable[dict[str, torch.Tensor]]:
        """Batches of an epoch, the first `start` of them left out."""
        self._order.epoch, self._order.start = epoch, start
        return self.loader

    def position(self, start: int) -> None:
        """Nothing but `start` is needed to go on."""


class StreamedBatches:
    """Batches of images that are read anew in every epoch, each process reading its own share.

    Args:
        images ([`StreamedImages`]): What to train on.
        args ([`ContinualTrainingArguments`]): Batch size, seed.
        accelerator (`accelerate.Accelerator`): Which process this is.
    """

    loader = None  # nothing for Accelerate to prepare: the images are shared already

    def __init__(self, images: StreamedImages, args: ContinualTrainingArguments, accelerator: Accelerator):
        self._images, self._accelerator, self._seed = images, accelerator, args.seed
        self._share = {"rank": accelerator.process_index, "num_processes": accelerator.num_processes}
        self._batch_size = args.train_batch_size // accelerator.num_processes
        self._positions: dict[int, dict | None] = {}
        most = len(images)
        if accelerator.num_processes > 1:
            most, least = self._agree(images.count_share(**self._share, seed=args.seed))
            if not least:
                images.share_row_by_row()
                most, _ = self._agree(images.count_share(**self._share, seed=args.seed))
        self._num_batches = -(-most // self._batch_size)

    def _agree(self, count: int) -> tuple[int, int]:
        counts = self._accelerator.gather(torch.tensor([count], device=self._accelerator.device))
        return int(counts.max()), int(counts.min())

    def __len__(self) -> int:
        return self._num_batches

    def read(self, epoch: int, start: int, position: dict | None) -> Iterable[dict[str, torch.Tensor]]:
        """Batches of an epoch from `start` on, which is where `position` is."""
        self._positions = {start: position}
        batches = _Batches(self._numbered(epoch, start, position))
        if isinstance(self._accelerator, Accelerator):
            # No generators to synchronise: that would draw from this process's own.
            return DataLoaderShard(batches, device=self._accelerator.device, batch_size=None, rng_types=[])
        return self._accelerator.prepare(torch.utils.data.DataLoader(batches, batch_size=None))

    def position(self, start: int) -> dict | None:
        """What [`~StreamedBatches.read`] needs to go on after so many batches."""
        return self._positions.get(start)

    def _numbered(self, epoch: int, number: int, position: dict | None) -> Iterator[dict[str, torch.Tensor]]:
        """As many batches for every process: one that has fewer images begins its own again."""
        while number < self._num_batches:
            for batch, after in self._images.read(self._batch_size, self._seed, epoch, position, **self._share):
                number += 1
                # The loader is some batches ahead of who uses them.
                self._positions = {at: where for at, where in self._positions.items() if at > number - 8}
                self._positions[number] = after
                yield batch
                if number == self._num_batches:
                    return
            position = None


class _Batches(torch.utils.data.IterableDataset):
    """What a loader takes: batches made elsewhere, once."""

    def __init__(self, batches: Iterator[dict[str, torch.Tensor]]):
        self._batches = batches

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self._batches


def make_batches(
    images: TaskImages | StreamedImages, args: ContinualTrainingArguments, accelerator: Accelerator
) -> CachedBatches | StreamedBatches:
    """[`CachedBatches`] or [`StreamedBatches`], whichever the images need."""
    if isinstance(images, StreamedImages):
        return StreamedBatches(images, args, accelerator)
    return CachedBatches(images, args, accelerator)
