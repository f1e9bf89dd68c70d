"""What a user may hook into the training of a stream."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..reports.report import StreamReport


if TYPE_CHECKING:
    from ..streams import Task
    from .trainer import ContinualTrainer


class TrainerCallback:
    """Base of callbacks: every method does nothing, and a subclass overrides those that it needs.

    What a callback raises ends the training, and the model is as it was after the task before. Events happen on every
    process, but for `on_save` and `on_push`, which happen on the main one.

    Example:

    ```py
    >>> from hf_clpeft import ContinualModel, ContinualTrainer, ContinualTrainingArguments, TrainerCallback
    >>> from hf_clpeft import load_benchmark, s_lora

    >>> class Notice(TrainerCallback):
    ...     def on_task_end(self, trainer, task, report):
    ...         print(task.name, "is learnt")

    >>> model = ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", s_lora())
    >>> args = ContinualTrainingArguments(output_dir="out", num_train_epochs=1, disable_tqdm=True)
    >>> stream = load_benchmark("digits", max_train_samples_per_task=32, max_test_samples_per_task=8)
    >>> report = ContinualTrainer(model, args, callbacks=[Notice()]).learn(stream[0])
    task-000 is learnt

    ```
    """

    def on_task_begin(self, trainer: "ContinualTrainer", task: "Task") -> None:
        """A task is about to be learnt; nothing of the model has changed yet.

        Args:
            trainer ([`ContinualTrainer`]): `trainer.model` is the model.
            task ([`Task`]): The task.
        """

    def on_step_end(self, trainer: "ContinualTrainer", step: int, num_steps: int) -> None:
        """An optimizer step was made.

        Args:
            trainer ([`ContinualTrainer`]): `trainer.model.method.task` is the task.
            step (`int`): How many of this task, those before a resume included.
            num_steps (`int`): How many there will be.
        """

    def on_log(self, trainer: "ContinualTrainer", values: dict[str, float], step: int) -> None:
        """Something was measured that goes to trackers.

        Args:
            trainer ([`ContinualTrainer`]): The trainer.
            values (`dict[str, float]`): By name, such as `train/loss` or `eval/average_accuracy`.
            step (`int`): Optimizer steps of all tasks so far.
        """

    def on_evaluate(self, trainer: "ContinualTrainer", report: StreamReport) -> None:
        """The model was evaluated on all tasks at hand.

        Args:
            trainer ([`ContinualTrainer`]): The trainer.
            report ([`StreamReport`]): Its last row is new.
        """

    def on_task_end(self, trainer: "ContinualTrainer", task: "Task", report: StreamReport) -> None:
        """A task was learnt and evaluated, and is about to be saved.

        Args:
            trainer ([`ContinualTrainer`]): The trainer.
            task ([`Task`]): The task.
            report ([`StreamReport`]): Of all tasks.
        """

    def on_save(self, trainer: "ContinualTrainer", folder: str) -> None:
        """The model was saved.

        Args:
            trainer ([`ContinualTrainer`]): The trainer.
            folder (`str`): Where.
        """

    def on_push(self, trainer: "ContinualTrainer", repo_id: str, pending: int) -> None:
        """Tasks were pushed to the Hub, as far as it took them.

        Args:
            trainer ([`ContinualTrainer`]): The trainer.
            repo_id (`str`): Where to.
            pending (`int`): Tasks that wait for the next push.
        """


class CallbackList(TrainerCallback):
    """Calls all of its callbacks in their order.

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

    def _call(self, event: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(*args)


def _forward(event: str) -> Any:
    def call(self: CallbackList, *args: Any) -> None:
        self._call(event, *args)

    return call


for _event in [name for name in vars(TrainerCallback) if name.startswith("on_")]:
    setattr(CallbackList, _event, _forward(_event))
