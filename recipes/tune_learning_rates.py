"""Chooses the learning rates of expert and head on the first tasks of a stream, a fifth of their images held out.

    python recipes/tune_learning_rates.py --benchmark digits --method s_lora --learning_rates 1e-3 5e-3 2e-2

One task is enough where every task has an expert of its own; a pool must be seen to forget, so give it three. No test
image and no later task is looked at, so that what is chosen is fair to report on. Prints the options to use
and writes every trial to `tuning.csv` in the output folder.
"""

import csv
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from hf_clpeft import METHODS, ContinualTrainingArguments, Task, TaskStream
from hf_clpeft.errors import told_in_one_line
from hf_clpeft.training.options import BackboneArguments, StreamArguments, parse
from hf_clpeft.training.recipe import learn


@dataclass
class TuningArguments:
    method: Literal["s_lora", "s_prompts", "l2l", "l2p"] = field(
        default="s_lora", metadata={"help": "Method to tune for."}
    )
    tuning_tasks: int = field(default=1, metadata={"help": "How many of the first tasks to look at."})
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-3, 5e-3, 2e-2], metadata={"help": "Learning rates of the expert to try."}
    )
    head_learning_rates: list[float] = field(
        default_factory=lambda: [2e-3, 1e-2], metadata={"help": "Learning rates of the head to try."}
    )


def hold_out(task: Task, seed: int) -> Task:
    """The task, judged by a fifth of its own training images."""
    halves = task.train.dataset.train_test_split(test_size=0.2, seed=seed)
    train, held_out = (replace(task.train, dataset=halves[side]) for side in ("train", "test"))
    return replace(task, train=train, test=held_out)


def main():
    groups = (StreamArguments, BackboneArguments, ContinualTrainingArguments, TuningArguments)
    stream_args, backbone, training, tuning = parse(groups)
    tasks = [hold_out(task, training.seed) for task in stream_args.load()[: tuning.tuning_tasks]]
    stream = TaskStream(tasks, name=f"first {len(tasks)} tasks")
    method = METHODS[tuning.method](**({"k": 1} if tuning.method.startswith("s_") else {}))
    trials = []
    for head_rate in tuning.head_learning_rates:
        for rate in tuning.learning_rates:
            args = replace(training, learning_rate=rate, head_learning_rate=head_rate)
            summary = learn(stream, backbone, args, method).summary()
            trials.append((summary.get("oracle_accuracy", summary["average_accuracy"]), rate, head_rate))
            print("accuracy {:.4f} with --learning_rate {:g} --head_learning_rate {:g}".format(*trials[-1]))
    with open(Path(training.output_dir, "tuning.csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["accuracy", "learning_rate", "head_learning_rate"])
        writer.writerows(trials)
    # Of equal ones the middle: as far as can be from what is too little and what is too much.
    best = sorted(trial for trial in trials if trial[0] == max(trials)[0])
    best = best[(len(best) - 1) // 2]
    print("best: {:.4f} with --learning_rate {:g} --head_learning_rate {:g}".format(*best))


if __name__ == "__main__":
    with told_in_one_line():
        main()
