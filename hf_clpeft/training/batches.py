"""The order in which a task's training images are seen: fixed by seed and epoch, so that it can go on anywhere.

It does not depend on how many processes there are. They share every batch, row by row; one that has no row of the last
batch, or fewer than others, fills its share with rows that count for nothing.
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
    """What a process has of a batch; the rows of its tensors beyond that are there to fill it.

    Args:
        start (`int`): Where its rows begin.
        size (`int`): How many it has.
        total (`int`): Rows of the batch, over all processes.
    """

    start: int
    size: int
    total: int

    def weights(self, length: int, num_processes: int) -> torch.Tensor:
        """What each of `length` rows counts for, so that the mean over processes is the mean over the whole batch."""
        weights = torch.zeros(length, dtype=torch.float32)
        weights[: self.size] = num_processes / self.total
        return weights

    def own(self, rows: torch.Tensor, length: int) -> torch.Tensor:
        """This process's part of something that there is for every row of the batch, filled up to `length`."""
        part = rows[self.start : self.start + self.size]
        return torch.cat([part, rows[:1].expand(length - len(part), *rows.shape[1:])])


class EpochBatches(torch.utils.data.Sampler[list[int]]):
    """Batches of one epoch after another, every epoch in an order of its own.

    Args:
        num_images (`int`): How many images there are.
        batch_size (`int`): Images per batch, over all processes; the last batch of an epoch may have fewer.
        seed (`int`): Seed of the orders.
        rank (`int`, *optional*, defaults to 0): Number of this process.
        num_processes (`int`, *optional*, defaults to 1): How many share each batch. All get as many rows: what is
            missing in the last batch is filled up, see [`Share`].

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

    def __init__(self, num_images: int, batch_size: int, seed: int, rank: int = 0, num_processes: int = 1):
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.rank, self.num_processes = rank, num_processes
        self.drop_last = False  # Accelerate asks
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
        """What this process has of a batch of any epoch."""
        rows = list(range(min(self.batch_size, self.num_images - number * self.batch_size)))
        own = share_of(rows, self.rank, self.num_processes)
        return Share(own[0] if own else 0, len(own), len(rows))


class CachedBatches:
    """Batches of images on disk.

    Args:
        images ([`TaskImages`]): What to train on.
        args ([`ContinualTrainingArguments`]): Batch size, seed, workers.
        accelerator (`accelerate.Accelerator`): How many processes there are.
    """

    def __init__(self, images: TaskImages, args: ContinualTrainingArguments, accelerator: Accelerator):
        place = (accelerator.process_index, accelerator.num_processes)
        self._order = EpochBatches(len(images), args.train_batch_size, args.seed, *place)
        loader = images.loader(batch_sampler=self._order, num_workers=args.dataloader_num_workers)
        self._loader = on_device(loader, accelerator)

    def __len__(self) -> int:
        return len(self._order)

    def read(self, epoch: int, start: int, position: dict | None) -> Iterator[tuple[dict[str, torch.Tensor], Share]]:
        """Batches of an epoch, the first `start` of them left out, and what this process has of each."""
        self._order.epoch, self._order.start = epoch, start
        for number, batch in enumerate(self._loader, start):
            yield batch, self._order.share(number)

    def position(self, start: int) -> None:
        """Nothing but `start` is needed to go on."""


class StreamedBatches:
    """Batches of images that are read anew in every epoch, each process decoding its own share.

    Args:
        images ([`StreamedImages`]): What to train on.
        args ([`ContinualTrainingArguments`]): Batch size, seed.
        accelerator (`accelerate.Accelerator`): Which process this is.
    """

    def __init__(self, images: StreamedImages, args: ContinualTrainingArguments, accelerator: Accelerator):
        self._images, self._accelerator, self._seed = images, accelerator, args.seed
        self._batch_size = args.train_batch_size
        self._positions: dict[int, dict | None] = {}
        self._shares: dict[int, Share] = {}

    def __len__(self) -> int:
        return -(-len(self._images) // self._batch_size)

    def read(self, epoch: int, start: int, position: dict | None) -> Iterator[tuple[dict[str, torch.Tensor], Share]]:
        """Batches of an epoch from `start` on, which is where `position` is, and what this process has of each."""
        self._positions = {start: position}
        loader = torch.utils.data.DataLoader(_Batches(self._numbered(epoch, start, position)), batch_size=None)
        for number, batch in enumerate(on_device(loader, self._accelerator), start + 1):
            yield batch, self._shares.pop(number)

    def position(self, start: int) -> dict | None:
        """What [`~StreamedBatches.read`] needs to go on after so many batches."""
        return self._positions.get(start)

    def _numbered(self, epoch: int, number: int, position: dict | None) -> Iterator[dict[str, torch.Tensor]]:
        """As many batches in every epoch: if too few images can be decoded, some come again."""
        place = {"rank": self._accelerator.process_index, "num_processes": self._accelerator.num_processes}
        while number < len(self):
            for batch, after in self._images.read(self._batch_size, self._seed, epoch, position, **place):
                share = self._share(len(batch["label"]), after)
                if not share.total:
                    continue  # nothing could be decoded, by nobody
                number += 1
                # The loader is some batches ahead of who uses them.
                self._positions = {at: where for at, where in self._positions.items() if at > number - 8}
                self._positions[number], self._shares[number] = after, share
                yield batch if share.size else self._blank(batch)
                if number == len(self):
                    return
            position = None

    def _share(self, count: int, after: dict) -> Share:
        """What this process has of a batch of which some images may not have been decoded."""
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
                "Mend or drop them (`dataset.filter`), or leave out more with --max_bad_images."
            )
        return Share(sum(good for good, _ in found[:rank]), count, sum(good for good, _ in found))

    def _blank(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pixels = batch["pixels"].new_zeros(1, *self._images.sample.shape)
        return {"pixels": pixels, "label": torch.zeros(1, dtype=torch.int64)}


def on_device(loader: torch.utils.data.DataLoader, accelerator: Accelerator) -> Iterable[dict[str, torch.Tensor]]:
    """A loader of a process's own batches whose tensors come on the device; nothing is shared out any more."""
    if not isinstance(accelerator, Accelerator):
        return accelerator.prepare(loader)
    # No generators to synchronise: that would draw from this process's own.
    alone = {"num_processes": 1, "process_index": 0, "dispatch_batches": False, "rng_types": []}
    return prepare_data_loader(loader, accelerator.device, put_on_device=True, **alone)


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
