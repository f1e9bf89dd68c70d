"""Features of many images over all processes, and those of test images, each computed at most once."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..modeling import ContinualModel
from ..streams import TaskImages
from .arguments import ContinualTrainingArguments
from .processes import TrainingError


@torch.no_grad()
def extract(
    images: TaskImages,
    rows: torch.Tensor,
    features_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    model: ContinualModel,
    accelerator: Accelerator,
    args: ContinualTrainingArguments,
    desc: str,
) -> torch.Tensor:
    """Features of some images, every process doing its share.

    Args:
        images ([`TaskImages`]): Resized images.
        rows (integer `torch.Tensor` of shape `(count,)`): Which of them, each at most once, in this order; not none.
        features_of (callable): Takes normalised images `(batch, 3, height, width)` and their rows `(batch,)`, gives
            features `(batch, hidden_size)`.
        model ([`ContinualModel`]): Gives the image transform.
        accelerator (`accelerate.Accelerator`): Shares out the images.
        args ([`ContinualTrainingArguments`]): Batch size and progress bars.
        desc (`str`): Text of the progress bar.

    Returns:
        `torch.Tensor` of shape `(count, hidden_size)`, `float32`, on the CPU; the same on every process.
    """
    position = torch.full((len(images),), -1)
    position[rows] = torch.arange(len(rows))
    features: torch.Tensor | None = None
    batches: dict[str, Any] = {"batch_size": args.eval_batch_size, "rows": rows.tolist()}
    loader = images.loader(args.dataloader_num_workers, **batches)
    loader = accelerator.prepare_data_loader(loader)
    silent = args.disable_tqdm or not accelerator.is_main_process
    for batch in tqdm(loader, desc=desc, disable=silent, leave=False):
        pixel_values = model.backbone.transform.normalize(batch["pixels"])
        with accelerator.autocast():
            found = features_of(pixel_values, batch["index"].cpu())
        # Processes repeat images to even out the last batch; writing by position keeps each once.
        found, index = accelerator.gather((found.float(), batch["index"]))
        if features is None:
            features = torch.full((len(rows), found.shape[1]), torch.nan, dtype=torch.float32)
        features[position[index.cpu()]] = found.cpu()
    assert features is not None
    if features.isnan().any():
        raise TrainingError(
            "Features are not finite: an image was skipped, training has diverged (lower learning_rate), or the "
            "weights or mixed_precision=fp16 overflow (try bf16)."
        )
    return features


def extract_queries(
    images: TaskImages,
    model: ContinualModel,
    accelerator: Accelerator,
    args: ContinualTrainingArguments,
    desc: str,
) -> torch.Tensor:
    """Query features of all images: [`extract`] with what chooses experts.

    Returns:
        `torch.Tensor` of shape `(len(images), query_size)`, `float32`, on the CPU; the same on every process.
    """
    rows = torch.arange(len(images))
    return extract(images, rows, lambda pixels, _: model.query_features(pixels), model, accelerator, args, desc)


class TestFeatures:
    """Features of one task's test images: frozen backbone and frozen experts never change, so nothing is redone.

    Args:
        images ([`TaskImages`]): The task's test images.
        query (`torch.Tensor` of shape `(images, query_size)`): Their query features.
        query_cost (`float`): Forward passes that one of these took; less than 1 behind an earlier layer.
    """

    __test__ = False  # not a test case, whatever pytest makes of the name

    def __init__(self, images: TaskImages, query: torch.Tensor, query_cost: float):
        self.images, self.query = images, query
        self.labels = torch.from_numpy(images.labels)
        self.features = query.new_empty(0)
        self._where = torch.full((len(images), 0), -1)  # row and expert to position in features
        self.forwards = query_cost * len(images)

    def under(self, selection: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Features of every image under its selected experts.

        Args:
            selection (integer `torch.Tensor` of shape `(images,)` or `(images, N)`): Experts of each image; several
                come from a pool, which every task changes, so that nothing can be kept.
            compute (callable): Takes the rows that are missing, sorted by expert, and gives their features.

        Returns:
            `torch.Tensor` of shape `(images, hidden_size)`.
        """
        if selection.dim() == 2:
            self.forwards += len(selection)
            return compute(torch.arange(len(selection)))
        missing_experts = int(selection.max()) + 1 - self._where.shape[1]
        if missing_experts > 0:
            self._where = torch.nn.functional.pad(self._where, (0, missing_experts), value=-1)
        every = torch.arange(len(selection))
        rows = every[self._where[every, selection] < 0]
        rows = rows[selection[rows].argsort(stable=True)]
        if len(rows):
            self._where[rows, selection[rows]] = len(self.features) + torch.arange(len(rows))
            self.features = torch.cat([self.features, compute(rows)])
            self.forwards += len(rows)
        return self.features[self._where[every, selection]]

    def forget(self) -> None:
        """Drops what experts gave, for methods that train an expert again."""
        self.features, self._where = self.query.new_empty(0), self._where[:, :0]
