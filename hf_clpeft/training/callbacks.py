"""What a user may hook into the training of a stream."""

from collections.abc import Iterable
from typing import Any

from ..model import ContinualModel
from ..streams import Task


class TrainerCallback:
    """Base of callbacks: every method does nothing, and a subclass overrides those that it needs.

    An exception ends the training. Before `on_save`, it leaves model, report and folder as they were after the task
    before. Events happen on every process, but for `on_save` and `on_push`, which happen on the main one.

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
        """A task is about to be learnt; nothing of the model has changed yet."""

    def on_step_end(self, model: ContinualModel, step: int, num_steps: int) -> None:
        """An optimizer step was made.

        Args:
            model ([`ContinualModel`]): `model.method.task` is the task.
            step (`int`): How many steps of this task were made, those before a resume included.
            num_steps (`int`): How many there will be.
        """

    def on_log(self, model: ContinualModel, values: dict[str, float], step: int) -> None:
        """Something was measured that goes to trackers.

        Args:
            model ([`ContinualModel`]): The model.
            values (`dict[str, float]`): By name, such as `train/loss` or `eval/average_accuracy`.
            step (`int`): Optimizer steps of all tasks so far.
        """

    def on_evaluate(self, model: ContinualModel) -> None:
        """The model was evaluated on all tasks at hand; the last row of `model.report` is new."""

    def on_task_end(self, model: ContinualModel, task: Task) -> None:
        """A task was learnt and evaluated, and is about to be saved."""

    def on_save(self, model: ContinualModel, folder: str) -> None:
        """The model was saved into a folder."""

    def on_push(self, model: ContinualModel, repo_id: str, pending: int) -> None:
        """Tasks were pushed to a repo on the Hub, which may have left some pending for the next push."""


class CallbackList:
    """Callbacks, called in their order.

    Args:
        callbacks (iterable of [`TrainerCallback`]): Objects, not classes.

    Raises:
        `TypeError`: One of them is none.
    """

    def __init__(self, callbacks: Iterable[TrainerCallback]):
        self.callbacks = list(callbacks)
        for callback in self.callbacks:
            if not isinstance(callback, TrainerCallback):
                raise TypeError(f"callbacks has {callback!r}; give objects of subclasses of TrainerCallback.")

    def __call__(self, event: str, *args: Any) -> None:
        """Calls the method of that name."""
        for callback in self.callbacks:
            getattr(callback, event)(*args)
