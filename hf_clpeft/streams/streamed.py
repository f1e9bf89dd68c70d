"""Images that do not fit on disk: decoded again in every epoch, in a shuffled order that can be resumed anywhere."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, islice

import numpy as np
import torch
from datasets import Dataset

from .images import BAD, ImageTransform, TaskImages, cache_images, to_pixels
from .sampling import IndexFilter
from .source import ROW, StreamError
from .task import Split


BUFFER_SIZE = 2048  # size of the shuffle buffer, in encoded images
SAMPLE_SIZE = 20_000  # maximum number of images per task for fitting the router
SHARDS = 64  # maximum number of shards of a data set on disk


def share_of(rows: list, rank: int, num_processes: int) -> list:
    """Splits a global batch by process: equal shares, of which the last may be smaller or empty.

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
    """Images of a split that are streamed because they exceed the cache size, with a cached sample of them.

    Args:
        split ([`Split`]): Encoded images.
        transform ([`ImageTransform`]): How to resize them.
        num_images (`int`): Number of images, including undecodable ones.
        sample ([`TaskImages`]): Cached random sample of each class, for fitting the router.
        max_bad_images (`int`, *optional*, defaults to 0): Skip up to this many undecodable images per epoch.
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
        """Reads one epoch, or the rest of it from a checkpointed position.

        Shards are read in random order, and rows are shuffled block by block; a block is used up before the next one
        is read, so a position describes the whole state, and resuming is exact.

        Args:
            batch_size (`int`): Global batch size.
            seed (`int`), epoch (`int`): Determine the order.
            position (`dict`, *optional*): Resume here: the position yielded with the last batch that was used.
            rank (`int`, *optional*, defaults to 0): Rank of this process.
            num_processes (`int`, *optional*, defaults to 1): Number of processes that share each batch. Each reads all
                encoded images but decodes only its own, so batches do not depend on the number of processes.

        Yields:
            `pixels` of shape `(batch, 3, height, width)` and `label` of shape `(batch,)` of this process's share,
            which may be empty; and the position after the batch, JSON-serialisable.

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
            with _silence_buffer_warning():
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
                        "decoded. Fix or drop them (`dataset.filter`), or skip more with --max_bad_images."
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
    """Opens the images of a split: cached on disk if they fit in the cache size, else streamed.

    Args:
        split ([`Split`]): Encoded images.
        transform ([`ImageTransform`]): How to resize them.
        max_bad_images (`int`, *optional*, defaults to 0): Skip up to this many undecodable images.
        cache_size_gb (`float`, *optional*): Maximum size of the resized images in GB (1e9 bytes). Default: no limit.
        seed (`int`, *optional*, defaults to 0): Seed of the cached sample if they are streamed.

    Returns:
        [`TaskImages`] or [`StreamedImages`]

    Raises:
        [`StreamError`]: Images cannot be decoded, the cache cannot hold one image per class, or a class has none.

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
        return _check_classes(cache_images(split, transform, max_bad_images), split)
    most = int(cache_size_gb * 1e9 / np.prod(transform.shape))
    counts, drawn = _count_and_sample(split, min(most, SAMPLE_SIZE) // len(set(split.labels.values())), seed)
    num_images = sum(counts.values())
    if num_images <= most:
        return _check_classes(cache_images(split, transform, max_bad_images), split)
    if not drawn:
        raise StreamError(
            f"{split.title}: cache_size_gb={cache_size_gb} holds {most} resized images, fewer than there are classes "
            f"({len(counts)}), but the router needs at least one of each."
        )
    if isinstance(split.dataset, Dataset):
        rows = split.dataset.select(sorted(drawn))
    else:
        rows = split.dataset.filter(IndexFilter(drawn), with_indices=True)
    sample = _check_classes(cache_images(replace(split, dataset=rows), transform, max_bad_images), split)
    return StreamedImages(split, transform, num_images, sample, max_bad_images)


def _check_classes(images: TaskImages, split: Split) -> TaskImages:
    """Requires an image of each class: a model whose router lacks a class does not load."""
    values = {position: value for value, position in split.labels.items()}
    missing = sorted(set(values) - set(images.labels.tolist()))
    if missing:
        value = values[missing[0]]
        raise StreamError(
            f"{split.title} has no decodable image of {len(missing)} of {len(values)} classes, such as the one with "
            f"{split.label_column}={value!r}. Every class needs images: add some, or leave the class out."
        )
    return images


def _count_and_sample(split: Split, per_class: int, seed: int) -> tuple[dict[int, int], set[int]]:
    """Image counts by class, and row indices of a uniform sample of each class (reservoir sampling)."""
    rng = np.random.default_rng(seed)
    counts: dict[int, int] = {}
    drawn: dict[int, list[int]] = {}
    rows = split.dataset.select_columns([split.label_column])
    for index, row in enumerate(rows):
        label = split.labels[row[split.label_column]]
        seen = counts[label] = counts.get(label, 0) + 1
        reservoir = drawn.setdefault(label, [])
        if seen <= per_class:
            reservoir.append(index)
        elif per_class and (slot := int(rng.integers(seen))) < per_class:
            reservoir[slot] = index
    return counts, {index for reservoir in drawn.values() for index in reservoir}


@contextmanager
def _silence_buffer_warning() -> Iterator[None]:
    """Mutes the warning of `datasets` that resuming loses the shuffle buffer; here it holds a single, used row."""
    logger = logging.getLogger("datasets.iterable_dataset")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
