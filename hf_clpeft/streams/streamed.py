"""Images that no disk has to hold: read and decoded anew in every epoch, in an order that can be taken up anywhere."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, islice

import numpy as np
import torch
from datasets import Dataset

from .images import BAD, ImageTransform, TaskImages, cache_images, to_pixels
from .sampling import Places
from .source import ROW, StreamError
from .task import Split


BUFFER_SIZE = 2048  # encoded images that are in memory, and shuffled, at a time
SAMPLE_SIZE = 20_000  # images of a task that teach the router, at most
SHARDS = 64  # into which a data set on disk is cut, as far as it has rows


def share_of(rows: list, rank: int, num_processes: int) -> list:
    """The rows of a batch that a process has: as many as every other one, or fewer at the end.

    Example:

    ```py
    >>> from hf_clpeft.streams.streamed import share_of

    >>> [share_of([7, 8, 9], rank, num_processes=2) for rank in (0, 1)]
    [[7, 8], [9]]

    ```
    """
    size = -(-len(rows) // num_processes)
    return rows[rank * size : (rank + 1) * size]


class StreamedImages:
    """Images of a split that would take too much disk, and a sample of them that does not.

    Args:
        split ([`Split`]): Encoded images.
        transform ([`ImageTransform`]): How to resize them.
        num_images (`int`): How many there are, those that cannot be decoded included.
        sample ([`TaskImages`]): Some of each class, drawn at random, on disk: what routers learn from.
        max_bad_images (`int`, *optional*, defaults to 0): Leave out at most so many in an epoch that cannot be
            decoded.
    """

    def __init__(
        self, split: Split, transform: ImageTransform, num_images: int, sample: TaskImages, max_bad_images: int = 0
    ):
        self.split, self.transform, self.sample = split, transform, sample
        self.num_images, self.max_bad_images = num_images, max_bad_images
        dataset = split.dataset
        if isinstance(dataset, Dataset):
            dataset = dataset.to_iterable_dataset(num_shards=min(len(dataset), SHARDS))
        self._dataset = dataset

    def __len__(self) -> int:
        return self.num_images

    def read(
        self,
        batch_size: int,
        seed: int,
        epoch: int,
        position: dict | None = None,
        rank: int = 0,
        num_processes: int = 1,
    ) -> Iterator[tuple[dict[str, torch.Tensor], dict]]:
        """One epoch, or what is left of it.

        Shards are read in a random order, several at a time; what comes is shuffled block by block, and a block is
        used up before the next one is read. So nothing is in memory that a position would not know of.

        Args:
            batch_size (`int`): Images per batch, over all processes.
            seed (`int`), epoch (`int`): What the order follows from.
            position (`dict`, *optional*): Where to go on: what came with the last batch that was used.
            rank (`int`, *optional*, defaults to 0): Number of this process.
            num_processes (`int`, *optional*, defaults to 1): How many share each batch. All of them read all encoded
                images, so that batches are what a single process makes; each decodes its own.

        Yields:
            `pixels` of shape `(batch, 3, height, width)` and `label` of shape `(batch,)` of this process's share,
            which may be empty; and the position after the batch, ready for JSON.

        Raises:
            [`StreamError`]: Too many images cannot be decoded.
        """
        position = position or {"block": 0, "used": 0, "stream": None, "bad": 0}
        dataset = self._dataset.shuffle(seed=seed + epoch, buffer_size=1)
        if position["stream"] is not None:
            dataset.load_state_dict(position["stream"])
        stream, used, bad = position["stream"], position["used"], position["bad"]
        block_size = -(-BUFFER_SIZE // batch_size) * batch_size
        rows = iter(dataset)
        for block in count(position["block"]):
            with _no_warning_of_lost_buffers():
                images = list(islice(rows, block_size))
            if not images:
                return
            after = dataset.state_dict()
            order = np.random.default_rng([seed, epoch, block]).permutation(len(images))
            for start in range(used, len(images), batch_size):
                chosen = [images[i] for i in order[start : start + batch_size]]
                batch, problems = self._decode(share_of(chosen, rank, num_processes))
                bad += len(problems)
                if bad > self.max_bad_images:
                    raise StreamError(
                        f"{self.split.title}, {problems[0]}. More than max_bad_images={self.max_bad_images} cannot be "
                        "decoded. Mend or drop them (`dataset.filter`), or leave out more with --max_bad_images."
                    )
                place = {"block": block, "used": start + batch_size, "stream": stream, "bad": bad}
                if len(batch["label"]) or num_processes > 1:
                    yield batch, {**place, "rows": len(chosen)}
            stream, used = after, 0

    def _decode(self, rows: list[dict]) -> tuple[dict[str, torch.Tensor], list[str]]:
        split = self.split
        columns = {name: [row[name] for row in rows] for name in (split.image_column, split.label_column, ROW)}
        found = to_pixels(columns, self.transform, split.image_column, split.label_column, split.labels)
        good = [i for i, label in enumerate(found["label"]) if label != BAD]
        pixels = [np.frombuffer(found["pixels"][i], dtype=np.uint8).reshape(self.sample.shape) for i in good]
        batch = {
            "pixels": torch.from_numpy(np.stack(pixels) if good else np.empty((0, *self.sample.shape), np.uint8)),
            "label": torch.tensor([found["label"][i] for i in good]),
        }
        return batch, [found["pixels"][i].decode() for i in range(len(rows)) if found["label"][i] == BAD]


def open_images(
    split: Split,
    transform: ImageTransform,
    max_bad_images: int = 0,
    cache_size_gb: float | None = None,
    seed: int = 0,
) -> TaskImages | StreamedImages:
    """The images of a split: resized on disk if they fit there, else read anew whenever they are needed.

    Args:
        split ([`Split`]): Encoded images.
        transform ([`ImageTransform`]): How to resize them.
        max_bad_images (`int`, *optional*, defaults to 0): Leave out at most so many that cannot be decoded.
        cache_size_gb (`float`, *optional*): Most that the resized images may take, in GB of 1e9 bytes. Default: no
            limit.
        seed (`int`, *optional*, defaults to 0): Seed of the sample of what does not fit.

    Returns:
        [`TaskImages`] or [`StreamedImages`]

    Raises:
        [`StreamError`]: Images cannot be decoded, not even one of each class would fit, or a class has none.

    Example:

    ```py
    >>> from hf_clpeft.backbones import load_backbone
    >>> from hf_clpeft.streams import load_benchmark, open_images

    >>> split = load_benchmark("digits")[0].train
    >>> images = open_images(split, load_backbone("hf-clpeft/vit-tiny-glyphs").transform, cache_size_gb=1e-4)
    >>> batch, position = next(images.read(batch_size=4, seed=0, epoch=0))
    >>> batch["pixels"].shape
    torch.Size([4, 3, 32, 32])

    ```
    """
    if cache_size_gb is None:
        return _every_class(cache_images(split, transform, max_bad_images), split)
    most = int(cache_size_gb * 1e9 / np.prod(transform.shape))
    counts, drawn = _draw(split, min(most, SAMPLE_SIZE) // len(set(split.labels.values())), seed)
    num_images = sum(counts.values())
    if num_images <= most:
        return _every_class(cache_images(split, transform, max_bad_images), split)
    if not drawn:
        raise StreamError(
            f"{split.title}: cache_size_gb={cache_size_gb} holds {most} resized images, fewer than there are classes "
            f"({len(counts)}), and routers learn from some of each."
        )
    if isinstance(split.dataset, Dataset):
        rows = split.dataset.select(sorted(drawn))
    else:
        rows = split.dataset.filter(Places(drawn), with_indices=True)
    sample = _every_class(cache_images(replace(split, dataset=rows), transform, max_bad_images), split)
    return StreamedImages(split, transform, num_images, sample, max_bad_images)


def _every_class(images: TaskImages, split: Split) -> TaskImages:
    """The images, if each class has one: a router that knows nothing of a class makes a model that does not load."""
    values = {position: value for value, position in split.labels.items()}
    missing = sorted(set(values) - set(images.labels.tolist()))
    if missing:
        value = values[missing[0]]
        raise StreamError(
            f"{split.title} has no image that can be read for {len(missing)} of {len(values)} classes, such as the "
            f"one with {split.label_column}={value!r}, and none is learnt without. Add images of it, or leave it out."
        )
    return images


def _draw(split: Split, per_class: int, seed: int) -> tuple[dict[int, int], set[int]]:
    """How many images each class has; and places of at most so many of each, all of them equally likely."""
    rng = np.random.default_rng(seed)
    counts: dict[int, int] = {}
    drawn: dict[int, list[int]] = {}
    rows = split.dataset.select_columns([split.label_column])
    for place, row in enumerate(rows):
        label = split.labels[row[split.label_column]]
        seen = counts[label] = counts.get(label, 0) + 1
        reservoir = drawn.setdefault(label, [])
        if seen <= per_class:
            reservoir.append(place)
        elif per_class and (slot := int(rng.integers(seen))) < per_class:
            reservoir[slot] = place
    return counts, {place for reservoir in drawn.values() for place in reservoir}


@contextmanager
def _no_warning_of_lost_buffers() -> Iterator[None]:
    """`datasets` warns of them whenever it goes on; ours has a single row, which has been used by then."""
    logger = logging.getLogger("datasets.iterable_dataset")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
