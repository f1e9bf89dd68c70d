"""A short search of the learning rates of expert and head, on held-out training images."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from datasets import Dataset

from ..config.errors import ConfigError
from ..model import ContinualModel
from ..streams import Split, Task, TaskStream
from ..streams.source import StreamError
from ..streams.task import hold_out as hold_out_rows
from .arguments import ContinualTrainingArguments
from .trainer import ContinualTrainer


LEARNING_RATES = (1e-3, 5e-3, 2e-2)
HEAD_LEARNING_RATES = (2e-3, 1e-2)
HELD_OUT = 0.2


class Trial(NamedTuple):
    """Accuracy on held-out images, with oracle routing where experts belong to tasks, and the rates tried."""

    accuracy: float
    learning_rate: float
    head_learning_rate: float


def judged_by_its_own(task: Task, seed: int = 0) -> Task:
    """A task with a fifth of its training images, of each class, as its test images.

    Raises:
        [`StreamError`]: There are too few images to hold any out, or they are streamed.
    """
    rows = task.train.dataset
    if not isinstance(rows, Dataset):
        raise StreamError("Learning rates are chosen on held-out images, and streamed ones cannot be held out.")
    train, held_out = hold_out_rows(np.array(list(rows[task.train.label_column])), HELD_OUT, seed)
    if not len(held_out):
        raise StreamError(f"{task.train.title}: learning rates are chosen on held-out images, and each class has one.")
    parts: list[Split] = [replace(task.train, dataset=rows.select(part)) for part in (train, held_out)]
    return replace(task, train=parts[0], test=parts[1])


def tune(
    tasks: Sequence[Task],
    new_model: Callable[[], ContinualModel],
    args: ContinualTrainingArguments,
    learning_rates: Sequence[float] = LEARNING_RATES,
    head_learning_rates: Sequence[float] = HEAD_LEARNING_RATES,
    after_trial: Callable[[Trial], object] = lambda trial: None,
) -> list[Trial]:
    """Learns the tasks once for every pair of learning rates, and measures on a fifth of their training images.

    No test image is looked at, so that what is chosen is fair to report on.

    Args:
        tasks (sequence of [`Task`]): The first tasks of a stream. One is enough where each has an expert of its own.
        new_model (callable): Makes a model without tasks.
        args ([`ContinualTrainingArguments`]): All other arguments; nothing is pushed, and `output_dir` is not used.
        learning_rates (sequence of `float`, *optional*): Learning rates of the expert to try.
        head_learning_rates (sequence of `float`, *optional*): Those of the head.
        after_trial (callable, *optional*): Called with every [`Trial`].

    Returns:
        `list[Trial]`: See [`best_of`].

    Raises:
        [`ConfigError`]: The method makes no optimizer steps.

    Example:

    ```py
    >>> from hf_clpeft import ContinualModel, ContinualTrainingArguments, load_benchmark, s_lora
    >>> from hf_clpeft.training.tuning import tune

    >>> stream = load_benchmark("digits", max_train_samples_per_task=40)
    >>> args = ContinualTrainingArguments(num_train_epochs=2, train_batch_size=8, disable_tqdm=True)
    >>> new_model = lambda: ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", s_lora(k=1))
    >>> [trial.learning_rate for trial in tune(stream[:1], new_model, args, [1e-3, 1e-2], [1e-2])]
    [0.001, 0.01]

    ```
    """
    judged = TaskStream([judged_by_its_own(task, args.seed) for task in tasks], f"first {len(tasks)} tasks")
    trials = []
    for head_rate, rate in product(head_learning_rates, learning_rates):
        model = new_model()
        if not model.method.trains:
            raise ConfigError(
                f"{model.method.name} with these options makes no optimizer steps: there are no rates to choose."
            )
        with TemporaryDirectory() as folder:  # nobody needs the models
            own = {"output_dir": folder, "push_to_hub": False, "resume_from_checkpoint": None}
            chosen = replace(args, **own, learning_rate=rate, head_learning_rate=head_rate)  # type: ignore[arg-type]
            summary = ContinualTrainer(model, chosen).learn_stream(judged).summary()
        trials.append(Trial(summary.get("oracle_accuracy", summary["average_accuracy"]), rate, head_rate))
        after_trial(trials[-1])
    return trials


def best_of(trials: Sequence[Trial]) -> Trial:
    """The best trial; of equal ones the middle: as far as can be from what is too little and what is too much.

    Example:

    ```py
    >>> from hf_clpeft.training.tuning import Trial, best_of

    >>> best_of([Trial(0.9, 1e-3, 0.01), Trial(0.9, 5e-3, 0.01), Trial(0.9, 2e-2, 0.01)]).learning_rate
    0.005

    ```
    """
    best = sorted(trial for trial in trials if trial.accuracy == max(trials).accuracy)
    return best[(len(best) - 1) // 2]
