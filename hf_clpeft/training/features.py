"""Feature extraction sharded over processes, and a cache of test features."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator

from ..backbones.views import augment
from ..model import ContinualModel
from ..streams import TaskImages
from ..streams.streamed import share_of
from .arguments import ContinualTrainingArguments
from .batches import on_device
from .processes import TrainingError
from .progress import progress_bar
from .trunk_cache import TrunkCaches


ABSENT = -1  # features that are not cached


@torch.no_grad()
def extract(
    images: TaskImages,
    rows: torch.Tensor,
    features_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    model: ContinualModel,
    accelerator: Accelerator,
    args: ContinualTrainingArguments,
    desc: str,
    caches: TrunkCaches | None = None,
) -> torch.Tensor:
    """Extracts features of images, sharded over the processes and gathered.

    Args:
        images ([`TaskImages`]): Resized images.
        rows (integer `torch.Tensor` of shape `(count,)`): Indices of one or more distinct images.
        features_of (callable): Maps normalised images `(batch, 3, height, width)` and their indices `(batch,)` to
            features `(batch, width)` or `(batch, N, width)`.
        model ([`ContinualModel`]): Provides the image transform.
        accelerator (`accelerate.Accelerator`): Shards the images.
        args ([`ContinualTrainingArguments`]): Batch size and progress bars.
        desc (`str`): Label of the progress bar.
        caches ([`TrunkCaches`], *optional*): Caches of the run.

    Returns:
        `torch.Tensor` of shape `(count, hidden_size)`, `float32`, on the CPU; the same on every process.
    """
    position = torch.full((len(images),), -1)
    position[rows] = torch.arange(len(rows))
    features: torch.Tensor | None = None
    order, size = rows.tolist(), args.eval_batch_size
    shares: list[list[list[int]]] = []  # of each batch, the rows of every process
    for batch in (order[start : start + size] for start in range(0, len(order), size)):
        parts = [share_of(batch, rank, accelerator.num_processes) for rank in range(accelerator.num_processes)]
        # Padded, as gather needs equal lengths.
        shares.append([part + batch[:1] * (len(parts[0]) - len(part)) for part in parts])
    own = [share[accelerator.process_index] for share in shares]
    loader = on_device(images.loader(own, **args.loading(len(own), accelerator.device)), accelerator)
    silent = args.disable_tqdm or not accelerator.is_main_process
    bar = progress_bar(loader, desc=desc, disable=silent, leave=False)
    for share, index, batch in zip(shares, own, bar, strict=True):
        pixel_values = model.backbone.transform.normalize(batch["pixels"])
        places = torch.tensor(index)
        recalling = nullcontext() if caches is None else caches.recalling(images, pixel_values, places)
        with accelerator.autocast(), recalling:
            found = features_of(pixel_values, places)
        # Padding repeats the first image of a batch; writing by position keeps one copy.
        found = accelerator.gather(found.float())
        if features is None:
            features = torch.full((len(rows), *found.shape[1:]), torch.nan, dtype=torch.float32)
        features[position[sum(share, [])]] = found.cpu()  # the only time that a batch waits for the device
    assert features is not None
    if features.isnan().any():
        raise TrainingError(
            "Features are not finite: an image was skipped, training has diverged (lower learning_rate), or the "
            "weights or mixed_precision=fp16 overflow (try bf16)."
        )
    return features


def extract_all(
    images: TaskImages,
    features_of: Callable[[torch.Tensor], torch.Tensor],
    model: ContinualModel,
    accelerator: Accelerator,
    args: ContinualTrainingArguments,
    desc: str,
    views: Sequence[torch.Tensor | None] = (None,),
    caches: TrunkCaches | None = None,
) -> torch.Tensor:
    """Features of all images, or of the given views of them; see [`extract`] and [`views_for_sums`]."""

    def of_views(pixels: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        seen = [features_of(augment(pixels, None if view is None else view[index])) for view in views]
        return seen[0] if len(seen) == 1 else torch.stack(seen, dim=1)

    return extract(images, torch.arange(len(images)), of_views, model, accelerator, args, desc, caches)


class TestFeatures:
    """Cache of features of one task's test images, as frozen backbone and experts never change.

    Features used by one evaluation are kept for the next. Which ones these are follows from the model alone, so that a
    resumed run, which computes them again, counts forward passes as an uninterrupted one would.

    Args:
        images ([`TaskImages`]): The task's test images.
        query (`torch.Tensor` of shape `(images, query_size)` or `(images, views, query_size)`): Their query features.

    Attributes:
        forwards (`int`): Number of expert forward passes of images so far.
    """

    __test__ = False  # not a test case for pytest

    def __init__(self, images: TaskImages, query: torch.Tensor):
        self.images, self.query = images, query
        self.labels = torch.from_numpy(images.labels)
        self.forwards = 0
        self.features = query.new_empty(0)
        # Maps row and expert to a position in features, or to ABSENT.
        self._where = torch.full((len(images), 0), ABSENT)
        self._used = torch.zeros_like(self._where, dtype=torch.bool)

    def drop_unused(self) -> None:
        """Evicts features that were not used since the last call."""
        self.features = self.features[self._where[self._used]]
        self._where = torch.full_like(self._where, ABSENT)
        self._where[self._used] = torch.arange(len(self.features))
        self._used.zero_()

    def evict(self, expert: int) -> None:
        """Evicts the features with one expert, which has changed."""
        self._where[:, expert : expert + 1] = ABSENT

    def forget(self, expert: int, forwards: int) -> None:
        """Evicts the features of a removed last expert, and resets the count of forward passes."""
        self.forwards = forwards
        self._where, self._used = self._where[:, :expert], self._used[:, :expert]

    def under(self, selection: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Features of every image with its selected expert applied.

        Args:
            selection (integer `torch.Tensor` of shape `(images,)`): Expert of each image.
            compute (callable): Computes the features of missing rows, which are sorted by expert.

        Returns:
            `torch.Tensor` of shape `(images, hidden_size)`.
        """
        every = self._make_room(selection)
        rows = every[self._where[every, selection] < 0]
        rows = rows[selection[rows].argsort(stable=True)]
        if len(rows):
            self.forwards += len(rows)
            self._where[rows, selection[rows]] = len(self.features) + torch.arange(len(rows))
            self.features = torch.cat([self.features, compute(rows)])
        self._used[every, selection] = True
        return self.features[self._where[every, selection]]

    def _make_room(self, selection: torch.Tensor) -> torch.Tensor:
        missing_experts = int(selection.max()) + 1 - self._where.shape[1]
        if missing_experts > 0:
            self._where = torch.nn.functional.pad(self._where, (0, missing_experts), value=ABSENT)
            self._used = torch.nn.functional.pad(self._used, (0, missing_experts))
        return torch.arange(len(selection))
