"""A cache of what the trunk gives for the images of a task, so that training and evaluation run it once per image."""

import math
import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import numpy as np
import torch

from ..backbones.trunk import Hidden
from ..config.text import get_logger
from ..experts import ExpertBank
from ..streams import TaskImages


logger = get_logger(__name__)


class TrunkCache:
    """Outputs of the trunk for images, in a memory-mapped file without a name, which vanishes with the process.

    Values keep their dtype, so that what is computed from them stays the same up to the order of sums.

    Args:
        count (`int`): Number of images.
        like ([`Hidden`]): Outputs for some of them.

    Raises:
        `OSError`: The disk is full.
    """

    def __init__(self, count: int, like: Hidden):
        folder = datasets.config.HF_DATASETS_CACHE  # where users expect large files, other than in a small /tmp
        os.makedirs(folder, exist_ok=True)
        self.layers, self.wrapped, shape = like.layers, like.wrapped, (count, *like.tokens.shape[1:])
        size = self.bytes_for(count, like)
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, and a crash later
            file.truncate(size)
            bytes_ = torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="r+", shape=(size,)))
        self.tokens = bytes_.view(like.tokens.dtype).view(shape)
        self.known = torch.zeros(count, dtype=torch.bool)

    @staticmethod
    def bytes_for(count: int, like: Hidden) -> int:
        """Size of the file in bytes."""
        return count * math.prod(like.tokens.shape[1:]) * like.tokens.element_size()

    def read(self, index: torch.Tensor, device: torch.device) -> Hidden | None:
        """The outputs for images, on their way to a device; `None` unless all of them are known."""
        if not self.known[index].all():
            return None
        tokens = self.tokens[index]
        if device.type == "cuda":
            tokens = tokens.pin_memory()  # from elsewhere, a copy blocks
        return Hidden(self.layers, tokens.to(device, non_blocking=True), self.wrapped)

    def write(self, index: torch.Tensor, hidden: Hidden) -> None:
        """Keeps the outputs for images, for which the CPU waits once."""
        self.tokens[index] = hidden.tokens.detach().to("cpu", self.tokens.dtype)
        self.known[index] = True


class TrunkCaches:
    """The caches of a run, each for one view of the images of a split, as long as these are in use.

    Args:
        bank ([`ExpertBank`]): Its experts decide how deep the trunk is; without one, nothing is cached.
        limit_gb (`float`): Largest size of all caches together in GB (1e9 bytes); 0 for none.
    """

    def __init__(self, bank: ExpertBank, limit_gb: float):
        self.bank, self.limit = bank, int(limit_gb * 1e9)
        self._caches: weakref.WeakKeyDictionary[TaskImages, dict[int, TrunkCache | None]] = weakref.WeakKeyDictionary()

    def depth_for(self, images: TaskImages) -> int:
        """The number of layers whose outputs are cached for images, as they are; 0 if there are none."""
        cache = self._caches.get(images, {}).get(0)
        return 0 if cache is None else cache.layers

    @contextmanager
    def recalling(
        self, images: TaskImages, pixels: torch.Tensor, index: torch.Tensor, view: int = 0
    ) -> Iterator[None]:
        """Context manager: passes over `pixels` start above the trunk if its outputs are known, else fill the cache.

        Args:
            images ([`TaskImages`]): Images of a split.
            pixels (`torch.Tensor` of shape `(batch, 3, height, width)`): Some of them, normalised.
            index (integer `torch.Tensor` of shape `(batch,)`): Their indices, on the CPU.
            view (`int`, *optional*): Which of their fixed views `pixels` are; default: the images as they are.
        """
        with self.bank.sharing() as trunk:
            if not (trunk.depth and self.limit):
                yield
                return
            caches = self._caches.setdefault(images, {})
            cache = caches.get(view)
            if cache is not None and cache.layers != trunk.depth:
                del caches[view]
                cache = None
            hidden = None if cache is None else cache.read(index, pixels.device)
            if hidden is not None:
                trunk.keep(pixels, hidden)
            yield
            found = trunk.find(pixels) if hidden is None else None
            if found is not None:
                if view not in caches:
                    cache = caches[view] = self._make(len(images), found)
                if cache is not None:
                    cache.write(index, found)

    def _make(self, count: int, like: Hidden) -> TrunkCache | None:
        """A cache for so many images, unless it is too large, which is said."""
        size = TrunkCache.bytes_for(count, like)
        made = (cache for caches in self._caches.values() for cache in caches.values())
        used = sum(cache.tokens.nbytes for cache in made if cache is not None)
        if used + size > self.limit:
            logger.info("The outputs of the trunk for %d images take %d MB, and are not cached.", count, size >> 20)
            return None
        try:
            return TrunkCache(count, like)
        except OSError as error:
            logger.warning("The outputs of the trunk are computed anew in every epoch: no cache of them (%s).", error)
            return None
