"""Takes the pictures that a model carries from the tasks that it learns: thumbnails and examples, if asked for."""

import io
from collections.abc import Iterator
from itertools import chain, islice, zip_longest

import PIL.Image
import torch
from datasets import Dataset

from ..backbones.pictures import PictureError
from ..config.text import get_logger
from ..model import ContinualModel
from ..storage.pictures import EXAMPLES, example_file, task_of, thumbnails_file
from ..streams import Split, Task
from ..streams.images import decode
from .arguments import ContinualTrainingArguments
from .callbacks import TrainerCallback


logger = get_logger(__name__)

SIDE = 64  # pixels of a thumbnail
LONGEST = 256  # pixels of the longer side of an example
LOOKED_AT = 96  # training images among which the nearest to a prototype is looked for


class KeepPictures(TrainerCallback):
    """Keeps `num_thumbnails` training pictures of every task, and `num_examples` test pictures of all tasks together.

    Thumbnails are the training pictures nearest to the points of the router, such as prototypes, among a sample.
    Examples are spread over tasks and classes. Streamed data sets, which have no single pictures, give none.

    Args:
        args ([`ContinualTrainingArguments`]): How many; with `hub_private_repo`, no examples.

    Example:

    ```py
    >>> from hf_clpeft import ContinualModel, ContinualTrainer, ContinualTrainingArguments, load_benchmark, s_lora

    >>> model = ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", s_lora())
    >>> args = ContinualTrainingArguments("out", 1, num_thumbnails=3, num_examples=2, disable_tqdm=True)
    >>> stream = load_benchmark("digits", max_train_samples_per_task=32, max_test_samples_per_task=8)
    >>> report = ContinualTrainer(model, args).learn(stream[0])
    >>> sorted(model.pictures)
    ['examples/task-000-0.jpg', 'examples/task-000-1.jpg', 'thumbnails/task-000.jpg']

    ```
    """

    def __init__(self, args: ContinualTrainingArguments):
        self.num_thumbnails = args.num_thumbnails
        self.num_examples = 0 if args.hub_private_repo else args.num_examples

    def on_task_end(self, model: ContinualModel, task: Task) -> None:
        """Adds the pictures of a task."""
        if self.num_thumbnails and isinstance(task.train.dataset, Dataset):
            pictures = list(islice(_pictures(task.train), max(LOOKED_AT, self.num_thumbnails)))
            model.pictures[thumbnails_file(task.name)] = strip(nearest(model, pictures)[: self.num_thumbnails])
        split = task.test or task.train
        if self.num_examples and isinstance(split.dataset, Dataset):
            share = -(-self.num_examples // len(model.config.tasks))
            for number, picture in enumerate(islice(_pictures(split), share)):
                picture.thumbnail((LONGEST, LONGEST))
                model.pictures[example_file(task.name, number)] = _jpeg(picture)
            self._share_out(model)

    def _share_out(self, model: ContinualModel) -> None:
        """Takes examples from the tasks that have most, the latest first, until there are not too many."""
        paths: dict[str, list[str]] = {}
        for path in sorted(model.pictures):
            if path.startswith(f"{EXAMPLES}/"):
                paths.setdefault(task_of(path) or "", []).append(path)
        for _ in range(sum(map(len, paths.values())) - self.num_examples):
            del model.pictures[max(reversed(paths.values()), key=len).pop()]


def nearest(model: ContinualModel, pictures: list[PIL.Image.Image]) -> list[PIL.Image.Image]:
    """Pictures of the last task: first the nearest to each point of the router, busiest point first; then the rest."""
    router, owner = model.router, len(model.config.tasks) - 1
    points, owners = (None, None) if router is None else router.points()
    own = torch.zeros(0) if points is None or owners is None or not len(points) else points[owners == owner].cpu()
    if not len(own) or not pictures:
        return pictures
    transform, found = model.backbone.transform, []
    for start in range(0, len(pictures), 32):
        pixels = torch.from_numpy(transform.resize(pictures[start : start + 32])).to(model.device)
        with torch.no_grad():
            query = model.method.query(transform.normalize(pixels))
        found.append((query if query.dim() == 2 else query[:, 0]).float().cpu())
    far = torch.cdist(torch.nn.functional.normalize(torch.cat(found), dim=-1), own.float())
    busy = far.argmin(dim=1).bincount(minlength=len(own)).argsort(descending=True, stable=True)
    first = list(dict.fromkeys(far[:, busy].argmin(dim=0).tolist()))
    return [pictures[i] for i in chain(first, (i for i in range(len(pictures)) if i not in set(first)))]


def strip(pictures: list[PIL.Image.Image]) -> bytes:
    """Square thumbnails beside each other, as one JPEG file.

    Example:

    ```py
    >>> import io
    >>> from PIL import Image
    >>> from hf_clpeft.training.pictures import strip

    >>> Image.open(io.BytesIO(strip([Image.new("RGB", (200, 100))] * 3))).size
    (192, 64)

    ```
    """
    sheet = PIL.Image.new("RGB", (SIDE * len(pictures), SIDE))
    for place, picture in enumerate(pictures):
        sheet.paste(picture.resize((SIDE, SIDE), PIL.Image.Resampling.LANCZOS), (SIDE * place, 0))
    return _jpeg(sheet)


def _pictures(split: Split) -> Iterator[PIL.Image.Image]:
    """Pictures of a split, one of each class in turn; what cannot be decoded is left out."""
    rows: dict = {}
    for row, label in enumerate(split.dataset[split.label_column]):
        rows.setdefault(split.labels[label], []).append(row)
    turns = zip_longest(*(rows[number] for number in sorted(rows)))
    for row in (row for turn in turns for row in turn if row is not None):
        try:
            yield decode(split.dataset[row][split.image_column])
        except PictureError:
            continue


def _jpeg(picture: PIL.Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()
