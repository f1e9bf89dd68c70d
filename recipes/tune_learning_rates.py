"""Chooses the learning rates of expert and head on the first task of a stream, a fifth of its images held out.

    python recipes/tune_learning_rates.py --benchmark digits --method s_lora --learning_rates 1e-3 5e-3 2e-2

No test image and no later task is looked at, so that what is chosen is fair to report on. Prints the options to use
and writes every trial to `tuning.csv` in the output folder.
"""

import csv
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from hf_clpeft import METHODS, ContinualTrainingArguments, Task, TaskStream
from hf_clpeft.training.recipe import BackboneArguments, StreamArguments, learn, parse


@dataclass
class TuningArguments:
    method: Literal["s_lora", "s_prompts"] = field(default="s_lora", metadata={"help": "Method to tune for."})
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-3, 5e-3, 2e-2], metadata={"help": "Learning rates of the expert to try."}
    )
    head_learning_rates: list[float] = field(
        default_factory=lambda: [2e-3, 1e-2], metadata={"help": "Learning rates of the head to try."}
    )


def first_task(stream: TaskStream, seed: int) -> TaskStream:
    """The first task, judged by a fifth of its own training images."""
    task: Task = stream[0]
    halves = task.train.dataset.train_test_split(test_size=0.2, seed=seed)
    train, held_out = (replace(task.train, dataset=halves[side]) for side in ("train", "test"))
    return TaskStream([replace(task, train=train, test=held_out)], name=f"{stream.name}, first task")


def main():
    groups = (StreamArguments, BackboneArguments, ContinualTrainingArguments, TuningArguments)
    stream_args, backbone, training, tuning = parse(groups)
    stream = first_task(stream_args.load(), training.seed)
    trials = []
    for head_rate in tuning.head_learning_rates:
        for rate in tuning.learning_rates:
            args = replace(training, learning_rate=rate, head_learning_rate=head_rate)
            report = learn(stream, backbone, args, METHODS[tuning.method](k=1))
            trials.append((report.summary()["oracle_accuracy"], rate, head_rate))
            print("accuracy {:.4f} with --learning_rate {:g} --head_learning_rate {:g}".format(*trials[-1]))
    with open(Path(training.output_dir, "tuning.csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["accuracy", "learning_rate", "head_learning_rate"])
        writer.writerows(trials)
    print("best: {:.4f} with --learning_rate {:g} --head_learning_rate {:g}".format(*max(trials)))


if __name__ == "__main__":
    main()
