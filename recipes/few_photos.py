"""Measures what a model learns from a few photos of each new class, and what it costs: CSV out.

    python recipes/few_photos.py --model my/pacs-model --new_images my/caltech101 --old_images my/pacs

Lessons are those of the demo. Every class is taught to the model alone, and then all of them are, one after another.
After a lesson, `recognised` is the share of new photos of all classes taught so far that get the name of their class,
and `changed` the share of photos of what was known before that get another name than before any lesson. Photos of a
lesson are training images, all others test images; nothing is rejected. A second model of the same command adds rows.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image

from hf_clpeft import ConfigError, ContinualModel
from hf_clpeft.comparing import read_rows, write_rows
from hf_clpeft.config.checks import MOST, check_ranges, check_types
from hf_clpeft.config.errors import errors_in_one_line
from hf_clpeft.demo.models import Models
from hf_clpeft.demo.teaching import FEWEST, teach
from hf_clpeft.reports.versions import library_versions
from hf_clpeft.streams import Split, load_task
from hf_clpeft.streams.images import decode
from hf_clpeft.training.parsing import OptionParser


BATCH = 64
AFTER = (1, 5, 10, 20, 50)  # lessons in a row, and after the last


@dataclass
class FewPhotosArguments:
    model: str = field(metadata={"help": "Repo id or folder of the model to teach."})
    new_images: str = field(metadata={"help": "Data set of the classes to teach."})
    old_images: str = field(metadata={"help": "Data set of what the model knows."})
    backbone: str | None = field(default=None, metadata={"help": "Repo id or folder of its backbone, if it moved."})
    num_classes: int = field(default=10, metadata={"help": "Number of classes to teach, drawn at random."})
    photos: int = field(default=5, metadata={"help": "Photos of each lesson."})
    new_photos: int = field(default=7, metadata={"help": "New photos of each class."})
    old_photos: int = field(default=200, metadata={"help": "Photos of what is known."})
    seed: int = field(default=0, metadata={"help": "Decides which classes and photos are drawn."})
    results: str = field(default="out/few_photos.csv", metadata={"help": "The CSV."})

    def __post_init__(self):
        check_types(self)
        counts = dict.fromkeys(("num_classes", "new_photos", "old_photos"), (1, MOST))
        check_ranges(self, photos=(FEWEST, MOST), **counts)


class Photos:
    """Photos of a split by class."""

    def __init__(self, split: Split, classes: tuple[str, ...]):
        self.split = split
        numbers = np.array([split.labels[value] for value in split.dataset[split.label_column]])
        self.rows = {name: np.flatnonzero(numbers == number).tolist() for number, name in enumerate(classes)}

    def draw(self, rng: random.Random, count: int, *names: str) -> list[PIL.Image.Image]:
        """At most so many photos of some classes together."""
        rows = sorted(row for name in names for row in self.rows.get(name, []))
        encoded = self.split.dataset.select(rng.sample(rows, min(count, len(rows))))[self.split.image_column]
        return [decode(image).convert("RGB") for image in encoded]


def photos_of(dataset: str) -> tuple[Photos, Photos]:
    """Training and test images of a data set."""
    task = load_task(dataset, "photos")
    if task.test is None:
        raise ConfigError(f"{dataset} has no test images.")
    return Photos(task.train, task.classes), Photos(task.test, task.classes)


def labels_of(model: ContinualModel, photos: list[PIL.Image.Image]) -> list[str]:
    batches = [photos[start : start + BATCH] for start in range(0, len(photos), BATCH)]
    return [prediction.label for batch in batches for prediction in model.predict(batch)]


def measure(args: FewPhotosArguments) -> Iterator[dict]:
    """The rows of one model, each as soon as it is known."""
    rng, models = random.Random(args.seed), Models(args.model, backbone=args.backbone)
    (lessons, news), (_, olds) = photos_of(args.new_images), photos_of(args.old_images)
    known = dict.fromkeys(models.served.config.classes)
    enough = [
        name
        for name, rows in lessons.rows.items()
        if name not in known and len(rows) >= args.photos and len(news.rows[name]) >= args.new_photos
    ]
    if len(enough) < args.num_classes:
        raise ConfigError(
            f"num_classes={args.num_classes} is more than the {len(enough)} classes of {args.new_images} that the "
            f"model does not know and that have {args.photos} training and {args.new_photos} test images."
        )
    taught = {
        name: (lessons.draw(rng, args.photos, name), news.draw(rng, args.new_photos, name))
        for name in sorted(rng.sample(enough, args.num_classes))
    }
    old = olds.draw(rng, args.old_photos, *known)
    if not old:
        raise ConfigError(f"{args.old_images} has no test image of a class that the model knows, {[*known][:3]}.")
    before = labels_of(models.served, old)

    def shares(key: str, names: list[str]) -> tuple[float, float]:
        model = models.get(key)
        wanted = [name for name in names for _ in taught[name][1]]
        found = labels_of(model, [photo for name in names for photo in taught[name][1]])
        after = labels_of(model, old)
        return float(np.equal(found, wanted).mean()), float(np.not_equal(after, before).mean())

    def row(mode: str, lessons: int, recognised: float, changed: float) -> dict:
        backbone, config = models.served.backbone, models.served.config
        return {
            "benchmark": Path(args.old_images).name,
            "method": config.method.name,
            "seed": args.seed,
            "model": "/".join(Path(args.model).parts[-2:]),
            "router": getattr(config.method, "router", "") or models.served.method.which_router,
            "training_images": sum(task.num_train_images or 0 for task in config.tasks),
            "new": Path(args.new_images).name,
            "mode": mode,
            "lessons": lessons,
            "photos": args.photos,
            "recognised": round(recognised, 4),
            "new_photos": args.new_photos * (args.num_classes if mode == "alone" else lessons),
            "changed": round(changed, 4),
            "old_photos": len(old),
            "weight_hash": backbone.config.weight_hash,
            "image_size": backbone.input_shape[-1],
            "device": str(backbone.device),
            "versions": str(library_versions()),
        }

    def lesson(key: str, name: str) -> str:
        return teach(models, key, {name: taught[name][0]}).key

    alone = [shares(lesson("", name), [name]) for name in taught]
    yield row("alone", 1, *np.mean(alone, axis=0).tolist())
    key = ""
    for count, name in enumerate(taught, 1):
        key = lesson(key, name)
        if count in AFTER or count == len(taught):
            yield row("in a row", count, *shares(key, list(taught)[:count]))


def main():
    (args,) = OptionParser((FewPhotosArguments,)).read()
    results = Path(args.results)
    for row in measure(args):
        print(row, flush=True)
        write_rows([*read_rows(results), row], results)


if __name__ == "__main__":
    with errors_in_one_line():
        main()
