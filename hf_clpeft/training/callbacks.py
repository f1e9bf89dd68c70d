"""Callbacks of the trainer."""

from collections.abc import Iterable
from typing import Any

from ..model import ContinualModel
from ..streams import Task


class TrainerCallback:
    """Base class of callbacks; subclasses override the events that they need.

    An exception ends the training. Before `on_save`, model, report and folder are rolled back to the previous task.
    Events are called on every process, except `on_save` and `on_push`, which are called on the main process.

    Example:

    ```py
    >>> from hf_clpeft import ContinualModel, ContinualTrainer, ContinualTrainingArguments, TrainerCallback
    >>> from hf_clpeft import load_benchmark, s_lora

    >>> class Notice(TrainerCallback):
    ...     def on_task_end(self, model, task):
    ...         print(task.name, "is learnt")

    >>> model = ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", s_lora())
    >>> args = ContinualTrainingArguments(output_dir="out", num_train_epochs=1, disable_tqdm=True)
    >>> stream = load_benchmark("digits", max_train_samples_per_task=32, max_test_samples_per_task=8)
    >>> report = ContinualTrainer(model, args, callbacks=[Notice()]).learn(stream[0])
    task-000 is learnt

    ```
    """

    def on_task_begin(self, model: ContinualModel, task: Task) -> None:
        """Called before a task is learnt, while the model is unchanged."""

    def on_step_end(self, model: ContinualModel, step: int, num_steps: int) -> None:
        """Called after an optimizer step.

        Args:
            model ([`ContinualModel`]): `model.method.task` is the task.
            step (`int`): Steps of this task done, including those before a resume.
            num_steps (`int`): Total number of steps of this task.
        """

    def on_log(self, model: ContinualModel, values: dict[str, float], step: int) -> None:
        """Called when values are logged to trackers.

        Args:
            model ([`ContinualModel`]): The model.
            values (`dict[str, float]`): Values by name, such as `train/loss` or `eval/average_accuracy`.
            step (`int`): Optimizer steps of all tasks so far.
        """

    def on_evaluate(self, model: ContinualModel) -> None:
        """Called after an evaluation; the last row of `model.report.accuracy_matrix` is new."""

    def on_task_end(self, model: ContinualModel, task: Task) -> None:
        """Called after a task was learnt and evaluated, before it is saved."""

    def on_save(self, model: ContinualModel, folder: str) -> None:
        """Called after the model was saved to a folder."""

    def on_push(self, model: ContinualModel, repo_id: str, pending: int) -> None:
        """Called after a push to the Hub; `pending` tasks could not be pushed and stay queued."""


class CallbackList:
    """Calls several callbacks in order. Raises `TypeError` unless all are [`TrainerCallback`] objects."""

    def __init__(self, callbacks: Iterable[TrainerCallback]):
        self.callbacks = list(callbacks)
        for callback in self.callbacks:
            if not isinstance(callback, TrainerCallback):
                raise TypeError(f"callbacks has {callback!r}; give objects of subclasses of TrainerCallback.")

    def __call__(self, event: str, *args: Any) -> None:
        """Calls an event of all callbacks."""
        for callback in self.callbacks:
            getattr(callback, event)(*args)
