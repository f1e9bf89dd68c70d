"""The plan of a run for `--dry_run`: images, trained parameters and steps of each task."""

from dataclasses import dataclass

from accelerate import PartialState
from datasets import Dataset

from ..config.text import printable
from ..model import ContinualModel
from ..reports.tables import print_table
from ..streams import Split, Task, TaskStream
from .arguments import ContinualTrainingArguments


@dataclass(frozen=True)
class PlannedTask:
    """Costs of one task.

    Args:
        task ([`Task`]): The task.
        learnt (`bool`): Whether the model has already learnt it.
        train_images (`int`, *optional*): Number of training images; `None` for a stream of unknown length.
        test_images (`int`, *optional*): Number of test images, likewise.
        expert_parameters (`int`): Trained parameters of experts and keys.
        head_parameters (`int`): Trained parameters of the head.
        steps (`int`, *optional*): Optimizer steps; `None` if `train_images` is.
    """

    task: Task
    learnt: bool
    train_images: int | None
    test_images: int | None
    expert_parameters: int = 0
    head_parameters: int = 0
    steps: int | None = 0


def make_plan(model: ContinualModel, stream: TaskStream, args: ContinualTrainingArguments) -> list[PlannedTask]:
    """Plans [`~ContinualTrainer.learn_stream`]. The model must not be used afterwards.

    Example:

    ```py
    >>> from hf_clpeft import ContinualModel, ContinualTrainingArguments, load_benchmark, s_lora
    >>> from hf_clpeft.training.plan import make_plan

    >>> model = ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", s_lora(r=1))
    >>> args = ContinualTrainingArguments(num_train_epochs=5, train_batch_size=32)
    >>> plan = make_plan(model, load_benchmark("digits"), args)
    >>> plan[0].train_images, plan[0].expert_parameters, plan[0].steps
    (288, 3072, 45)

    ```
    """
    known, planned = {task.name for task in model.config.tasks}, list[PlannedTask]()
    for task in stream:
        images, test_images = count(task.train), count(task.test)
        if task.name in known:
            planned.append(PlannedTask(task, True, images, test_images))
            continue
        model.start_task(task.name, task.classes, task.domain)
        steps = None if images is None else args.num_steps(-(-images // args.train_batch_size))
        if not model.method.trains or len(task.classes) == 1:
            steps = 0
        planned.append(PlannedTask(task, False, images, test_images, *model.method.costs(), steps))
        assert model.method.task is not None
        classes, begun = model.method.classes, model.method.task
        model.method.abandon()
        model.config.classes = classes
        model.config.tasks.append(begun)
    return planned


def count(split: Split | None) -> int | None:
    """Number of images of a split; `None` for a stream of unknown length."""
    return len(split.dataset) if split is not None and isinstance(split.dataset, Dataset) else None


def print_plan(model: ContinualModel, stream: TaskStream, args: ContinualTrainingArguments, closing: str) -> None:
    """Prints the result of [`make_plan`] and a closing line, on the main process."""
    if not PartialState().is_main_process:
        return
    method, backbone = model.config.method, model.config.backbone
    planned = make_plan(model, stream, args)
    rows = [
        [
            task.task.name,
            task.task.domain or ", ".join(task.task.classes),
            number(task.train_images),
            number(task.test_images),
            *(
                ["learnt", "", ""]
                if task.learnt
                else map(number, (task.expert_parameters, task.head_parameters, task.steps))
            ),
        ]
        for task in planned
    ]
    steps = [task.steps for task in planned if task.steps is not None]
    total = f"{sum(steps):,} steps" if len(steps) == len(planned) else "an unknown number of steps"
    print_table(
        f"{method.name} on {stream.name}: {len(planned)} task{'s' * (len(planned) > 1)}",
        ["task", "classes or domain", "train", "test", "expert", "head", "steps"],
        rows,
        f"{total} of {args.train_batch_size} images; parameters are those that are trained.\n"
        f"backbone: {backbone.name_or_path}, {backbone.image_size} px\n"
        f"goes to: {args.output_dir}" + (f" and {args.push_repo} on the Hub" if args.push_repo else ""),
    )
    print(printable(closing), flush=True)


def number(value: int | None) -> str:
    """A number with thousands separators; a question mark for `None`."""
    return "?" if value is None else f"{value:,}"
