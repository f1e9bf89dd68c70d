"""Batches of a task's training images, in an order fixed by seed and epoch, so that a run can resume anywhere.

The order does not depend on the number of processes. Every batch is sharded by row; a process with fewer rows of the
last batch, or none, pads its shard with rows of weight 0.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader

from ..streams import StreamedImages, StreamError, TaskImages
from ..streams.streamed import share_of
from .arguments import ContinualTrainingArguments


class Share(NamedTuple):
    """The rows of a batch in a process's shard; further rows of its tensors are padding.

    Args:
        start (`int`): Index of its first row in the batch.
        size (`int`): Number of its rows.
        total (`int`): Number of rows of the batch, over all processes.
    """

    start: int
    size: int
    total: int

    def weights(self, length: int, num_processes: int) -> torch.Tensor:
        """Weights of `length` rows, 0 for padding, such that the mean over processes is the mean over the batch."""
        weights = torch.zeros(length, dtype=torch.float32)
        weights[: self.size] = num_processes / self.total
        return weights

    def own(self, rows: torch.Tensor, length: int) -> torch.Tensor:
        """This process's shard of a tensor over all rows of the batch, padded to `length`."""
        part = rows[self.start : self.start + self.size]
        return torch.cat([part, rows[:1].expand(length - len(part), *rows.shape[1:])])


class EpochBatches(torch.utils.data.Sampler[list[int]]):
    """Samples the batches of each epoch in a different order.

    Args:
        num_images (`int`): Number of images.
        batch_size (`int`): Images per batch, over all processes; the last batch of an epoch may have fewer.
        seed (`int`): Seed of the shuffling.
        rank (`int`, *optional*, defaults to 0): Rank of this process.
        num_processes (`int`, *optional*, defaults to 1): Number of processes that shard each batch. All get
            equally many rows; the last batch is padded, see [`Share`].

    Attributes:
        epoch (`int`): The next epoch.
        start (`int`): Number of its batches to skip, as they have been trained on.

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

    def __init__(self, num_images: int, batch_size: int, seed: int, rank: int = 0, num_processes: int = 1):
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.rank, self.num_processes = rank, num_processes
        self.drop_last = False  # read by Accelerate
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.num_images, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        for start in range(self.start * self.batch_size, len(order), self.batch_size):
            rows = order[start : start + self.batch_size].tolist()
            size = len(share_of(rows, 0, self.num_processes))
            own = share_of(rows, self.rank, self.num_processes)
            yield own + rows[:1] * (size - len(own))

    def share(self, number: int) -> Share:
        """This process's share of a batch; the same in every epoch."""
        rows = list(range(min(self.batch_size, self.num_images - number * self.batch_size)))
        own = share_of(rows, self.rank, self.num_processes)
        return Share(own[0] if own else 0, len(own), len(rows))


class CachedBatches:
    """Batches of images that are cached on disk."""

    def __init__(self, images: TaskImages, args: ContinualTrainingArguments, accelerator: Accelerator):
        place = (accelerator.process_index, accelerator.num_processes)
        self._order = EpochBatches(len(images), args.train_batch_size, args.seed, *place)
        loader = images.loader(self._order, **args.loading(len(self._order), accelerator.device))
        self._loader = on_device(loader, accelerator)

    def __len__(self) -> int:
        return len(self._order)

    def read(self, epoch: int, start: int, position: dict | None) -> Iterator[tuple[dict[str, torch.Tensor], Share]]:
        """Yields the batches of an epoch from `start` on, each with this process's share."""
        self._order.epoch, self._order.start = epoch, start
        for number, batch in enumerate(self._loader, start):
            yield batch, self._order.share(number)

    def position(self, start: int) -> None:
        """`None`, as `start` is enough to resume."""


class StreamedBatches:
    """Batches of images that are decoded anew in every epoch; each process decodes its own shard."""

    def __init__(self, images: StreamedImages, args: ContinualTrainingArguments, accelerator: Accelerator):
        self._images, self._accelerator, self._seed = images, accelerator, args.seed
        self._batch_size = args.train_batch_size
        self._positions: dict[int, dict | None] = {}
        self._shares: dict[int, Share] = {}

    def __len__(self) -> int:
        return -(-len(self._images) // self._batch_size)

    def read(self, epoch: int, start: int, position: dict | None) -> Iterator[tuple[dict[str, torch.Tensor], Share]]:
        """Yields the batches of an epoch from `start` on, at `position`, each with this process's share."""
        self._positions = {start: position}
        batches, pin = _IterableBatches(self._epoch(epoch, start, position)), self._accelerator.device.type == "cuda"
        loader = torch.utils.data.DataLoader(batches, batch_size=None, pin_memory=pin)
        for number, batch in enumerate(on_device(loader, self._accelerator), start + 1):
            yield batch, self._shares.pop(number)

    def position(self, start: int) -> dict | None:
        """The `position` for [`~StreamedBatches.read`] to resume after `start` batches."""
        return self._positions.get(start)

    def _epoch(self, epoch: int, number: int, position: dict | None) -> Iterator[dict[str, torch.Tensor]]:
        """Equally many batches in every epoch: if images cannot be decoded, some are repeated."""
        place = {"rank": self._accelerator.process_index, "num_processes": self._accelerator.num_processes}
        while number < len(self):
            for batch, after in self._images.read(self._batch_size, self._seed, epoch, position, **place):
                share = self._share(len(batch["label"]), after)
                if not share.total:
                    continue  # no process could decode an image
                number += 1
                # The loader prefetches some batches.
                self._positions = {at: where for at, where in self._positions.items() if at > number - 8}
                self._positions[number], self._shares[number] = after, share
                yield batch if share.size else self._blank(batch)
                if number == len(self):
                    return
            position = None

    def _share(self, count: int, after: dict) -> Share:
        """This process's share of a batch, without images that could not be decoded."""
        images, rank, num_processes = self._images, self._accelerator.process_index, self._accelerator.num_processes
        if num_processes == 1:
            return Share(0, count, count)
        if not images.max_bad_images:
            return Share(min(rank * -(-after["rows"] // num_processes), after["rows"]), count, after["rows"])
        found = self._accelerator.gather(
            torch.tensor([[count, after["bad"]]], device=self._accelerator.device)
        ).tolist()
        if sum(bad for _, bad in found) > images.max_bad_images:
            raise StreamError(
                f"{images.split.title}: more than max_bad_images={images.max_bad_images} images cannot be decoded. "
                "Fix or drop them (`dataset.filter`), or allow more with --max_bad_images."
            )
        return Share(sum(good for good, _ in found[:rank]), count, sum(good for good, _ in found))

    def _blank(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pixels = batch["pixels"].new_zeros(1, *self._images.sample.shape)
        return {"pixels": pixels, "label": torch.zeros(1, dtype=torch.int64)}


def on_device(loader: torch.utils.data.DataLoader, accelerator: Accelerator) -> Iterable[dict[str, torch.Tensor]]:
    """Wraps a loader of a process's own shards to move tensors to the device, without sharding again."""
    if not isinstance(accelerator, Accelerator):
        return accelerator.prepare(loader)
    # No RNG synchronisation, which would advance this process's generators.
    unsharded = {"num_processes": 1, "process_index": 0, "dispatch_batches": False, "rng_types": []}
    return prepare_data_loader(loader, accelerator.device, put_on_device=True, non_blocking=True, **unsharded)


class _IterableBatches(torch.utils.data.IterableDataset):
    """Adapts an iterator of batches to a `DataLoader`; can be iterated once."""

    def __init__(self, batches: Iterator[dict[str, torch.Tensor]]):
        self._batches = batches

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self._batches


def make_batches(
    images: TaskImages | StreamedImages, args: ContinualTrainingArguments, accelerator: Accelerator
) -> CachedBatches | StreamedBatches:
    """[`CachedBatches`] or [`StreamedBatches`], depending on the images."""
    if isinstance(images, StreamedImages):
        return StreamedBatches(images, args, accelerator)
    return CachedBatches(images, args, accelerator)
