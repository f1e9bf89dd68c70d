"""Images to pixels: decoded, resized and cached on disk once, normalised on the device."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Value, concatenate_datasets
from datasets.exceptions import DatasetGenerationError

from ..backbones.pictures import READER_VERSION, PictureError, open_image
from ..backbones.transform import ImageTransform
from ..config.text import get_logger
from .source import ROW, StreamError
from .task import Split


logger = get_logger(__name__)

BAD = -1  # label of an image that cannot be decoded
MAX_LISTED = 5  # undecodable images listed in a message

decode = open_image  # of the rows of `datasets.Image(decode=False)`


class TaskImages(torch.utils.data.Dataset):
    """Resized images of a split, read in batches from a memory-mapped Arrow file.

    Args:
        dataset (`datasets.Dataset`): Columns `pixels` (bytes) and `label`.
        shape (`tuple[int, int, int]`): Channels, height and width of an image.
    """

    def __init__(self, dataset: Dataset, shape: tuple[int, int, int]):
        self.dataset, self.shape = dataset, shape
        self.labels = np.asarray(dataset["label"][:], dtype=np.int64)

    @classmethod
    def joined(cls, parts: Sequence["TaskImages"], numbers: Sequence[np.ndarray]) -> "TaskImages":
        """Concatenates the images of several splits; `numbers` maps the old to the new labels of each."""
        images = cls(concatenate_datasets([part.dataset for part in parts]), parts[0].shape)
        images.labels = np.concatenate([new[part.labels] for part, new in zip(parts, numbers, strict=True)])
        return images

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """A batch: `pixels` of shape `(batch, 3, height, width)`, `label` and `index` of shape `(batch,)`.

        Once the batch is on a GPU, `rows` still has the index in the memory of the host, as an array.
        """
        rows = self.dataset[list(indices)]["pixels"]
        pixels = np.stack([np.frombuffer(row, dtype=np.uint8).reshape(self.shape) for row in rows])
        index = np.asarray(indices)
        return {
            "pixels": torch.from_numpy(pixels),
            "label": torch.from_numpy(self.labels[index]),
            "index": torch.from_numpy(index),
            "rows": index,
        }

    def loader(self, batch_sampler: Iterable[list[int]], **options: Any) -> torch.utils.data.DataLoader:
        """A `DataLoader` of the batches whose indices `batch_sampler` yields, with its options."""
        options["batch_sampler"] = batch_sampler
        return torch.utils.data.DataLoader(self, collate_fn=_identity, **options)


def _identity(batch: Any) -> Any:
    return batch


_FEATURES = Features({"pixels": Value("binary"), "label": Value("int64")})


def cache_images(split: Split, transform: ImageTransform, max_bad_images: int = 0) -> TaskImages:
    """Decodes and resizes the images of a split into an Arrow file in the cache of `datasets`.

    Later calls with the same split and transform read that file, in other runs, too.

    Args:
        split ([`Split`]): Encoded images.
        transform ([`ImageTransform`]): How to resize them.
        max_bad_images (`int`, *optional*, defaults to 0): Skip up to this many undecodable images, with a warning
            that lists them.

    Returns:
        [`TaskImages`]

    Raises:
        [`StreamError`]: More images than that cannot be decoded (the message names data set, split and rows), or
            reading the stream fails.

    Example:

    ```py
    >>> from hf_clpeft.backbones import load_backbone
    >>> from hf_clpeft.streams import cache_images, load_benchmark

    >>> task = load_benchmark("digits")[0]
    >>> images = cache_images(task.test, load_backbone("hf-clpeft/vit-tiny-glyphs").transform)
    >>> images[0]["pixels"].shape
    torch.Size([3, 32, 32])

    ```
    """
    arguments = {
        "transform": transform,
        "image_column": split.image_column,
        "label_column": split.label_column,
        "labels": split.labels,
        "reader": READER_VERSION,
    }
    if isinstance(split.dataset, Dataset):
        cached = split.dataset.map(
            to_pixels,
            batched=True,
            batch_size=64,
            fn_kwargs=arguments,
            remove_columns=split.dataset.column_names,
            features=_FEATURES,
            desc="Resizing images",
        )
    else:
        rows = split.dataset.map(
            to_pixels, batched=True, batch_size=64, fn_kwargs=arguments, remove_columns=split.dataset.column_names
        )
        try:
            cached = Dataset.from_generator(_rows, gen_kwargs={"rows": rows}, features=_FEATURES)
        except DatasetGenerationError as error:
            raise StreamError(f"{split.title}: reading the stream failed: {error.__cause__}") from error
    cached = _drop_bad(cached, split.title, max_bad_images)
    return TaskImages(cached, transform.shape)


def _rows(rows: Iterable[dict]) -> Iterator[dict]:
    yield from rows


def to_pixels(
    batch: dict, transform: ImageTransform, image_column: str, label_column: str, labels: dict, reader: int = 0
) -> dict:
    """Decodes rows to columns `pixels` and `label`; undecodable ones get the error message and the label [`BAD`].

    `datasets` caches the result by a fingerprint of all arguments, so the `reader` version invalidates old caches.
    """
    pixels, numbers = [], []
    for encoded, value, row in zip(batch[image_column], batch[label_column], batch[ROW], strict=True):
        try:
            pixels.append(transform.resize([decode(encoded)]).tobytes())
            numbers.append(labels[value])
        except PictureError as error:
            pixels.append(f"row {row}: the image cannot be decoded ({error})".encode())
            numbers.append(BAD)
    return {"pixels": pixels, "label": numbers}


def _drop_bad(images: Dataset, title: str, most: int) -> Dataset:
    labels = np.asarray(images["label"][:])
    bad = np.flatnonzero(labels == BAD)
    if not len(bad):
        return images
    listed = "; ".join(row.decode() for row in images.select(bad[:MAX_LISTED])["pixels"])
    listed += "; ..." if len(bad) > MAX_LISTED else ""
    if len(bad) > most or len(bad) == len(labels):
        raise StreamError(
            f"{title}, {listed}. These are {len(bad)} of {len(labels)} images. Mend them or take them out, "
            f"or skip them with --max_bad_images {len(bad)}."
        )
    logger.warning("%s, %s. Skipping %d of %d images.", title, listed, len(bad), len(labels))
    return images.select(np.flatnonzero(labels != BAD))
