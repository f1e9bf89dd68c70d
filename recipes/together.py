"""What training tasks together saves: S-LoRA experts of several tasks, one after another and in mixed batches.

    python recipes/together.py --model hf-clpeft/vit-tiny-glyphs --threads 1
    python recipes/together.py --model my/vit-s14 --image_size 112 --batch_sizes 2 4 8 --threads 1
    python recipes/together.py --model vit_b16 --batch_sizes 8 16 32 64 --together 1 4 8 16   # on a GPU

Whole runs of the trainer, of which the training of experts is timed. All settings take turns, so that a slow moment of
the machine hits them alike, and seconds are medians. `speed_up` is relative to one task after another with the same
batches. Images are noise: speed does not depend on them. Writes `together.csv`.
"""

import csv
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from throughput import SHAPES, environment_of, make_backbone

from hf_clpeft import (
    Backbone,
    ContinualConfig,
    ContinualModel,
    ContinualTrainer,
    ContinualTrainingArguments,
    TaskStream,
    load_backbone,
    s_lora,
)
from hf_clpeft.config.checks import MOST, check_ranges, check_types
from hf_clpeft.config.errors import errors_in_one_line
from hf_clpeft.training.parsing import OptionParser
from hf_clpeft.training.progress import disable_progress_bars


LINE = "{batch_size:4d} images of each of {together:3d} tasks{images_per_second:10.1f} images/s{speed_up:8.2f}x"


@dataclass
class TogetherArguments:
    model: str = field(default="tiny", metadata={"help": f"One of {', '.join(SHAPES)}, or a repo id or folder."})
    image_size: int | None = field(default=None, metadata={"help": "Side of the input in pixels, for a repo id."})
    tasks: int = field(default=8, metadata={"help": "Number of tasks, of two classes each."})
    images: int = field(default=32, metadata={"help": "Training images of each task."})
    epochs: int = field(default=1, metadata={"help": "Passes over them."})
    batch_sizes: list[int] = field(default_factory=lambda: [2, 4, 8, 16], metadata={"help": "Images per batch."})
    together: list[int] = field(default_factory=lambda: [1, 2, 4, 8], metadata={"help": "Tasks trained at once."})
    repeats: int = field(default=5, metadata={"help": "Counted runs of each setting, after one that is not."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads."})
    output_dir: str = field(default="out/together", metadata={"help": "Folder for the CSV."})

    def __post_init__(self):
        check_types(self)
        check_ranges(self, tasks=(1, 1000), images=(2, MOST), epochs=(1, MOST), repeats=(1, MOST), threads=(1, 4096))


def noise(args: TogetherArguments, size: int) -> TaskStream:
    """Tasks of two classes each, without test images."""
    rng, count = np.random.default_rng(0), args.tasks * args.images
    images = [PILImage.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(count)]
    labels = [2 * (i // args.images) + i % 2 for i in range(count)]
    names = [f"class {number}" for number in range(2 * args.tasks)]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    data = Dataset.from_dict({"image": images, "label": labels}, features=features)
    return TaskStream.class_incremental({"train": data}, num_tasks=args.tasks)


def run(backbone: Backbone, stream: TaskStream, args: TogetherArguments, batch_size: int, together: int) -> float:
    """Seconds in which all tasks are trained."""
    model = ContinualModel(backbone, ContinualConfig(s_lora(k=1), backbone.config))
    with tempfile.TemporaryDirectory() as folder:
        options = {"num_train_epochs": args.epochs, "train_batch_size": batch_size, "save_steps": 0}
        trainer = ContinualTrainer(model, ContinualTrainingArguments(folder, disable_tqdm=True, **options))
        report = trainer.learn_stream(stream, together=together)
    return sum(parts["train"] for parts in report.seconds)


def main():
    (args,) = OptionParser((TogetherArguments,)).read()
    if args.threads:
        torch.set_num_threads(args.threads)
    disable_progress_bars()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sized = args.model not in SHAPES and args.image_size is not None
    backbone = load_backbone(args.model, image_size=args.image_size) if sized else make_backbone(args.model)
    backbone, stream = backbone.to(device), noise(args, backbone.input_shape[-1])
    rows, folder, start = [], Path(args.output_dir), time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    for batch_size in args.batch_sizes:
        seconds: dict[int, list[float]] = {together: [] for together in args.together}
        for repeat in range(-1, args.repeats):
            for together, times in seconds.items():
                taken = run(backbone, stream, args, batch_size, together)
                times += [taken] if repeat >= 0 else []
        medians = {together: statistics.median(times) for together, times in seconds.items()}
        for together, median in medians.items():
            row = {"together": together, "batch_size": batch_size, "tasks": args.tasks, "images": args.images}
            row |= {"images_per_second": round(args.tasks * args.images * args.epochs / median, 2)}
            row |= {"speed_up": round(medians[args.together[0]] / median, 3), "repeats": args.repeats}
            rows.append(
                row | {"image_size": backbone.input_shape[-1]} | environment_of(Path(args.model).name, backbone)
            )
            print(LINE.format(**row), flush=True)
        with open(folder / "together.csv", "w", newline="", encoding="utf-8") as file:  # after every batch size
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    print(f"results: {folder / 'together.csv'}    after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
